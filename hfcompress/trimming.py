"""A vocabulary cut down to what a corpus needs: the tokenizer's files, and the model's rows.

Every sentence of the corpus is cut into the same pieces as before. What stays: pieces that the corpus uses, their
letters one by one (so that words not yet seen can still be spelled), special and language tokens. Ids keep their order.
Why the pieces stay the same: of a unigram model the best segmentation is kept whole, and fewer pieces make no other one
better (the extreme scores, on which that of an unknown letter depends, are kept too); of a BPE model all merges that
lead to a kept piece are kept, and the others were never applied. The corpus is tokenized once more to prove it.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor
from transformers import AutoTokenizer, M2M100Tokenizer, MarianTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hfcompress.errors import ConfigError

PROVEN = 20_000
"""So many sentences a side are tokenized once more, the corpus' first."""
_ROWS = ("shared.weight", "embed_tokens.weight", "lm_head.weight", "lm_head.bias")
_NORMAL, _BPE = 1, 2
_SENTENCEPIECE = (MarianTokenizer, M2M100Tokenizer)


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], targets: Sequence[str], folder: Path
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """(the trimmed tokenizer, the old ids that it keeps, in the order of the new ones); its files are in `folder`.

    Raises ConfigError: a tokenizer of another kind, or one that would cut a sentence otherwise once trimmed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    vocabulary = _vocabulary(tokenizer)
    needed = _pieces(tokenizer, sources, targets)
    needed |= {*tokenizer.all_special_tokens, *map(str, tokenizer.get_added_vocab())}
    needed |= {token for token in vocabulary if token.startswith(">>") and token.endswith("<<")}  # Marian's languages
    languages = vocabulary.keys() - tokenizer.get_vocab().keys()
    if (folder / "tokenizer.json").is_file():
        kept = _trim_json(folder / "tokenizer.json", needed)
    elif isinstance(tokenizer, _SENTENCEPIECE) and not getattr(tokenizer, "separate_vocabs", False):
        kept = _trim_sentencepiece(folder, needed)
    else:
        raise ConfigError(f"trim_vocabulary: {_refusal(tokenizer)}. Leave the vocabulary as it is")
    ids = sorted(i for token, i in vocabulary.items() if token in kept | languages)
    renumbered = {old: new for new, old in enumerate(ids)}
    _renumber_added(folder, renumbered)
    trimmed = AutoTokenizer.from_pretrained(folder)
    _prove(tokenizer, trimmed, renumbered, sources, targets)
    return trimmed, ids


def trim_model(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A model like `model` with only the tokens `kept`; its logits of those are the old ones.

    Raises ConfigError: the configuration names a token that is not kept, or the two sides have vocabularies of their
    own.
    """
    size = model.config.vocab_size
    if getattr(model.config, "share_encoder_decoder_embeddings", True) is False:
        raise ConfigError("trim_vocabulary: this model's two sides have vocabularies of their own")
    rows = torch.tensor([i for i in kept if i < size])
    if len(rows) < len(kept):
        raise ConfigError(f"trim_vocabulary: the tokenizer has ids beyond the model's {size}")
    renumbered = {old: new for new, old in enumerate(kept)}
    fields = _with_ids(model.config.to_dict(), renumbered)
    sizes = {name: len(kept) for name in ("vocab_size", "decoder_vocab_size") if fields.get(name)}  # Marian has two
    trimmed = type(model)(type(model.config)(**fields | sizes)).to(model.dtype)
    trimmed.load_state_dict({name: _rows(name, tensor, rows, size) for name, tensor in model.state_dict().items()})
    generation = model.generation_config
    trimmed.generation_config = type(generation)(**_with_ids(generation.to_dict(), renumbered))
    return trimmed.train(model.training)


def _rows(name: str, tensor: Tensor, rows: Tensor, size: int) -> Tensor:
    if name.endswith(_ROWS) and tensor.shape[0] == size:
        return tensor[rows]
    return tensor[:, rows] if name.endswith("final_logits_bias") else tensor


def _with_ids(fields: dict[str, Any], renumbered: Mapping[int, int]) -> dict[str, Any]:
    """A configuration whose fields that hold ids hold the new ones."""

    def renumber(value: Any) -> Any:
        if isinstance(value, list):
            return [renumber(inner) for inner in value]
        if isinstance(value, int) and value not in renumbered:
            raise ConfigError(f"trim_vocabulary: the model's configuration needs id {value}, which is no special token")
        return renumbered[value] if isinstance(value, int) else value

    holders = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
    return {k: renumber(v) if k.endswith(("_token_id", "_token_ids")) or k in holders else v for k, v in fields.items()}


# ------------------------------------------------------------------------------------------ which pieces


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """token → id; M2M100 numbers its languages after what it calls its vocabulary."""
    languages = tokenizer.lang_token_to_id if isinstance(tokenizer, M2M100Tokenizer) else {}
    return {**tokenizer.get_vocab(), **languages}


def _pieces(tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], targets: Sequence[str]) -> set[str]:
    """All pieces of all sentences, those too that SentencePiece knows and the vocabulary calls unknown."""
    found = set()
    for as_target, sentences in ((False, sources), (True, targets)):
        for sentence in sentences:
            found.update(tokenizer.convert_ids_to_tokens(_ids(tokenizer, sentence, as_target)))
    if isinstance(tokenizer, _SENTENCEPIECE):
        found.update(piece for sentence in sources for piece in tokenizer.tokenize(sentence))
        tokenizer._switch_to_target_mode()  # what text_target= does; pieces alone cannot be asked for that way
        found.update(piece for sentence in targets for piece in tokenizer.tokenize(sentence))
        tokenizer._switch_to_input_mode()
    return found


def _closed(needed: set[str], scores: Mapping[str, float], bpe: bool) -> set[str]:
    """`needed` with all that its pieces are made of, out of the pieces that `scores` has."""
    kept = needed & scores.keys()
    if not bpe:
        ordered = sorted(scores, key=scores.__getitem__)
        return kept | {letter for piece in kept for letter in piece if letter in scores} | {ordered[0], ordered[-1]}
    waiting = list(kept)
    while waiting:
        piece = waiting.pop()
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        parts = {part for pair in halves if set(pair) <= scores.keys() for part in pair}
        parts |= {letter for letter in piece if letter in scores}
        waiting += parts - kept
        kept |= parts
    return kept


# ------------------------------------------------------------------------------------------ SentencePiece


def _trim_sentencepiece(folder: Path, needed: set[str]) -> set[str]:
    """Marian's and M2M100's files: the vocabulary has its own ids, SentencePiece only cuts."""
    models = {path: _parsed(path) for pattern in ("*.spm", "sentencepiece*.model") for path in folder.glob(pattern)}
    kept = set(needed)
    for model in models.values():
        scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
        kept |= _closed(needed, scores, bpe=model.trainer_spec.model_type == _BPE)
    for path, model in models.items():
        pieces = [piece for piece in model.pieces if piece.type != _NORMAL or piece.piece in kept]
        del model.pieces[:]
        model.pieces.extend(pieces)
        model.trainer_spec.vocab_size = len(pieces)
        path.write_bytes(model.SerializeToString(deterministic=True))
    path = folder / "vocab.json"
    ids = json.loads(path.read_text(encoding="utf-8"))
    left = sorted(kept & ids.keys(), key=ids.__getitem__)
    path.write_text(json.dumps({t: i for i, t in enumerate(left)}, ensure_ascii=False, indent=2), encoding="utf-8")
    return kept


def _parsed(path: Path) -> Any:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    return model


# ------------------------------------------------------------------------------------------ tokenizer.json


def _trim_json(path: Path, needed: set[str]) -> set[str]:
    """The file of the tokenizers library: models Unigram and BPE."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    model = whole["model"]
    kind = model["type"]
    needed = needed | {token["content"] for token in whole["added_tokens"]}
    if kind == "Unigram":
        scores = dict(model["vocab"])
        old = {token: i for i, (token, _) in enumerate(model["vocab"])}
        needed.add(model["vocab"][model["unk_id"] or 0][0])
    elif kind == "BPE":
        old, scores = model["vocab"], dict.fromkeys(model["vocab"], 0.0)
        needed |= {token for token in (model["unk_token"],) if token}
    else:
        raise ConfigError(f"trim_vocabulary: a tokenizer of model {kind} cannot be trimmed safely")
    needed |= {token for token in scores if token.startswith("<0x")} if model.get("byte_fallback") else set()
    if kind == "BPE" and not any("▁" in token for token in scores):
        needed |= {token for token in scores if len(token) == 1}  # the bytes, of which everything can be spelled
    kept = _closed(needed, scores, bpe=kind == "BPE")
    left = sorted(kept, key=old.__getitem__)
    if kind == "Unigram":
        model["unk_id"] = left.index(model["vocab"][model["unk_id"]][0]) if model["unk_id"] is not None else None
        model["vocab"] = [[token, scores[token]] for token in left]
    else:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if a in kept and b in kept and a + b in kept]
        model["vocab"] = {token: i for i, token in enumerate(left)}
    added = [token for token in whole["added_tokens"] if token["content"] not in old]
    new = {token: i for i, token in enumerate([*left, *(t["content"] for t in sorted(added, key=lambda t: t["id"]))])}
    for token in whole["added_tokens"]:
        token["id"] = new[token["content"]]
    whole["post_processor"] = _renumbered_processor(whole["post_processor"], new)
    path.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    return kept | set(new)


def _renumbered_processor(processor: Any, new: Mapping[str, int]) -> Any:
    """Post-processors hold (token, id) pairs, or templates with lists of both."""
    if isinstance(processor, list):
        pair = len(processor) == 2 and isinstance(processor[0], str) and isinstance(processor[1], int)
        return [processor[0], new[processor[0]]] if pair else [_renumbered_processor(p, new) for p in processor]
    if isinstance(processor, dict):
        if "ids" in processor and "tokens" in processor:
            return {**processor, "ids": [new[token] for token in processor["tokens"]]}
        return {name: _renumbered_processor(value, new) for name, value in processor.items()}
    return processor


# ------------------------------------------------------------------------------------------ added tokens, proof


def _renumber_added(folder: Path, renumbered: Mapping[int, int]) -> None:
    """The ids that tokenizer_config.json and added_tokens.json repeat."""
    config, added = folder / "tokenizer_config.json", folder / "added_tokens.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    if "added_tokens_decoder" in settings:
        old = {int(i): token for i, token in settings["added_tokens_decoder"].items()}
        settings["added_tokens_decoder"] = {str(renumbered[i]): token for i, token in old.items() if i in renumbered}
        config.write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")
    if added.is_file():
        tokens = json.loads(added.read_text(encoding="utf-8"))
        added.write_text(json.dumps({token: renumbered[i] for token, i in tokens.items()}), encoding="utf-8")


def _prove(
    old: PreTrainedTokenizerBase,
    new: PreTrainedTokenizerBase,
    renumbered: Mapping[int, int],
    sources: Sequence[str],
    targets: Sequence[str],
) -> None:
    """Raises ConfigError unless both give the same pieces, and ids that correspond."""
    for side, sentences in (("source", sources), ("target", targets)):
        for sentence in islice(sentences, PROVEN):
            before, after = (_ids(tokenizer, sentence, side == "target") for tokenizer in (old, new))
            if [renumbered.get(i) for i in before] != after:
                raise ConfigError(
                    f"trim_vocabulary: trimmed, {_refusal(old)} and cuts {sentence!r} otherwise: {len(before)} ids "
                    f"before, {len(after)} after. Leave the vocabulary as it is"
                )


def _ids(tokenizer: PreTrainedTokenizerBase, sentence: str, as_target: bool) -> list[int]:
    whole = {"text_target" if as_target else "text": sentence}
    encoded = tokenizer(**whole, verbose=False)  # it would warn of long ones
    ids: list[int] = encoded["input_ids"]
    return ids


def _refusal(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"{type(tokenizer).__name__} cannot be trimmed safely"
