"""Sequence-level distillation (Kim and Rush 2016): the teacher translates what students are to be trained on.

sources ──▶ n best by beam ──▶ the one nearest the reference (chrF) ──▶ its score ──▶ .shards/00000.parquet …
                                                                 all shards ──▶ filters ──▶ train-*.parquet

Shards are shared out to processes and kept: a run that was stopped goes on with the next one. What a shard holds does
not depend on the number of processes.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import pyarrow.parquet
import torch
from datasets import Dataset, Features, Value, concatenate_datasets
from sacrebleu.metrics import CHRF
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfcompress import losses
from hfcompress.backends import Backend, Encoded, Generate, encode
from hfcompress.errors import DataError, ResumeError
from hfcompress.files import write_atomically
from hfcompress.filters import counts, judge
from hfcompress.schema import Sequences
from hfcompress.sources import no_progress_bars
from hfcompress.teacher import digest_of
from hfcompress.teacher_cache import Process, claim

SHARDS, SUMMARY, SETTINGS = ".shards", "translation.json", "settings.json"
FILE_ROWS = 1_000_000
FEATURES = Features(
    {
        "source": Value("string"),
        "target": Value("string"),  # the teacher's
        "reference": Value("string"),  # null where there is none
        "origin": Value("string"),
        "row": Value("int64"),  # in its origin
        "rank": Value("int32"),  # among the n best, from 0
        "chrf": Value("float32"),  # against the reference
        "score": Value("float32"),  # the teacher's mean log-probability of a token, in nats
        "tokens": Value("int32"),  # of the target
    }
)


@dataclass(frozen=True)
class Text:
    """Sentences to translate, and their references where there are any."""

    origin: str
    sources: Sequence[str]
    references: Sequence[str] | None = None


def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    settings: Sequences,
    folder: Path,
    *,
    backend: Backend | None = None,
    process: Process | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> None:
    """Translate this process' share of `texts` into shards of `folder`; those that are there whole are kept.

    model: the teacher, on its device; it also scores what another `backend` translates. progress: called with (rows
    done, rows in all, tokens of translations a second) of this process. Raises ResumeError: `folder` holds
    translations by another teacher, of other texts or settings.
    """
    process = process or Process()
    model.eval()
    _claim(folder / SHARDS, model, texts, settings)
    parts = list(_parts(texts, settings.shard_rows))
    own = list(enumerate(parts))[process.index :: process.count]
    total, done, tokens, began = sum(len(rows) for _, (_, rows) in own), 0, 0, perf_counter()
    for number, (text, rows) in own:
        path = folder / SHARDS / f"{number:05}.parquet"
        given = _given(text, rows)
        if not _is_whole(path, given):

            def step(more: int, words: int) -> None:
                nonlocal done, tokens
                done, tokens = done + more, tokens + words
                if progress is not None:
                    progress(done, total, tokens / (perf_counter() - began))

            _save(path, given, _translated(given, model, tokenizer, backend, settings, step))
        else:
            done += len(rows)
            if progress is not None:
                progress(done, total, tokens / (perf_counter() - began))


def finish(folder: Path, settings: Sequences) -> Dataset:
    """Filter what all processes have translated, and write it with its counts; gives what is left.

    Raises DataError: shards are missing, or no row is left.
    """
    claimed = json.loads((folder / SHARDS / SETTINGS).read_text(encoding="utf-8"))
    paths = [folder / SHARDS / f"{i:05}.parquet" for i in range(claimed["shards"])]
    missing = [path.name for path in paths if not _mark(path).is_file()]
    if missing:
        raise DataError(f"{folder}: {len(missing)} of {len(paths)} shards are not translated, first {missing[0]}")
    whole = concatenate_datasets([Dataset(pyarrow.parquet.read_table(path)) for path in paths])
    sources, targets, references, scores = (list(whole[name]) for name in ("source", "target", "reference", "score"))
    reasons = judge(sources, targets, references, scores, settings.filters)
    kept = whole.select([i for i, reason in enumerate(reasons) if reason is None])
    summary = {**claimed, "filters": asdict(settings.filters), "counts": counts(reasons)}
    if not len(kept):
        raise DataError(f"{folder}: the filters leave none of {len(whole)} translations: {summary['counts']}")
    for old in folder.glob("train-*.parquet"):
        old.unlink()
    files = -(-len(kept) // FILE_ROWS)
    for i in range(files):
        part = kept.shard(files, i, contiguous=True)
        write_atomically(folder / f"train-{i:05}-of-{files:05}.parquet", _parquet(part))
    write_atomically(folder / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False).encode())
    return kept


# ------------------------------------------------------------------------------------------ one shard


def _translated(
    given: list[dict[str, Any]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    backend: Backend | None,
    settings: Sequences,
    step: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """A shard's rows with their translations. Batches are of like length, longest first; chrF runs beside them."""
    backend = backend or Generate(model, tokenizer, settings)
    lengths = [len(ids) for ids in tokenizer([row["source"] for row in given], truncation=True)["input_ids"]]
    order = sorted(range(len(given)), key=lambda i: (-lengths[i], i))
    rows = [dict(row) for row in given]
    batches = [
        [rows[i] for i in order[start : start + settings.batch_size]]
        for start in range(0, len(order), settings.batch_size)
    ]
    with ThreadPoolExecutor(1) as beside:  # for chrF alone: neither tokenizers nor models are for two threads
        chosen: tuple[list[dict[str, Any]], Encoded, Future[None]] | None = None
        for batch in [*batches, None]:
            last = chosen
            if batch is not None:
                sources = [row["source"] for row in batch]
                encoded = encode(model, tokenizer, sources)
                chosen = batch, encoded, beside.submit(_pick, batch, backend(sources, encoded))
            if last is not None:
                before, states, picked = last
                picked.result()
                step(len(before), _score(before, states, model, tokenizer))
    return rows


def _pick(batch: list[dict[str, Any]], found: list[list[str]]) -> None:
    """The best hypothesis of each by sentence chrF, the likelier of equals; the first where there is no reference."""
    metric = CHRF()
    for row, hypotheses in zip(batch, found):
        scores = [metric.sentence_score(h, [row["reference"]]).score for h in hypotheses] if row["reference"] else []
        row["rank"] = scores.index(max(scores)) if scores else 0
        row["chrf"] = scores[row["rank"]] if scores else None
        row["target"] = hypotheses[row["rank"]]


@torch.inference_mode()
def _score(
    batch: list[dict[str, Any]], encoded: Encoded, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> int:
    """The teacher's score of what was picked, as students will read it. Gives the number of tokens."""
    targets = tokenizer(text_target=[row["target"] for row in batch], truncation=True)["input_ids"]
    lengths = [len(ids) for ids in targets]
    labels = torch.full((len(batch), max(lengths)), losses.IGNORED)
    for line, ids in zip(labels, targets):
        line[: len(ids)] = torch.tensor(ids)
    labels = labels.to(model.device)
    shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
    output = model(attention_mask=encoded.mask, encoder_outputs=encoded.output(), decoder_input_ids=shifted)
    logits = output.logits.float().flatten(0, 1)
    nats = cross_entropy(logits, labels.flatten(), ignore_index=losses.IGNORED, reduction="none").view_as(labels).sum(1)
    for row, loss, length in zip(batch, nats.tolist(), lengths):
        row["score"], row["tokens"] = -loss / length, length
    return sum(lengths)


# ------------------------------------------------------------------------------------------ shards and files


def _parts(texts: Sequence[Text], shard_rows: int) -> Iterator[tuple[Text, range]]:
    for text in texts:
        for start in range(0, len(text.sources), shard_rows):
            yield text, range(start, min(start + shard_rows, len(text.sources)))


def _given(text: Text, rows: range) -> list[dict[str, Any]]:
    sources = text.sources[rows.start : rows.stop]
    references = text.references[rows.start : rows.stop] if text.references is not None else [None] * len(rows)
    return [
        {"source": source, "reference": reference, "origin": text.origin, "row": row}
        for source, reference, row in zip(sources, references, rows, strict=True)
    ]


def _claim(folder: Path, model: PreTrainedModel, texts: Sequence[Text], settings: Sequences) -> None:
    decided = {k: v for k, v in asdict(settings).items() if k not in ("filters", "monolingual", "keep_pairs")}
    rows = {text.origin: len(text.sources) for text in texts}
    shards = len(list(_parts(texts, settings.shard_rows)))
    wanted = {**decided, "rows": rows, "shards": shards, "teacher": digest_of(model)}
    claim(folder / SETTINGS, wanted, lambda told: f"the translations in {folder.parent} were {told}")


def _parquet(rows: Dataset) -> bytes:
    held = io.BytesIO()
    with no_progress_bars():
        rows.to_parquet(held)
    return held.getvalue()


def _mark(path: Path) -> Path:
    return path.with_suffix(".json")


def _digest(given: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()


def _save(path: Path, given: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    file = _parquet(Dataset.from_list(rows, features=FEATURES))
    write_atomically(path, file)
    digests = {"sources": _digest(given), "file": hashlib.sha256(file).hexdigest()}
    write_atomically(_mark(path), json.dumps(digests).encode())  # last: it says that the rest is there


def _is_whole(path: Path, given: list[dict[str, Any]]) -> bool:
    """Whether the shard is there, undamaged. Raises ResumeError: it is of other sentences."""
    if not _mark(path).is_file():
        return False
    digests = json.loads(_mark(path).read_text(encoding="utf-8"))
    if digests["sources"] != _digest(given):
        raise ResumeError(f"{path} holds translations of other sentences: name another folder")
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digests["file"]
