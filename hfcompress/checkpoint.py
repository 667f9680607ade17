"""Folders: what `save` writes and `load` reads. The compressed file lies beside an ordinary config.json."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hfcompress.claims import WRAPPER_PREFIX, kind_of, unsaved
from hfcompress.compressor import Compressor
from hfcompress.container import Reader, StoredSlot, Writer
from hfcompress.errors import FormatError
from hfcompress.files import write_atomically
from hfcompress.folder import save_config

FILE_NAME = "model.hfcompress.safetensors"
"""Not model.safetensors: a reader without this package must stop, not start from random weights."""


@dataclass(frozen=True)
class PartSize:
    """Where the bytes of one tensor go: `codes` bits of the entropy-coded stream, `arrays` bytes outside."""

    name: str
    shape: tuple[int, ...]
    kind: str
    method: str
    codes: float
    arrays: int

    @property
    def weights(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bits_per_weight(self) -> float:
        return (self.codes + 8 * self.arrays) / max(self.weights, 1)


@dataclass(frozen=True)
class Sizes:
    """A file's bytes, part by part. tensors' codes and arrays + tables + index + header = total, to the byte."""

    tensors: tuple[PartSize, ...]
    tables: int
    index: int
    header: int
    total: int

    @property
    def stream(self) -> int:
        """Bytes of the entropy-coded stream."""
        return self.total - self.header - self.index - self.tables - sum(t.arrays for t in self.tensors)

    @property
    def weights(self) -> int:
        return sum(t.weights for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Everything counted, buffers too."""
        return 8 * self.total / max(self.weights, 1)


def to_bytes(model: nn.Module, compressor: Compressor | None) -> bytes:
    """The compressed file of `model` as it is now: claimed weights as described, everything else as it is."""
    prefix = wrapper_prefix(model)
    entries = {} if compressor is None else compressor.entries
    writer = Writer()
    for name, kind, tensor in _saved_tensors(model):
        entry = entries.get(name)
        stored = name.removeprefix(prefix)
        if entry is None:
            writer.add_raw(stored, kind, tensor)
        else:
            with torch.no_grad():
                description = entry.method.describe(entry.latents, entry.slot)
            writer.add_slot(replace(entry.slot, name=stored), tensor.dtype, entry.method, description)
    return writer.to_bytes(f"hfcompress {version('hfcompress')}")


def save(model: nn.Module, folder: Path | str, compressor: Compressor | None = None) -> Sizes:
    """Write `folder`/model.hfcompress.safetensors, and the config.json of a model of transformers or timm.

    The file is the old one or the new one, never a mixture: it is written beside, synced and renamed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = to_bytes(model, compressor)
    write_atomically(folder / FILE_NAME, data)
    save_config(model, folder)
    return sizes(Reader(data))


def read(path: Path | str) -> Reader:
    """A compressed file, or the one in a folder, checked. Raises FormatError, IntegrityError."""
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FormatError(f"no compressed file at {path}: expected a folder with {FILE_NAME}, or such a file")
    try:
        return Reader(path.read_bytes())
    except FormatError as error:
        raise type(error)(f"{path}: {error}") from error


def check_names(reader: Reader, wanted: dict[str, tuple[int, ...]], optional: set[str]) -> None:
    """Raises FormatError unless the file holds exactly the tensors `wanted` (those in `optional` may be absent)."""
    found = reader.shapes()
    missing = sorted(wanted.keys() - found.keys() - optional)
    extra = sorted(found.keys() - wanted.keys())
    other = sorted(n for n in wanted.keys() & found.keys() if wanted[n] != found[n])
    if missing or extra or other:
        shapes = [f"{n} {found[n]} instead of {wanted[n]}" for n in other]
        problems = (("lacks", missing), ("has unknown", extra), ("has other shapes:", shapes))
        lines = [f"{word} {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" for word, names in problems if names]
        raise FormatError("the compressed file is of another model: it " + "; it ".join(lines))


def sizes(reader: Reader) -> Sizes:
    """Bytes of every part of a file. A part that several tensors share is counted at the first."""
    costs = reader.costs()
    seen: set[int] = set()

    def part_size(parts: list[int]) -> tuple[float, int]:
        fresh = [p for p in dict.fromkeys(parts) if p not in seen]
        seen.update(fresh)
        return sum(costs[p][0] for p in fresh), sum(costs[p][1] for p in fresh)

    def measure() -> Iterator[PartSize]:
        for stored in reader.slots:
            method = type(stored.method).__name__.lower()
            yield PartSize(*_place(stored), method, *part_size(list(stored.parts.values())))
        for raw in reader.raw:
            yield PartSize(raw.name, raw.shape, raw.kind, "as it is", *part_size([raw.part]))

    return Sizes(tuple(measure()), reader.tables_size, reader.index_size, reader.header_size, reader.size)


def _place(stored: StoredSlot) -> tuple[str, tuple[int, ...], str]:
    return stored.slot.name, stored.slot.shape, stored.slot.kind.value


def wrapper_prefix(model: nn.Module) -> str:
    """What a file's names lack of the model's: TimmWrapper's prefix, or nothing."""
    wrapped = getattr(getattr(model, "config", None), "model_type", None) == "timm_wrapper"
    return WRAPPER_PREFIX if wrapped else ""


def _saved_tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(name, kind, tensor) of what a file must hold: each parameter once, then the persistent buffers."""
    ignored = unsaved(model)
    modules = dict(model.named_modules())
    persistent = model.state_dict().keys()
    for name, parameter in model.named_parameters():
        if name not in ignored:
            owner, _, leaf = name.rpartition(".")
            yield name, kind_of(modules[owner], leaf, parameter).value, parameter
    for name, buffer in model.named_buffers():
        if name in persistent and name not in ignored:
            yield name, "buffer", buffer
