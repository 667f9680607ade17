"""The compressed file: one safetensors file with five kinds of arrays and an index. Only this module lays out bytes.

slots, raw tensors ──describe──▶ parts (each distinct one once) ──┬─ Symbols ─▶ "symbols": one entropy-coded stream
                                                                 │              "tables":  its frequency tables
                                                                 └─ arrays ──▶ "float16", "float32", … by dtype
"index": zlib-compressed JSON: names, shapes, methods, which part is where
metadata: format, version, tool, sha256 of every array above
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save as to_safetensors
from torch import Tensor

from hfcompress.coding import Coded, Decoder, Symbols, Table, encode, tables_from_bytes, tables_to_bytes
from hfcompress.errors import FormatError, IntegrityError
from hfcompress.methods import BY_NAME
from hfcompress.reparameterization import Description, Kind, Reparameterization, Slot

FORMAT, VERSION = "hfcompress", 1
MAX_INDEX = 1 << 26
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
_ARRAYS = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_STORED_AS = {"bfloat16": "int16", "bool": "uint8"}  # numpy has no bfloat16, and old readers no bool


@dataclass
class Writer:
    """Collects slots and raw tensors, then gives the file's bytes. The same input gives the same bytes."""

    _symbols: list[Symbols] = field(default_factory=list)
    _arrays: dict[str, list[NDArray[Any]]] = field(default_factory=dict)
    _parts: list[list[Any]] = field(default_factory=list)
    _known: dict[bytes, int] = field(default_factory=dict)
    _methods: list[Reparameterization] = field(default_factory=list)
    _slots: list[list[Any]] = field(default_factory=list)
    _raw: list[list[Any]] = field(default_factory=list)

    def add_slot(
        self, slot: Slot, dtype: torch.dtype, method: Reparameterization, description: Description
    ) -> None:
        """One decoded weight. Raises FormatError: an array of the description is not finite."""
        if method not in self._methods:
            self._methods.append(method)
        parts = {name: self._part(slot.name, part) for name, part in description.items()}
        place = [slot.name, list(slot.shape), slot.kind.value, slot.offset, slot.total]
        self._slots.append([*place, _name(dtype), self._methods.index(method), parts])

    def add_raw(self, name: str, kind: str, tensor: Tensor) -> None:
        """A tensor kept as it is: a parameter no rule claims, or a buffer. `kind` is for `inspect` only."""
        dtype = _name(tensor.dtype)
        if dtype not in _ARRAYS:
            raise FormatError(f"{name}: tensors of {tensor.dtype} cannot be stored; {', '.join(_ARRAYS)} can")
        array = tensor.detach().cpu().contiguous().reshape(-1)
        if dtype in _STORED_AS:
            array = array.view(getattr(torch, _STORED_AS[dtype]))
        self._raw.append([name, list(tensor.shape), kind, self._array_part(array.numpy(), dtype)])

    def to_bytes(self, tool: str) -> bytes:
        """The whole file."""
        coded = encode(self._symbols)
        tables = iter(coded.choice)
        parts = [[*part, next(tables)] if part[0] == "symbols" else part for part in self._parts]
        index = {
            "methods": [{type(m).__name__.lower(): asdict(m)} for m in self._methods],  # type: ignore[call-overload]
            "parts": parts,
            "slots": self._slots,
            "raw": self._raw,
        }
        tensors = self._tensors(coded, json.dumps(index, separators=(",", ":")).encode())
        digests = {
            name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in sorted(tensors.items())
        }
        metadata = {"format": FORMAT, "version": str(VERSION), "tool": tool, "sha256": json.dumps(digests)}
        return bytes(to_safetensors(tensors, metadata=metadata))

    def _tensors(self, coded: Coded, index: bytes) -> dict[str, NDArray[Any]]:
        tensors: dict[str, NDArray[Any]] = {
            dtype: np.concatenate(arrays)
            for dtype, arrays in self._arrays.items()
            if any(a.size for a in arrays)
        }
        tensors["index"] = np.frombuffer(zlib.compress(index, 9), dtype=np.uint8)
        if coded.stream.size:
            tensors["symbols"] = coded.stream.astype("<u4").view(np.uint8)
        if coded.tables:
            tensors["tables"] = np.frombuffer(tables_to_bytes(coded.tables), dtype=np.uint8)
        return tensors

    def _part(self, name: str, part: Symbols | NDArray[Any]) -> int:
        if isinstance(part, Symbols):
            key = b"symbols" + hashlib.sha256(part.values.tobytes()).digest()
            if key not in self._known:
                self._known[key] = len(self._parts)
                self._parts.append(["symbols", int(part.values.size)])
                self._symbols.append(part)
            return self._known[key]
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            raise FormatError(f"{name}: values beyond {part.dtype} (not finite): store it in a wider dtype")
        return self._array_part(part.reshape(-1), str(part.dtype))

    def _array_part(self, array: NDArray[Any], dtype: str) -> int:
        key = dtype.encode() + hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
        if key not in self._known:
            self._known[key] = len(self._parts)
            self._parts.append([dtype, int(array.size)])
            self._arrays.setdefault(dtype, []).append(array)
        return self._known[key]


@dataclass(frozen=True)
class StoredSlot:
    """A slot as the file has it: its place, dtype, method and, once read, its description."""

    slot: Slot
    dtype: torch.dtype
    method: Reparameterization
    parts: dict[str, int]


@dataclass(frozen=True)
class StoredRaw:
    """A tensor kept as it is."""

    name: str
    shape: tuple[int, ...]
    kind: str
    part: int


class Reader:
    """A file's bytes, checked: digests first, then the index; nothing is decoded before `tensors` is asked for.

    Raises FormatError (foreign, truncated, malformed, newer) or IntegrityError (a digest differs).
    """

    def __init__(self, data: bytes | memoryview) -> None:
        metadata, self.arrays = _open(bytes(data))
        self.size = len(data)
        self.tool = metadata.get("tool", "unknown")
        try:
            index = json.loads(_inflate(self.arrays["index"].tobytes()))
            self.methods = [_method(m) for m in index["methods"]]
            self.parts: list[list[Any]] = index["parts"]
            self.slots = [self._slot(s) for s in index["slots"]]
            self.raw = [
                StoredRaw(str(n), _shape(n, s), str(k), self._checked(p)) for n, s, k, p in index["raw"]
            ]
            names = self.shapes()
        except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
            raise FormatError(f"the file's index is malformed ({type(error).__name__}: {error})") from error
        if len(names) != len(self.slots) + len(self.raw):
            raise FormatError("the file's index names a tensor twice")
        self.tables = tables_from_bytes(self.arrays["tables"].tobytes()) if "tables" in self.arrays else ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor in the file and its shape."""
        return {s.slot.name: s.slot.shape for s in self.slots} | {r.name: r.shape for r in self.raw}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, decoded tensor) for all of them. Raises FormatError: the stream does not fit the index."""
        values = self.values()
        for raw in self.raw:
            array = values[raw.part]
            dtype = self.parts[raw.part][0]
            if not isinstance(array, np.ndarray) or array.size != int(np.prod(raw.shape, dtype=np.int64)):
                raise FormatError(f"{raw.name}: its array does not fill its shape {raw.shape}")
            tensor = torch.from_numpy(array.copy())
            yield (
                raw.name,
                (tensor.view(getattr(torch, dtype)) if dtype in _STORED_AS else tensor).reshape(raw.shape),
            )
        for stored in self.slots:
            description: Description = {name: values[part] for name, part in stored.parts.items()}
            yield stored.slot.name, decode(stored, description)

    def values(self) -> list[Symbols | NDArray[Any]]:
        """Every part, decoded, in order."""
        stream = self.arrays.get("symbols", np.zeros(0, dtype=np.uint8))
        if stream.size % 4:
            raise FormatError("the symbol stream is not a whole number of words")
        decoder = Decoder(stream.view("<u4"), self.tables)
        used: dict[str, int] = {}
        values: list[Symbols | NDArray[Any]] = []
        for part in self.parts:
            dtype, count = part[0], part[1]
            if dtype == "symbols":
                values.append(decoder.read(count, part[2]))
                continue
            start = used.get(dtype, 0)
            array = self.arrays.get(dtype, np.zeros(0, dtype=_STORED_AS.get(dtype, dtype)))
            if start + count > array.size:
                raise FormatError(f"the file holds {array.size} values of {dtype}, its index asks for more")
            values.append(array[start : start + count])
            used[dtype] = start + count
        decoder.finish()
        for dtype in _ARRAYS:
            if dtype in self.arrays and used.get(dtype, 0) != self.arrays[dtype].size:
                raise FormatError(f"the file holds {dtype} values that its index does not use")
        return values

    def table_of(self, part: int) -> Table:
        """The frequency table of a part that is symbols."""
        return self.tables[self.parts[part][2]]

    def _slot(self, entry: list[Any]) -> StoredSlot:
        name, shape, kind, offset, total, dtype, method, parts = entry
        slot = Slot(str(name), _shape(name, shape), Kind(kind), int(offset), int(total))
        if not 0 <= method < len(self.methods):
            raise FormatError(f"{name}: method {method} of {len(self.methods)} does not exist")
        return StoredSlot(
            slot, _DTYPES[dtype], self.methods[method], {str(k): self._checked(p) for k, p in parts.items()}
        )

    def _checked(self, part: Any) -> int:
        if type(part) is not int or not 0 <= part < len(self.parts):
            raise FormatError(f"part {part!r} of {len(self.parts)} does not exist")
        dtype, count = self.parts[part][:2]
        if dtype not in ("symbols", *_ARRAYS) or type(count) is not int or count < 0:
            raise FormatError(f"part {part} declares {count!r} values of {dtype!r}")
        return part


def decode(stored: StoredSlot, description: Description) -> Tensor:
    """The weight of one slot, as stored. Raises FormatError: the description does not fit the slot."""
    for part in description.values():
        if isinstance(part, np.ndarray) and part.dtype.kind == "f" and not np.isfinite(part).all():
            raise FormatError(f"{stored.slot.name}: a stored scale or value is not finite")
    try:
        with torch.no_grad():
            latents = stored.method.restore(description, stored.slot)
            weight = stored.method.decode(latents, stored.slot, hard=True)
    except (KeyError, RuntimeError, ValueError, AssertionError) as error:
        raise FormatError(
            f"{stored.slot.name}: its parts do not make a weight of {stored.slot.shape} ({error})"
        ) from error
    return weight.to(stored.dtype)


def _open(data: bytes) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Metadata and arrays of a safetensors file of ours, every digest checked."""
    try:
        from safetensors import deserialize

        entries = deserialize(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError) as error:
        raise FormatError(
            f"not a whole safetensors file ({error}): truncated, or not a compressed file"
        ) from error
    if metadata.get("format") != FORMAT:
        raise FormatError(
            "a safetensors file, but not one that hfcompress wrote (its metadata has no format 'hfcompress')"
        )
    if metadata.get("version") != str(VERSION):
        raise FormatError(
            f"format version {metadata.get('version')}, this package reads version {VERSION}: upgrade hfcompress"
        )
    digests = json.loads(metadata.get("sha256") or "{}")
    arrays = {}
    for name, entry in entries:
        raw = bytes(entry["data"])
        if hashlib.sha256(raw).hexdigest() != digests.pop(name, None):
            raise IntegrityError(
                f"the bytes of '{name}' are not those that were written (sha256 differs): download it again"
            )
        stored = _STORED_AS.get(name, name)
        arrays[name] = np.frombuffer(raw, dtype=stored if stored in _ARRAYS else np.uint8)
    if digests:
        raise IntegrityError(
            f"the file lacks {', '.join(sorted(digests))}, which were written: download it again"
        )
    return metadata, arrays


def _inflate(data: bytes) -> bytes:
    inflater = zlib.decompressobj()
    try:
        index = inflater.decompress(data, MAX_INDEX)
    except zlib.error as error:
        raise FormatError(f"the file's index is not zlib data ({error})") from error
    if not inflater.eof or inflater.unused_data:
        raise FormatError(f"the file's index is truncated, or larger than {MAX_INDEX} bytes")
    return index


def _method(entry: Mapping[str, Any]) -> Reparameterization:
    (name, fields), *more = entry.items()
    if more or name not in BY_NAME:
        raise FormatError(
            f"the file uses a method '{name}' that this version does not know: upgrade hfcompress"
        )
    return BY_NAME[name](**fields)


def _shape(name: Any, shape: Any) -> tuple[int, ...]:
    if len(shape) > 8 or any(type(n) is not int or n < 0 for n in shape):
        raise FormatError(f"{name}: impossible shape {shape!r}")
    return tuple(shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
