"""The compressed file: a sealed safetensors file of arrays, and an index of what they hold.

slots, raw tensors ──describe──▶ parts (each distinct one once) ──┬─ Symbols ─▶ "symbols": one entropy-coded stream
                                                                 │              "tables":  its frequency tables
                                                                 └─ arrays ──▶ "float16", "float32", … by dtype
"index": zlib-compressed JSON (`Index`): names, shapes, methods, which part is where, the tool that wrote it
"""

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, NonNegativeInt, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from hfcompress.coding import Coded, Decoder, Symbols, Table, encode, tables_from_bytes, tables_to_bytes
from hfcompress.errors import ConfigError, FormatError
from hfcompress.methods import BY_NAME
from hfcompress.reparameterization import Description, Kind, Reparameterization, Slot
from hfcompress.sealed import seal, unseal

MAX_INDEX = 1 << 26
MAX_WEIGHTS = 1 << 40
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
_ARRAYS = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_STORED_AS = {"bfloat16": "int16", "bool": "uint8"}  # numpy has no bfloat16, and old readers no bool

Shape = Annotated[list[NonNegativeInt], Field(max_length=8)]


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Index:
    """What the file says about its arrays. Everything else follows from it."""

    tool: str
    methods: list[dict[str, dict[str, Any]]]  # {name: fields}
    parts: list[tuple[str, NonNegativeInt, int]]  # "symbols" or a dtype, count, table of the symbols or −1
    # name, shape, kind, offset, total, dtype, method, {name in the description: part}
    slots: list[tuple[str, Shape, str, NonNegativeInt, NonNegativeInt, str, NonNegativeInt, dict[str, NonNegativeInt]]]
    raw: list[tuple[str, Shape, str, NonNegativeInt]]  # name, shape, kind, part


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

    def add_slot(self, slot: Slot, dtype: torch.dtype, method: Reparameterization, description: Description) -> None:
        """One decoded weight. Raises FormatError: an array of the description is not finite, or an unknown dtype."""
        if _name(dtype) not in _DTYPES:
            raise FormatError(f"{slot.name}: weights of {dtype} cannot be stored; {', '.join(_DTYPES)} can")
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
        parts = [[*part, next(tables) if part[0] == "symbols" else -1] for part in self._parts]
        methods = [{type(m).__name__.lower(): asdict(m)} for m in self._methods]  # type: ignore[call-overload]
        index = {"tool": tool, "methods": methods, "parts": parts, "slots": self._slots, "raw": self._raw}
        return seal(self._tensors(coded, json.dumps(index, separators=(",", ":")).encode()))

    def _tensors(self, coded: Coded, index: bytes) -> dict[str, NDArray[Any]]:
        tensors: dict[str, NDArray[Any]] = {
            dtype: np.concatenate(arrays) for dtype, arrays in self._arrays.items() if any(a.size for a in arrays)
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
    """A file's bytes, checked: digests, then the index against itself and the arrays; symbols are decoded on demand.

    Raises FormatError (foreign, truncated, malformed, newer) or IntegrityError (a digest differs).
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self.size = len(data)
        self.arrays = unseal(bytes(data))
        self.tables = tables_from_bytes(self._bytes("tables"))
        try:
            index = TypeAdapter(Index).validate_json(_inflate(self._bytes("index")))
            self.tool, self.parts = index.tool, index.parts
            methods = [_method(entry) for entry in index.methods]
            self.slots = [
                StoredSlot(Slot(name, tuple(shape), Kind(kind), offset, total), _DTYPES[dtype], methods[method], parts)
                for name, shape, kind, offset, total, dtype, method, parts in index.slots
            ]
            self.raw = [StoredRaw(name, tuple(shape), kind, part) for name, shape, kind, part in index.raw]
            self._check()
        except (ConfigError, KeyError, IndexError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise FormatError(f"the file's index is malformed ({type(error).__name__}: {reason})") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor in the file and its shape."""
        return {s.slot.name: s.slot.shape for s in self.slots} | {r.name: r.shape for r in self.raw}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, decoded tensor) for all of them. Raises FormatError: the stream does not fit the index."""
        values = self.values()
        for raw in self.raw:
            dtype, array = self.parts[raw.part][0], values[raw.part]
            assert isinstance(array, np.ndarray)  # as `_check` found
            tensor = torch.from_numpy(array.copy())
            yield raw.name, (tensor.view(getattr(torch, dtype)) if dtype in _STORED_AS else tensor).reshape(raw.shape)
        for stored in self.slots:
            yield stored.slot.name, decode(stored, {name: values[part] for name, part in stored.parts.items()})

    def values(self) -> list[Symbols | NDArray[Any]]:
        """Every part, decoded, in order. Raises FormatError: the stream does not fit the index."""
        decoder = Decoder(np.frombuffer(self._bytes("symbols"), dtype="<u4"), self.tables)
        used = dict.fromkeys(_ARRAYS, 0)
        values: list[Symbols | NDArray[Any]] = []
        for dtype, count, table in self.parts:
            if dtype == "symbols":
                values.append(decoder.read(count, table))
            else:
                values.append(self._array(dtype)[used[dtype] : used[dtype] + count])
                used[dtype] += count
        decoder.finish()
        return values

    def table_of(self, part: int) -> Table:
        """The frequency table of a part that is symbols."""
        return self.tables[self.parts[part][2]]

    def _bytes(self, name: str) -> bytes:
        array = self.arrays.get(name, np.zeros(0, dtype=np.uint8))
        if array.dtype != np.uint8:
            raise FormatError(f"'{name}' holds {array.dtype} instead of bytes")
        return array.tobytes()

    def _array(self, dtype: str) -> NDArray[Any]:
        return self.arrays.get(dtype, np.zeros(0, dtype=_STORED_AS.get(dtype, dtype)))

    def _check(self) -> None:
        """Raises ValueError unless slots, raw tensors, parts and arrays account for each other.

        Afterwards nothing needs more memory than the shapes say, which a loader compares with those of its model.
        """
        tensors = [(s.slot.name, s.slot.shape) for s in self.slots] + [(r.name, r.shape) for r in self.raw]
        if len(dict(tensors)) != len(tensors):
            raise ValueError("a tensor is named twice")
        if sum(math.prod(shape) for _, shape in tensors) > MAX_WEIGHTS:
            raise ValueError(f"more than {MAX_WEIGHTS} weights")
        used = {p for s in self.slots for p in s.parts.values()} | {r.part for r in self.raw}
        if used != set(range(len(self.parts))):
            raise ValueError("a part that nothing uses, or that does not exist, is mentioned")
        for raw in self.raw:
            if self.parts[raw.part][0] == "symbols" or self.parts[raw.part][1] != math.prod(raw.shape):
                raise ValueError(f"{raw.name}: its array does not fill its shape {raw.shape}")
        for slot in self.slots:
            for dtype, count, _ in (self.parts[part] for part in slot.parts.values()):
                if dtype == "symbols" and count != slot.slot.numel:
                    raise ValueError(f"{slot.slot.name}: {count} symbols for a weight of {slot.slot.shape}")
        if len(self._bytes("symbols")) % 4:
            raise ValueError("the symbol stream is not a whole number of words")
        if {part[2] for part in self.parts if part[0] == "symbols"} != set(range(len(self.tables))):
            raise ValueError("a table that nothing uses, or that does not exist, is mentioned")
        for name in (self.arrays.keys() | {part[0] for part in self.parts}) - {"symbols", "tables", "index"}:
            wanted = sum(part[1] for part in self.parts if part[0] == name)
            array = self._array(name)
            if name not in _ARRAYS or array.dtype != _STORED_AS.get(name, name) or array.size != wanted:
                raise ValueError(f"{wanted} values of {name} are used, and {array.size} of {array.dtype} are there")


def decode(stored: StoredSlot, description: Description) -> Tensor:
    """The weight of one slot, as stored. Raises FormatError: the description does not fit the slot."""
    try:
        with torch.no_grad():
            latents = stored.method.restore(description, stored.slot)
            return stored.method.decode(latents, stored.slot, hard=True).to(stored.dtype)
    except FormatError as error:
        raise FormatError(f"{stored.slot.name}: {error}") from error


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
        raise FormatError(f"the file uses a method '{name}' that this version does not know: upgrade hfcompress")
    TypeAdapter(BY_NAME[name]).validate_json(json.dumps(fields), strict=True)  # types; unknown fields are refused next
    return BY_NAME[name](**fields)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
