"""To CTranslate2, and the same sentences translated greedily by both.

Its loader for Marian starts decoding from a zero vector and drops the padding row, which must be the last. That is
right where that row is all zeros. Where training or rounding has moved it, transformers starts from what it has become,
and so must the export: then the row stays, and decoding starts from it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ctranslate2
import torch
from ctranslate2.converters import TransformersConverter
from ctranslate2.converters.transformers import BartLoader, MarianMTLoader, register_loader
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hfcompress.errors import ConfigError, DataError, HFCompressError
from hfcompress.originals import copy_beside
from hfcompress.saving import dequantize

_TOKENS = 48
_SENTENCES = 16
_TIE = 1e-3
"""Logits nearer than this may be ordered otherwise by another order of additions."""
_NEVER = -1e9


class _WithPaddingRow(MarianMTLoader):
    """Marian with its padding row, from which decoding starts."""

    def get_model_spec(self, model: PreTrainedModel) -> Any:
        model.config.normalize_before = model.config.normalize_embedding = False
        spec = BartLoader.get_model_spec(self, model)
        pad = model.config.pad_token_id
        if [pad] in (model.generation_config.bad_words_ids or []) and spec.decoder.projection.has_bias():
            bias = spec.decoder.projection.bias.clone()
            bias[pad] = _NEVER  # it cannot be told which tokens never to say
            spec.decoder.projection.bias = bias
        return spec

    def set_config(self, config: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        config.eos_token, config.unk_token = tokenizer.eos_token, tokenizer.unk_token
        config.decoder_start_token = tokenizer.convert_ids_to_tokens(model.config.decoder_start_token_id)

    def set_decoder(self, spec: Any, decoder: Any) -> None:
        BartLoader.set_decoder(self, spec, decoder)

    def get_vocabulary(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
        return BartLoader.get_vocabulary(self, model, tokenizer)


def to_ctranslate2(
    model: PreTrainedModel, folder: Path, output: Path, quantization: str | None, sentences: Path | None
) -> Iterator[str]:
    """Write `output`/model.bin with its vocabulary, and the tokenizer's files. Raises as `export.export` does."""
    if not model.config.is_encoder_decoder:
        raise ConfigError(f"CTranslate2 translates; a {type(model).__name__} goes --to onnx")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sources = _sources(model, tokenizer, sentences)
    keeps = model.config.model_type == "marian" and not _padding_is_zero(model, tokenizer)
    with TemporaryDirectory() as temporary, _loader(keeps):
        copy_beside(folder, Path(temporary))
        dequantize(model).save_pretrained(temporary)
        try:
            TransformersConverter(temporary).convert(str(output), quantization=quantization, force=True)
        except ValueError as error:
            raise ConfigError(f"CTranslate2 does not take this model: {' '.join(str(error).split())[:300]}") from error
    copy_beside(folder, output)
    if keeps:
        yield "its padding row is not zero: it is kept, and decoding starts from it as in transformers"
    yield _compare(model, tokenizer, sources, output, exact=quantization in (None, "float32"))
    yield f"{(output / 'model.bin').stat().st_size:,} bytes in {output / 'model.bin'}"


def _padding_is_zero(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the padding row is what CTranslate2's own loader takes for granted."""
    pad, table = model.config.pad_token_id, model.get_input_embeddings().weight
    last = pad == len(table) - 1 and tokenizer.convert_ids_to_tokens(pad) == "<pad>"
    return last and model.config.decoder_start_token_id == pad and not table[pad].any()


@contextmanager
def _loader(keeps_padding: bool) -> Iterator[None]:
    if not keeps_padding:
        yield
        return
    register_loader("MarianConfig")(_WithPaddingRow)
    try:
        yield
    finally:
        register_loader("MarianConfig")(MarianMTLoader)


def _sources(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: Path | None) -> list[list[int]]:
    if sentences is not None:
        try:
            lines = sentences.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--sentences {sentences} cannot be read as UTF-8 text: {error}") from error
        found = [tokenizer(line, truncation=True)["input_ids"] for line in lines if line.strip()]
        if not found:
            raise DataError(f"--sentences {sentences} has no line with text")
        return found
    usual = [i for i in range(min(len(tokenizer), model.config.vocab_size)) if i not in tokenizer.all_special_ids]
    generator = torch.Generator().manual_seed(0)
    lengths = [2 + i for i in range(_SENTENCES)]
    draws = [torch.randint(len(usual), (n,), generator=generator).tolist() for n in lengths]
    return [[*(usual[i] for i in drawn), tokenizer.eos_token_id] for drawn in draws]


def _compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sources: list[list[int]], output: Path, *, exact: bool
) -> str:
    """Both translate greedily. Raises HFCompressError where `exact` and a difference is no tie."""
    translator = ctranslate2.Translator(str(output), device="cpu", compute_type="default")
    first = model.generation_config.forced_bos_token_id
    prefix = None if first is None else [[tokenizer.convert_ids_to_tokens(first)]]
    equal = ties = 0
    for number, source in enumerate(sources, start=1):
        ours = _greedy(model, source)
        pieces = tokenizer.convert_ids_to_tokens(source)
        found = translator.translate_batch(
            [pieces], beam_size=1, max_decoding_length=_TOKENS, target_prefix=prefix, max_input_length=0
        )[0].hypotheses[0]
        theirs = tokenizer.convert_tokens_to_ids(found)
        length = min(_TOKENS - 1, max(len(ours), len(theirs)))
        if ours[:length] == theirs[:length]:
            equal += 1
        elif exact and not _is_tie(model, source, ours, theirs):
            raise HFCompressError(
                f"{output}: CTranslate2 translates sentence {number} otherwise than we; do not use it"
            )
        else:
            ties += 1
    others = f", {ties} otherwise{' after two words scored the same' if exact else ''}" if ties else ""
    return f"{len(sources)} sentences translated greedily: {equal} as by us{others}"


def _greedy(model: PreTrainedModel, source: list[int]) -> list[int]:
    """Our translation: what follows the start token, up to the end of sentence."""
    plain = {"forced_eos_token_id": None, "num_beams": 1, "do_sample": False, "max_length": None}
    ids = torch.tensor([source])
    with torch.inference_mode():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=_TOKENS, **plain)
    words = found[0, 1:].tolist()
    end = model.config.eos_token_id
    return words[: words.index(end)] if end in words else words


def _is_tie(model: PreTrainedModel, source: list[int], ours: list[int], theirs: list[int]) -> bool:
    """Whether the first words that differ score the same by our logits."""
    end = model.config.eos_token_id
    a, b = [*ours, end], [*theirs, end]
    place = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
    decoded = torch.tensor([[model.config.decoder_start_token_id, *a[:place]]])
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=decoded).logits[0, -1]
    return bool((logits[a[place]] - logits[b[place]]).abs() < _TIE)
