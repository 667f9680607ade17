"""What a teacher says of every target token, on disk: training from it needs no teacher in memory.

Of each token: the k likeliest classes with their log-probabilities, the mass of all others, and seven drawn from those
with theirs. At k = 16 that is 94 bytes, or 117 where there are more than 65,536 classes. Rows are found by what is in
them, so a shuffled or filtered dataset still finds its own.

    FOLDER/cache.json                  what the cache is of: k, temperature, classes, the teacher's digest
    FOLDER/00000/*.npy, shard.json     a shard's arrays, mapped into memory when read; its digests, written last
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.errors import ConfigError, DataError, ResumeError
from hfcompress.files import write_atomically
from hfcompress.losses import IGNORED
from hfcompress.teacher import digest_of, freeze, logits_of

COLUMNS = ("ids", "log_probs", "samples", "sample_log_probs", "mass")
PREFIX = "teacher_"
"""Of the columns' names in a batch."""
SAMPLES = 7
SETTINGS, MARK = "cache.json", "shard.json"

Collator = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Process:
    """One of several that share the work shard by shard."""

    index: int = 0
    count: int = 1


def write(
    teacher: nn.Module,
    rows: Any,
    collator: Collator,
    folder: Path,
    *,
    k: int = 16,
    temperature: float = 1.0,
    batch_size: int = 64,
    shard_rows: int = 10_000,
    process: Process | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Ask the teacher about all `rows` and keep the answers in `folder`; shards that are there whole are kept.

    rows: of a length, its items with `input_ids` and `labels`. collator: rows → a batch for the teacher, labels padded
    with −100 on the right. Every process writes shards of its own; what they hold does not depend on how many
    processes there are. progress: called with (rows done, rows in all) of this process. Raises ResumeError: `folder`
    holds a cache of another teacher, dataset or setting.
    """
    process = process or Process()
    ask = partial(_ask, freeze(teacher), collator, k, temperature, batch_size)
    made_of: dict[str, Any] = {"k": k, "temperature": temperature, "rows": len(rows), "shard_rows": shard_rows}
    made_of["teacher"] = digest_of(teacher)
    claim(folder / SETTINGS, made_of, lambda told: f"the teacher's cache in {folder} was {told}. Delete it")
    starts = list(enumerate(range(0, len(rows), shard_rows)))[process.index :: process.count]
    total = sum(min(shard_rows, len(rows) - start) for _, start in starts)
    done = 0
    for number, start in starts:
        part = [rows[i] for i in range(start, min(start + shard_rows, len(rows)))]
        keys = np.array([key_of(row) for row in part], np.uint64)
        if not _is_whole(_place(folder, number), keys):
            _save(_place(folder, number), keys, ask(part, keys))
        done += len(part)
        if progress is not None:
            progress(done, total)


class TeacherCache:
    """A finished cache, for reading; rows are looked up by what is in them. Raises DataError: not there, not whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / SETTINGS
        if not path.is_file():
            raise DataError(f"no teacher's cache in {folder}: it has no {SETTINGS}")
        settings = json.loads(path.read_text(encoding="utf-8"))
        self.k, self.temperature = int(settings["k"]), float(settings["temperature"])
        count = -(-settings["rows"] // settings["shard_rows"])
        missing = [i for i in range(count) if not (_place(folder, i) / MARK).is_file()]
        if missing:
            raise DataError(f"{folder} is unfinished: {len(missing)} of {count} shards are missing, first {missing[0]}")
        self._shards = [_open(_place(folder, i)) for i in range(count)]
        keys = np.concatenate([shard["keys"] for shard in self._shards])
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._starts = np.cumsum([0, *(len(shard["keys"]) for shard in self._shards)])

    def check_temperature(self, temperature: float) -> None:
        """Raises ConfigError unless the cache was written at this one: no other can be had from it."""
        if self.temperature != temperature:
            raise ConfigError(
                f"the teacher's cache in {self.folder} was written at temperature {self.temperature}, distillation is "
                f"at {temperature}: write it anew"
            )

    @property
    def bytes_per_token(self) -> float:
        """Of the columns; keys and offsets are 16 bytes a row more."""
        tokens = sum(len(shard["mass"]) for shard in self._shards)
        return sum(shard[name].nbytes for shard in self._shards for name in COLUMNS) / tokens

    def of(self, row: Mapping[str, Sequence[int]]) -> dict[str, NDArray[Any]]:
        """The columns for every token of a row's labels. Raises DataError: the row is not in the cache."""
        key = key_of(row)
        place = int(np.searchsorted(self._keys, np.uint64(key)))
        if place == len(self._keys) or int(self._keys[place]) != key:
            raise DataError(f"{self.folder} knows nothing of a row: write it from the dataset that is trained on")
        number = int(self._order[place])
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        arrays = self._shards[shard]
        first, last = arrays["offsets"][number - self._starts[shard] :][:2]
        columns = {name: arrays[name][first:last] for name in COLUMNS}
        return {name: _unpacked(c) if c.dtype == np.uint8 else c for name, c in columns.items()}


class WithTeacher:
    """A collator that adds to its batches what a cache holds of their rows, as `teacher_ids` and so on."""

    def __init__(self, collator: Collator, cache: TeacherCache) -> None:
        self.collator, self.cache = collator, cache

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        found = [self.cache.of(row) for row in rows]  # first: some collators change their rows
        batch = dict(self.collator(rows))
        length = batch["labels"].shape[1]
        for name in COLUMNS:
            parts = [columns[name] for columns in found]
            whole = np.zeros(
                (len(parts), length, *parts[0].shape[1:]), np.int32 if parts[0].dtype.kind == "u" else np.float16
            )
            for line, part in zip(whole, parts):
                line[: len(part)] = part
            batch[PREFIX + name] = torch.from_numpy(whole)
        return batch


def take(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What a cache has added to a batch, which is then as it was; empty where there is nothing."""
    return {name: inputs.pop(PREFIX + name) for name in COLUMNS if PREFIX + name in inputs}


def key_of(row: Mapping[str, Sequence[int]]) -> int:
    """64 bits of a digest of a row's `input_ids` and `labels`."""
    content = [*row["input_ids"], IGNORED, *row["labels"]]
    return int.from_bytes(hashlib.blake2b(np.asarray(content, "<i4").tobytes(), digest_size=8).digest(), "little")


def summarize(logits: Tensor, k: int, temperature: float, draws: Tensor) -> dict[str, Tensor]:
    """The columns, in float32 and int64, from logits [tokens, classes]; draws [tokens]: uniform in [0, 1).

    The samples of the rest are systematic: one draw, and from there in steps of 1/7 through its distribution.
    """
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    k = min(k, log_p.shape[-1])
    top, ids = log_p.topk(k, dim=-1)
    rest = log_p.exp().scatter(-1, ids, 0.0)
    cumulative = rest.double().cumsum(-1)
    steps = (draws.double()[:, None] + torch.arange(SAMPLES, device=logits.device)) / SAMPLES
    samples = torch.searchsorted(cumulative, steps * cumulative[:, -1:], right=True).clamp_max(log_p.shape[-1] - 1)
    return {
        "ids": ids,
        "log_probs": top,
        "samples": samples,
        "sample_log_probs": log_p.gather(-1, samples),
        "mass": rest.sum(-1),
    }


# ------------------------------------------------------------------------------------------ asking


def _ask(
    teacher: nn.Module,
    collator: Collator,
    k: int,
    temperature: float,
    batch_size: int,
    rows: list[Any],
    keys: NDArray[np.uint64],
) -> dict[str, NDArray[Any]]:
    """A shard's arrays. Batches are of like length; the draws depend on the row alone."""
    lengths = [len(row["labels"]) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (lengths[i], len(rows[i]["input_ids"])))
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    device = next(teacher.parameters()).device
    arrays: dict[str, NDArray[Any]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        labels, logits = _answer(teacher, collator([dict(rows[i]) for i in chosen]), device)
        draws = np.concatenate([np.random.default_rng(int(keys[i])).random(lengths[i]) for i in chosen])
        found = summarize(logits[labels], k, temperature, torch.from_numpy(draws).to(device))
        where = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in chosen])
        for name, tensor in found.items():
            values = _packed(tensor.cpu().numpy(), logits.shape[-1])
            if name not in arrays:
                arrays[name] = np.zeros((offsets[-1], *values.shape[1:]), values.dtype)
            arrays[name][where] = values
    return {**arrays, "offsets": offsets}


@torch.inference_mode()
def _answer(teacher: nn.Module, batch: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """(which labels are tokens [n, length], logits [n, length, classes])"""
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    labels = batch["labels"].to(device)
    if "decoder_input_ids" not in inputs and isinstance(teacher, PreTrainedModel):
        inputs["decoder_input_ids"] = teacher.prepare_decoder_input_ids_from_labels(labels=labels)
    return labels.ne(IGNORED), logits_of(teacher(**inputs))


def _packed(values: NDArray[Any], classes: int) -> NDArray[Any]:
    """Halves; classes in two bytes, or in three."""
    if values.dtype.kind == "f":
        return values.astype(np.float16)
    if classes <= 1 << 16:
        return values.astype(np.uint16)
    return np.ascontiguousarray(values.astype("<u4")[..., None].view(np.uint8)[..., :3])


def _unpacked(values: NDArray[Any]) -> NDArray[Any]:
    wide = np.zeros((*values.shape[:-1], 4), np.uint8)
    wide[..., :3] = values
    unpacked: NDArray[Any] = wide.view("<u4")[..., 0]
    return unpacked


# ------------------------------------------------------------------------------------------ files


def claim(path: Path, wanted: Mapping[str, Any], refusal: Callable[[str], str]) -> None:
    """Say in the file `path` what its folder is made of.

    Raises ResumeError, which `refusal` words from what differs: it is made of something else.
    """
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else wanted
    if differing := [name for name in wanted if found.get(name) != wanted[name]]:
        told = ", ".join(f"{name} {found.get(name)} / {wanted[name]}" for name in differing)
        raise ResumeError(refusal(f"made otherwise (there / asked): {told}"))
    write_atomically(path, json.dumps(wanted, indent=1).encode())


def _place(folder: Path, number: int) -> Path:
    return folder / f"{number:05}"


def _save(place: Path, keys: NDArray[np.uint64], arrays: dict[str, NDArray[Any]]) -> None:
    digests = {}
    for name, array in {**arrays, "keys": keys}.items():
        held = io.BytesIO()
        np.save(held, array)
        write_atomically(place / f"{name}.npy", held.getvalue())
        digests[name] = hashlib.sha256(held.getvalue()).hexdigest()
    write_atomically(place / MARK, json.dumps(digests, indent=1).encode())  # last: it says that the rest is there


def _open(place: Path) -> dict[str, NDArray[Any]]:
    return {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in (*COLUMNS, "keys", "offsets")}


def _is_whole(place: Path, keys: NDArray[np.uint64]) -> bool:
    """Whether the shard is there, undamaged. Raises ResumeError: it is of other rows."""
    if not (place / MARK).is_file():
        return False
    digests = json.loads((place / MARK).read_text(encoding="utf-8"))
    files = {name: place / f"{name}.npy" for name in digests}
    if not all(f.is_file() and hashlib.sha256(f.read_bytes()).hexdigest() == digests[n] for n, f in files.items()):
        return False
    if not np.array_equal(np.load(files["keys"]), keys):
        raise ResumeError(f"the teacher's cache in {place.parent} is of other rows: delete it")
    return True
