"""The index of a compressed file: what its arrays are. Records ⇄ bytes, with one way only to write each index.

    text     JSON: [tool, methods, layouts, kinds]      the few long things, each once
    names    of slots, then of raw tensors
    numbers  everything else, column by column, as LEB128 varints; expected values are zeros, which compress to nothing

A part is an array of a description or a raw tensor's values. Parts are numbered in the order in which slots, then raw
tensors first mention them.
"""

import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from hfcompress.coding.bits import unzigzag, zigzag
from hfcompress.coding.symbols import CONTEXTS, Form
from hfcompress.errors import FormatError

TYPES = ("symbols", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
SIZES = dict(zip(TYPES, (0, 8, 4, 2, 2, 8, 4, 2, 1, 1, 1)))
MAX_BYTES, MAX_TENSORS, MAX_NAME, MAX_AXES = 1 << 26, 1 << 16, 1024, 8
_LZMA = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20, "lc": 3, "lp": 0, "pb": 0}]
COMMON = (
    b'"left","uint8"],["left_amplitude","float16"],["right","uint8"],["right_amplitude","float16"],["scale","float32"'
    b'{"multihash":{"fraction":0.1,"bytes":null,"bits":8,"seed":0}}[["alive","symbols"],["survivors","float16"]]'
    b'{"softthreshold":{"survivors":"float16"}}{"levels":{"points":16,"bucket":256,"start":"quantile","scales":"float16"}}'
    b'["codes","symbols"],["points","float16"],["low","float16"],["span","float16"]["zero","uint8"]"factorized""dft"'
    b'["zero","uint8"],["step","float32"]"bucket":null,"stochastic":true,"scales":"float32","zero_point":true}}'
    b"model.shared.weight\0model.decoder.layers.0.encoder_attn.q_proj.bias\0.fc1.weight\0.self_attn.k_proj.bias\0"
    b".final_layer_norm.weight\0.out_proj.bias\0.downsample.0.weight\0features.classifier.1.bias\0"
    b"layer1.0.conv1.weight\0.bn1.running_mean\0.bn1.running_var\0.bn1.num_batches_tracked\0conv2.bias\0"
    b'["hfcompress 0.1.0",[{"entropypenalized":{"transform":"none","prior":"factorized","step":0.0625}},'
    b'{"uniform":{"bits":4,"bucket":256,"stochastic":false,"scales":"float16","zero_point":false}},'
    b'{"dense":{"dtype":"float16"}}],[[["codes","symbols"],["step","int16"]],'
    b'[["codes","symbols"],["low","float16"],["step","float16"]],[["weight","float16"]]],'
    b'["linear","norm","embedding","other","bias","buffer","conv","linear"]]'
    b"conv1.weight\0conv1.bias\0conv2.weight\0conv2.bias\0fc1.weight\0fc1.bias\0fc2.weight\0fc2.bias\0fc3.weight\0fc3.bias\0"
)
"""What deflate may refer back to. Part of the format."""


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
        names = "".join(f"{record.name}\0" for record in records).encode()
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
        expected = (0, 0)
        for slot in self.slots:
            yield zigzag(slot.offset - expected[0])
            yield zigzag(slot.total - expected[1])
            expected = slot.offset + prod(slot.shape), slot.total
        yield from (TYPES.index(self.parts[r.part].type) for r in self.raw)
        seen = 0
        for record in records:
            for part in [p for _, p in record.parts] if isinstance(record, SlotRecord) else [record.part]:
                yield seen - part  # 0: a new one
                if part == seen:
                    seen += 1
                    yield zigzag(self.parts[part].count - prod(record.shape))
        forms = [f for p in self.parts for f in p.forms]
        yield from (f.table + 2 for f in forms)
        yield from (p.forms[0].shift for p in self.parts if p.type == "symbols")
        for form in forms:
            if form.table == CONTEXTS:
                yield zigzag(form.center)
                yield form.prior


def _read(cursor: "Cursor") -> Index:
    length, slots, raws, log_states = (cursor.number() for _ in range(4))
    if slots + raws > MAX_TENSORS:
        raise ValueError(f"{slots + raws} tensors; at most {MAX_TENSORS} are allowed")
    tool, methods, layouts, kinds = json.loads(bytes(cursor.take(length)))
    names = [cursor.name() for _ in range(slots + raws)]
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
    places, expected = [], (0, 0)
    for shape in shapes[:slots]:
        place = expected[0] + unzigzag(cursor.number()), expected[1] + unzigzag(cursor.number())
        if min(place) < 0:
            raise ValueError("a slot begins before its group")
        places.append(place)
        expected = place[0] + prod(shape), place[1]
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


def _mention(cursor: "Cursor", parts: list[tuple[str, int]], kind: str, numel: int) -> int:
    """The number of the part mentioned next, which is new or of the same type."""
    part = len(parts) - cursor.number()
    if part == len(parts):
        count = numel + unzigzag(cursor.number())
        if count < 0:
            raise ValueError("a part of less than nothing")
        parts.append((kind, count))
    if part < 0 or parts[part][0] != kind:
        raise ValueError("a part that does not exist, or is of another type")
    return part


def _forms(cursor: "Cursor", types: Sequence[str]) -> list[tuple[Form, ...]]:
    widths = [SIZES[t] or 1 for t in types]
    tables = [[cursor.number() - 2 for _ in range(width)] for width in widths]
    shifts = [cursor.number() if t == "symbols" else 0 for t in types]
    forms = []
    for of_part, shift in zip(tables, shifts):
        pairs = [(unzigzag(cursor.number()), cursor.number()) if t == CONTEXTS else (0, 0) for t in of_part]
        forms.append(tuple(Form(t, shift, center, prior) for t, (center, prior) in zip(of_part, pairs)))
    return forms


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


def squeeze(data: bytes) -> bytes:
    """The shortest of: as it is (0), raw deflate with `COMMON` before it (1), raw LZMA (2); that number first."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, COMMON)
    packed = deflate.compress(data) + deflate.flush()
    others = lzma.compress(data, lzma.FORMAT_RAW, filters=_LZMA)
    return min((b"\0" + data, b"\1" + packed, b"\2" + others), key=len)


def unsqueeze(data: bytes) -> bytes:
    """The inverse. Raises FormatError: malformed, more than MAX_BYTES."""
    way, body = data[:1], data[1:]
    inflater: Any
    if way == b"\0":
        return body
    if way == b"\1":
        inflater = zlib.decompressobj(-15, COMMON)
    elif way == b"\2":
        inflater = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA)
    else:
        raise FormatError("the file's index is packed in a way that this version does not know: upgrade hfcompress")
    try:
        found: bytes = inflater.decompress(body, MAX_BYTES)
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise FormatError(f"the file's index cannot be unpacked ({error})") from error
    if not inflater.eof or inflater.unused_data:
        raise FormatError(f"the file's index is truncated, or larger than {MAX_BYTES} bytes")
    return found
