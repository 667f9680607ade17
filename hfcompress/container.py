"""The compressed file: a sealed payload of an index, frequency tables, a coded stream and bytes that stay as they are.

slots, raw tensors ──describe──▶ parts (each distinct one once) ─┬─ Symbols ───────────────┬▶ stream, tables
                                                                └─ numbers, byte by byte ─┴▶ or plain bytes
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from hfcompress.coding import Symbols
from hfcompress.coding.decoder import Tables
from hfcompress.coding.plan import plan
from hfcompress.errors import ConfigError, FormatError
from hfcompress.index import MAX_NAME, SIZES, Cursor, Index, RawRecord, SlotRecord, put
from hfcompress.methods import BY_NAME
from hfcompress.packing import squeeze, unsqueeze
from hfcompress.parts import Parts, Value, check_parts, forms_of, planes_of
from hfcompress.reparameterization import Description, Kind, Reparameterization, Slot
from hfcompress.sealed import seal, unseal

MAX_WEIGHTS = 1 << 40
MAX_SIDE = 1 << 16  # numbers that a small weight may have beside it
_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
_STORED_AS = {"bfloat16": "int16", "bool": "uint8"}  # numpy has no bfloat16


@dataclass
class Writer:
    """Collects slots and raw tensors, then gives the file's bytes. The same input gives the same bytes."""

    _parts: list[tuple[str, Value]] = field(default_factory=list)
    _known: dict[bytes, int] = field(default_factory=dict)
    _methods: list[Reparameterization] = field(default_factory=list)
    _slots: list[SlotRecord] = field(default_factory=list)
    _raw: list[RawRecord] = field(default_factory=list)

    def add_slot(self, slot: Slot, dtype: torch.dtype, method: Reparameterization, description: Description) -> None:
        """One decoded weight. Raises FormatError: an array of the description is not finite, or an unknown dtype."""
        if _name(dtype) not in _DTYPES:
            raise FormatError(f"{slot.name}: weights of {dtype} cannot be stored; {', '.join(_DTYPES)} can")
        _check_name(slot.name)
        if method not in self._methods:
            self._methods.append(method)
        parts = tuple((name, self._part(slot, part)) for name, part in description.items())
        number = self._methods.index(method)
        place = slot.name, slot.shape, slot.kind.value, slot.offset, slot.total
        self._slots.append(SlotRecord(*place, _name(dtype), number, parts))

    def add_raw(self, name: str, kind: str, tensor: Tensor) -> None:
        """A tensor kept as it is: a parameter no rule claims, or a buffer. `kind` is for `inspect` only."""
        dtype = _name(tensor.dtype)
        if not SIZES.get(dtype):
            raise FormatError(f"{name}: tensors of {tensor.dtype} cannot be stored; {', '.join(list(SIZES)[1:])} can")
        _check_name(name)
        array = tensor.detach().cpu().contiguous().reshape(-1)
        if dtype in _STORED_AS:
            array = array.view(getattr(torch, _STORED_AS[dtype]))
        self._raw.append(RawRecord(name, tuple(tensor.shape), kind, self._array_part(array.numpy(), dtype)))

    def to_bytes(self, tool: str) -> bytes:
        """The whole file."""
        number: dict[int, int] = {}
        for old in (*(p for s in self._slots for _, p in s.parts), *(r.part for r in self._raw)):
            number.setdefault(old, len(number))
        slots = tuple(replace(s, parts=tuple((n, number[p]) for n, p in s.parts)) for s in self._slots)
        raw = tuple(replace(r, part=number[r.part]) for r in self._raw)
        values = [self._parts[old] for old in number]
        chosen = plan([v for _, v in values if isinstance(v, Symbols)], [p for _, v in values for p in planes_of(v)])
        parts, rest = forms_of(values, chosen)
        methods = tuple({type(m).__name__.lower(): asdict(m)} for m in self._methods)  # type: ignore[call-overload]
        index = squeeze(Index(tool, methods, parts, slots, raw, chosen.states).to_bytes())
        split = max(len(rest) - 2 * chosen.states, 0)
        head = bytearray()
        for length in (len(index), len(chosen.tables), split):
            put(head, length)
        stream = chosen.stream(rest[split:]).astype("<u2").tobytes()
        return seal(b"".join([head, index, chosen.tables, rest[:split], stream]))

    def _part(self, slot: Slot, part: Value) -> int:
        if isinstance(part, Symbols):
            shaped = replace(part, shape=slot.shape) if part.shape is None and part.values.size == slot.numel else part
            return self._numbered(b"symbols" + hashlib.sha256(part.values.tobytes()).digest(), "symbols", shaped)
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            raise FormatError(f"{slot.name}: values beyond {part.dtype} (not finite): store it in a wider dtype")
        return self._array_part(part.reshape(-1), str(part.dtype))

    def _array_part(self, array: NDArray[Any], dtype: str) -> int:
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        return self._numbered(dtype.encode() + hashlib.sha256(array.tobytes()).digest(), dtype, array)

    def _numbered(self, key: bytes, kind: str, value: Value) -> int:
        if key not in self._known:
            self._known[key] = len(self._parts)
            self._parts.append((kind, value))
        return self._known[key]


@dataclass(frozen=True)
class StoredSlot:
    """A slot as the file has it: its place, dtype, method, and the numbers of the parts of its description."""

    slot: Slot
    dtype: torch.dtype
    method: Reparameterization
    parts: dict[str, int]


class Reader:
    """A file's bytes, checked: digest, then the index against itself and the tables; weights are decoded on demand.

    Raises FormatError (foreign, truncated, malformed, newer) or IntegrityError (the digest differs).
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self.size = len(data)
        payload = unseal(data)
        try:
            cursor = Cursor(payload)
            lengths = [cursor.number() for _ in range(3)]
            packed, tables, rest = (cursor.take(length) for length in lengths)
        except ValueError as error:
            raise FormatError("its sections are longer than the file: it is malformed") from error
        stream = payload[cursor.at :]
        if len(stream) % 2:
            raise FormatError("the symbol stream is not a whole number of words")
        self._stream, self._rest = np.frombuffer(stream, dtype="<u2").astype(np.uint16), rest
        self.tables_size, self.index_size = lengths[1], lengths[0]
        self.header_size = self.size - len(payload) + cursor.at - sum(lengths)
        self.index = Index.from_bytes(unsqueeze(bytes(packed)))
        self.tables = Tables.read(bytes(tables))
        self.tool, self.raw = self.index.tool, self.index.raw
        try:
            methods = [_method(entry) for entry in self.index.methods]
            self.slots = [
                StoredSlot(_slot(s), _DTYPES[s.dtype], methods[s.method], dict(s.parts)) for s in self.index.slots
            ]
            self._check()
        except (ConfigError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise FormatError(f"the file's index is malformed ({type(error).__name__}: {reason})") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor in the file and its shape."""
        return {s.slot.name: s.slot.shape for s in self.slots} | {r.name: r.shape for r in self.raw}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, decoded tensor), one after the other. Raises FormatError: the stream does not fit the index."""
        parts, waiting = self._read(), []
        for stored in self.slots:
            if parts.read(stored.parts.values()):
                yield stored.slot.name, decode(stored, parts.take(stored.parts))
            else:
                parts.hold(stored.parts.values())
                waiting.append(stored)
        parts.finish()
        for stored in waiting:
            yield stored.slot.name, decode(stored, parts.take(stored.parts))
        for raw in self.raw:
            (array,) = parts.take({"": raw.part}).values()
            assert isinstance(array, np.ndarray)  # as `_check` found
            tensor, dtype = torch.from_numpy(array), self.index.parts[raw.part].type
            yield raw.name, (tensor.view(getattr(torch, dtype)) if dtype in _STORED_AS else tensor).reshape(raw.shape)

    def values(self) -> list[Value]:
        """Every part, decoded, in order. Raises FormatError: the stream does not fit the index."""
        return self._read().all()

    def costs(self) -> list[tuple[float, int]]:
        """Of every part, the bits it took in the stream and its bytes outside."""
        parts = self._read(measure=True)
        parts.all()
        return parts.costs

    def _read(self, *, measure: bool = False) -> Parts:
        return Parts(self.index, self.tables, self._stream, self._rest, measure=measure)

    def _check(self) -> None:
        """Raises ValueError, FormatError unless slots, raw tensors, parts and arrays account for each other.

        Afterwards nothing needs more memory than the shapes say, which a loader compares with those of its model.
        """
        if sum(prod(shape) for shape in self.shapes().values()) > MAX_WEIGHTS:
            raise ValueError(f"more than {MAX_WEIGHTS} weights")
        most = sum(s.slot.numel for s in self.slots) + MAX_SIDE
        for slot in self.slots:
            for part in slot.parts.values():
                if self.index.parts[part].count > most:
                    raise ValueError(f"{slot.slot.name}: an array larger than all weights together")
        for raw in self.index.raw:
            if self.index.parts[raw.part].type == "symbols" or self.index.parts[raw.part].count != prod(raw.shape):
                raise ValueError(f"{raw.name}: its array does not fill its shape {raw.shape}")
        check_parts(self.index, self.tables, self._stream.size, len(self._rest))


def decode(stored: StoredSlot, description: Description) -> Tensor:
    """The weight of one slot, as stored. Raises FormatError: the description does not fit the slot."""
    try:
        with torch.no_grad():
            latents = stored.method.restore(description, stored.slot)
            return stored.method.decode(latents, stored.slot, hard=True).to(stored.dtype)
    except FormatError as error:
        raise FormatError(f"{stored.slot.name}: {error}") from error


def _slot(record: SlotRecord) -> Slot:
    return Slot(record.name, record.shape, Kind(record.kind), record.offset, record.total)


def _check_name(name: str) -> None:
    if set(name) & set("\0\1\2") or len(name.encode()) > MAX_NAME:
        raise FormatError(f"{name[:80]!r}…: a tensor's name has at most {MAX_NAME} bytes, none of them 0, 1 or 2")


def _method(entry: Mapping[str, Any]) -> Reparameterization:
    (name, fields), *more = entry.items()
    if more or name not in BY_NAME:
        raise FormatError(f"the file uses a method '{name}' that this version does not know: upgrade hfcompress")
    TypeAdapter(BY_NAME[name]).validate_json(json.dumps(fields), strict=True)  # types; unknown fields are refused next
    return BY_NAME[name](**fields)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
