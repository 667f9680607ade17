"""The index of a compressed file: what its arrays are. Records ⇄ bytes, with one way only to write each index.

    text     JSON: [tool, methods, layouts, kinds]      the few long things, each once
    names    of slots, then of raw tensors; a number in one that is, or follows, the number before it is one byte
    numbers  everything else, column by column, as LEB128 varints; expected values are zeros, which compress to nothing

A part is an array of a description or a raw tensor's values. Parts are numbered in the order in which slots, then raw
tensors first mention them.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from hfcompress.coding.bits import unzigzag, zigzag
from hfcompress.coding.symbols import CONTEXTS, MAX_SHIFT, Form
from hfcompress.errors import FormatError

TYPES = ("symbols", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
SIZES = dict(zip(TYPES, (0, 8, 4, 2, 2, 8, 4, 2, 1, 1, 1)))
MAX_TENSORS, MAX_NAME, MAX_AXES = 1 << 16, 1024, 8
_JOINED = MAX_SHIFT + 1
_SAME, _NEXT = "\1", "\2"
_NUMBER, _FOLDED = re.compile("([0-9]+)"), re.compile(f"([0-9]+|[{_SAME}{_NEXT}])")


@dataclass(frozen=True)
class Part:
    """type: one of TYPES; forms: one for symbols, one per byte of a number (least significant first) for the others."""

    type: str
    count: int
    forms: tuple[Form, ...]


@dataclass(frozen=True)
class SlotRecord:
    """A decoded weight. dtype, kind: names; method: number; parts: names in the description and their parts."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    total: int
    dtype: str
    method: int
    parts: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class RawRecord:
    """A tensor kept as it is."""

    name: str
    shape: tuple[int, ...]
    kind: str
    part: int


@dataclass(frozen=True)
class Index:
    """methods: {name: fields} each. states: of the stream."""

    tool: str
    methods: tuple[dict[str, Any], ...]
    parts: tuple[Part, ...]
    slots: tuple[SlotRecord, ...]
    raw: tuple[RawRecord, ...]
    states: int

    def to_bytes(self) -> bytes:
        records: list[SlotRecord | RawRecord] = [*self.slots, *self.raw]
        layouts: dict[tuple[tuple[str, str], ...], int] = {}
        kinds: dict[str, int] = {}
        for slot in self.slots:
            layouts.setdefault(self._layout(slot), len(layouts))
        for record in records:
            kinds.setdefault(record.kind, len(kinds))
        text = json.dumps([self.tool, self.methods, list(layouts), list(kinds)], separators=(",", ":")).encode()
        names = "".join(f"{name}\0" for name in fold(record.name for record in records)).encode()
        out = bytearray()
        for number in (len(text), len(self.slots), len(self.raw), self.states.bit_length() - 1):
            put(out, number)
        out += text + names
        for number in self._numbers(layouts, kinds):
            put(out, number)
        return bytes(out)

    @staticmethod
    def from_bytes(data: bytes) -> "Index":
        """Raises FormatError: malformed, or not as `to_bytes` writes it."""
        try:
            index = _read(Cursor(data))
            again = index.to_bytes()
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise FormatError(f"the file's index is malformed ({type(error).__name__}: {reason})") from error
        if again != data:
            raise FormatError("the file's index is malformed (it is not as it would be written)")
        return index

    def _layout(self, slot: SlotRecord) -> tuple[tuple[str, str], ...]:
        return tuple((name, self.parts[part].type) for name, part in slot.parts)

    def _numbers(self, layouts: dict[tuple[tuple[str, str], ...], int], kinds: dict[str, int]) -> Iterator[int]:
        records: list[SlotRecord | RawRecord] = [*self.slots, *self.raw]
        yield from (len(r.shape) for r in records)
        yield from (n for r in records for n in r.shape)
        yield from (kinds[r.kind] for r in records)
        yield from (TYPES.index(s.dtype) for s in self.slots)
        yield from (s.method for s in self.slots)
        yield from (layouts[self._layout(s)] for s in self.slots)
        expected = _expected_places([(s.method, prod(s.shape)) for s in self.slots])
        for slot in self.slots:
            offset, total = expected[slot.method]
            yield zigzag(slot.offset - offset)
            yield zigzag(slot.total - total)
            expected[slot.method] = slot.offset + prod(slot.shape), slot.total
        yield from (TYPES.index(self.parts[r.part].type) for r in self.raw)
        seen = 0
        for record in records:
            for part in [p for _, p in record.parts] if isinstance(record, SlotRecord) else [record.part]:
                yield seen - part  # 0: a new one
                if part == seen:
                    seen += 1
                    count = self.parts[part].count
                    yield 0 if count == prod(record.shape) else count + 1
        forms = [f for p in self.parts for f in p.forms]
        yield from (f.table + 2 for f in forms)
        yield from (f.shift + _JOINED * f.joined for f in (p.forms[0] for p in self.parts if p.type == "symbols"))
        for form in forms:
            if form.table == CONTEXTS:
                yield zigzag(form.center)
                yield form.prior


def _read(cursor: "Cursor") -> Index:
    length, slots, raws, log_states = (cursor.number() for _ in range(4))
    if slots + raws > MAX_TENSORS:
        raise ValueError(f"{slots + raws} tensors; at most {MAX_TENSORS} are allowed")
    tool, methods, layouts, kinds = json.loads(bytes(cursor.take(length)))
    names = unfold(cursor.name() for _ in range(slots + raws))
    if len(set(names)) < len(names):
        raise ValueError("a tensor is named twice")

    def column(n: int) -> list[int]:
        return [cursor.number() for _ in range(n)]

    axes = column(slots + raws)
    if max(axes, default=0) > MAX_AXES:
        raise ValueError(f"a tensor of {max(axes)} axes")
    shapes = [tuple(column(n)) for n in axes]
    kind = [kinds[k] for k in column(slots + raws)]
    dtypes, method, layout = column(slots), column(slots), [layouts[n] for n in column(slots)]
    places, expected = [], _expected_places([(m, prod(s)) for m, s in zip(method, shapes)])
    for number, shape in zip(method, shapes):
        offset, total = expected[number]
        place = offset + unzigzag(cursor.number()), total + unzigzag(cursor.number())
        if min(place) < 0:
            raise ValueError("a slot begins before its group")
        places.append(place)
        expected[number] = place[0] + prod(shape), place[1]
    types = [[TYPES.index(t) for _, t in entries] for entries in layout] + [[t] for t in column(raws)]
    parts: list[tuple[str, int]] = []
    mentions = [[_mention(cursor, parts, TYPES[t], prod(s)) for t in ts] for s, ts in zip(shapes, types)]
    records = tuple(
        SlotRecord(
            names[i], shapes[i], kind[i], *places[i], TYPES[dtypes[i]], method[i],
            tuple((name, part) for (name, _), part in zip(layout[i], mentions[i])),
        )
        for i in range(slots)
    )  # fmt: skip
    raw = tuple(RawRecord(names[i], shapes[i], kind[i], mentions[i][0]) for i in range(slots, slots + raws))
    found = tuple(Part(t, n, forms) for (t, n), forms in zip(parts, _forms(cursor, [t for t, _ in parts])))
    cursor.finish()
    return Index(tool, tuple(methods), found, records, raw, 1 << min(log_states, 31))


def _expected_places(slots: Sequence[tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Of each method, where its first slot lies if its slots (method, weights) are one group: at 0 of all of them."""
    totals: dict[int, int] = {}
    for method, weights in slots:
        totals[method] = totals.get(method, 0) + weights
    return {method: (0, total) for method, total in totals.items()}


def _mention(cursor: "Cursor", parts: list[tuple[str, int]], kind: str, numel: int) -> int:
    """The number of the part mentioned next, which is new or of the same type."""
    part = len(parts) - cursor.number()
    if part == len(parts):
        count = cursor.number()
        parts.append((kind, count - 1 if count else numel))
    if part < 0 or parts[part][0] != kind:
        raise ValueError("a part that does not exist, or is of another type")
    return part


def _forms(cursor: "Cursor", types: Sequence[str]) -> list[tuple[Form, ...]]:
    widths = [SIZES[t] or 1 for t in types]
    tables = [[cursor.number() - 2 for _ in range(width)] for width in widths]
    shifts = [cursor.number() if t == "symbols" else 0 for t in types]
    forms = []
    for of_part, number in zip(tables, shifts):
        joined, shift = number >= _JOINED, number - _JOINED * (number >= _JOINED)
        pairs = [(unzigzag(cursor.number()), cursor.number()) if t == CONTEXTS else (0, 0) for t in of_part]
        forms.append(tuple(Form(t, shift, center, prior, joined) for t, (center, prior) in zip(of_part, pairs)))
    return forms


def fold(names: Iterable[str]) -> Iterator[str]:
    """Names whose k-th number is the k-th number of the name before, or one more, have a control byte in its place."""
    before: list[str] = []
    for name in names:
        pieces = _NUMBER.split(name)
        numbers = pieces[1::2]
        for k, (number, last) in enumerate(zip(numbers, before)):
            if number == last:
                pieces[2 * k + 1] = _SAME
            elif number == str(int(last) + 1):
                pieces[2 * k + 1] = _NEXT
        yield "".join(pieces)
        before = numbers


def unfold(names: Iterable[str]) -> list[str]:
    """The inverse. Raises IndexError, ValueError: a name refers to a number that is not there, or is too long."""
    found: list[str] = []
    before: list[str] = []
    for name in names:
        pieces = _FOLDED.split(name)
        for k in range(1, len(pieces), 2):
            if pieces[k] == _SAME:
                pieces[k] = before[k // 2]
            elif pieces[k] == _NEXT:
                pieces[k] = str(int(before[k // 2]) + 1)
        found.append("".join(pieces))
        if len(found[-1].encode()) > MAX_NAME:
            raise ValueError(f"a name of more than {MAX_NAME} bytes")
        before = pieces[1::2]
    return found


class Cursor:
    """Reads from bytes. Raises ValueError where there are no more."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self.at = data, 0

    def number(self) -> int:
        value = shift = 0
        while True:
            if self.at >= len(self._data) or shift > 63:
                raise ValueError("truncated")
            byte = self._data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def take(self, length: int) -> bytes | memoryview:
        self.at += length
        if self.at > len(self._data):
            raise ValueError("truncated")
        return self._data[self.at - length : self.at]

    def name(self) -> str:
        end = bytes(self._data[self.at : self.at + MAX_NAME + 1]).index(b"\0")
        name = bytes(self.take(end)).decode()
        self.at += 1
        return name

    def finish(self) -> None:
        if self.at != len(self._data):
            raise ValueError("more than is used")


def put(out: bytearray, value: int) -> None:
    """LEB128: seven bits a byte, least significant first, the high bit set on all but the last."""
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
