"""A joint SentencePiece vocabulary for a translation model trained from scratch; pairs turned into ids."""

import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import sentencepiece
from datasets import Dataset
from transformers import MarianTokenizer, PreTrainedTokenizerBase

from hfcompress.errors import ConfigError, DataError
from hfcompress.passes import SKIPPED, Row
from hfcompress.schema import TranslationData, Vocabulary
from hfcompress.sources import no_progress_bars

logger = logging.getLogger(__name__)

_AT_ONCE = 256  # pairs of a stream that are encoded together


def train_tokenizer(train: Dataset, data: TranslationData, vocabulary: Vocabulary, folder: Path) -> MarianTokenizer:
    """A Marian tokenizer of exactly `vocabulary.size` ids, trained on both sides of `train`, in `folder`.

    `train` has the columns `source` and `target` (str). Ids as Marian has them: 0 is </s>, 1 is <unk>, the
    last is <pad>. The same corpus gives the same files, byte for byte; what `AutoTokenizer` loads from
    `folder` gives the same ids. Raises ConfigError where the corpus does not allow that size, saying which it
    does.
    """
    model = _train(train, vocabulary)
    ids = _ids(model)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(model)
    (folder / "vocab.json").write_text(json.dumps(ids, indent=2), encoding="utf-8")
    with warnings.catch_warnings():
        # Asked for by MarianTokenizer's `normalize` only, which nothing calls.
        warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
        tokenizer = MarianTokenizer(
            source_spm=str(folder / "source.spm"),
            target_spm=str(folder / "target.spm"),
            vocab=str(folder / "vocab.json"),
            source_lang=data.source,
            target_lang=data.target,
            model_max_length=data.max_length,
        )
    tokenizer.save_pretrained(folder)
    return tokenizer


def encode_pairs(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, data: TranslationData, *, truncate: bool
) -> Dataset:
    """Columns `source` and `target` → `input_ids`, `attention_mask`, `labels` (lists of int, </s> included).

    A pair with a side of more than `data.max_length` ids is cut to that length where `truncate` is True (for
    evaluation: every row must stay), and left out, with a logged count, where it is False (for training).
    Raises DataError where no pair is left.
    """
    longest = data.max_length

    def encode(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        return encode_batch(rows, tokenizer, longest, truncate=truncate)

    with no_progress_bars():  # in memory: nothing is read from a cache, or left in one
        encoded = dataset.map(
            encode,
            batched=True,
            remove_columns=dataset.column_names,
            keep_in_memory=True,
            load_from_cache_file=False,
        )
    dropped = len(dataset) - len(encoded)
    if dropped:
        logger.warning("Left out %d of %d pairs: longer than %d tokens (max_length).", dropped, len(dataset), longest)
    if not len(encoded):
        raise DataError(f"None of {len(dataset)} pairs has at most {longest} tokens on both sides: raise max_length.")
    return encoded


def encode_batch(
    rows: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, longest: int, *, truncate: bool
) -> dict[str, list[Any]]:
    """What `encode_pairs` makes of some rows."""
    # One id more than allowed is enough to tell what is too long.
    limit = longest if truncate else longest + 1
    encoded = tokenizer(rows["source"], text_target=rows["target"], truncation=True, max_length=limit)
    columns = {name: encoded[name] for name in ("input_ids", "attention_mask", "labels")}
    kept = [
        i for i, (s, t) in enumerate(zip(columns["input_ids"], columns["labels"])) if max(len(s), len(t)) <= longest
    ]
    return {name: [values[i] for i in kept] for name, values in columns.items()}


class StreamedPairs:
    """What is trained on of a stream's rows: those that `encode_pairs` leaves, encoded as it does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
        self.tokenizer, self.longest = tokenizer, longest

    def __call__(self, rows: Iterator[Row], place: tuple[int, int, int], skip: int) -> Iterator[Row | None]:
        while some := list(islice(rows, _AT_ONCE)):
            columns = {name: [row[name] for row in some] for name in ("source", "target")}
            encoded = encode_batch(columns, self.tokenizer, self.longest, truncate=False)
            for values in zip(*encoded.values()):
                yield dict(zip(encoded, values)) if skip <= 0 else SKIPPED
                skip -= 1


def _ids(model: bytes) -> dict[str, int]:
    """SentencePiece's own ids, and <pad> after them."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    return ids | {"<pad>": len(ids)}  # never a piece learnt from text: those do not mix letters and signs


def _train(train: Dataset, vocabulary: Vocabulary) -> bytes:
    """The serialized SentencePiece model."""
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(train),
            model_writer=written,
            vocab_size=vocabulary.size - 1,  # <pad> is not SentencePiece's
            model_type=vocabulary.model,
            character_coverage=1.0,
            eos_id=0,
            unk_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=4,  # sums of floats, and so the pieces, depend on it: never the machine's own count
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(_impossible(vocabulary.size, str(error))) from error
    return written.getvalue()


def _sentences(train: Dataset) -> Iterator[str]:
    for rows in train.select_columns(["source", "target"]).iter(batch_size=1000):
        yield from rows["source"]
        yield from rows["target"]


def _impossible(size: int, message: str) -> str:
    """What SentencePiece said, in terms of the recipe's `vocabulary.size`, which counts <pad> too."""
    if most := re.search(r"set it to a value <= (\d+)", message):
        return f"vocabulary.size {size} is too large for this corpus: at most {int(most[1]) + 1}."
    if least := re.search(r"smaller than required_chars.*? (\d+) vs (\d+)", message, re.DOTALL):
        return f"vocabulary.size {size} is too small for this corpus's characters: at least {int(least[2]) + 1}."
    return f"vocabulary.size {size} does not fit this corpus: {message}"
