"""The parts of a file, which are symbols or arrays of numbers: as the coder takes them, and read back one by one."""

from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfcompress.coding import Symbols
from hfcompress.coding.decoder import Arrays, Place, Tables, check
from hfcompress.coding.plan import Plan
from hfcompress.coding.symbols import PLAIN
from hfcompress.errors import FormatError
from hfcompress.index import SIZES, Index, Part

Value = Symbols | NDArray[Any]
_NUMPY = {"bfloat16": "int16", "bool": "uint8"}


def planes_of(value: Value) -> list[NDArray[np.uint8]]:
    """The bytes of numbers: all least significant ones, and so on."""
    if isinstance(value, Symbols):
        return []
    octets = value.view(np.uint8).reshape(-1, value.itemsize)
    return [octets[:, i] for i in range(value.itemsize)]


def forms_of(values: list[tuple[str, Value]], chosen: Plan) -> tuple[tuple[Part, ...], bytes]:
    """The parts as the index has them, and the bytes of all planes that stay as they are, part by part."""
    forms, planes = iter(chosen.forms), iter(chosen.planes)
    parts, rest = [], []
    for kind, value in values:
        if isinstance(value, Symbols):
            parts.append(Part(kind, value.values.size, (next(forms),)))
            continue
        of_part = tuple(next(planes) for _ in range(value.itemsize))
        parts.append(Part(kind, value.size, of_part))
        plain = [i for i, form in enumerate(of_part) if form.table == PLAIN]
        rest.append(value.view(np.uint8).reshape(-1, value.itemsize)[:, plain].tobytes())
    return tuple(parts), b"".join(rest)


def check_parts(index: Index, tables: Tables, words: int, rest: int) -> None:
    """Raises FormatError unless forms, tables, stream and plain bytes account for each other."""
    symbols, planes = _places(index)
    if any(part.forms[0].table == PLAIN and part.count for part in index.parts if part.type == "symbols"):
        raise FormatError("symbols without a table")
    coded = [p for p in planes if p.form.table != PLAIN]
    if any(p.form.table < 0 for p in coded):
        raise FormatError("contexts for an array of numbers")
    check([*symbols, *coded], tables, 16 * words)
    plain = sum(_plain_bytes(part) for part in index.parts)
    if max(plain - 2 * index.states, 0) != rest:
        raise FormatError(f"{plain} bytes of arrays are used, and {rest} are there beside the stream")


class Parts:
    """Reads parts in order; the last plain bytes come out of the stream's end, so `read` says what has to wait."""

    def __init__(
        self,
        index: Index,
        tables: Tables,
        stream: NDArray[np.uint16],
        rest: bytes | memoryview,
        *,
        measure: bool = False,
    ) -> None:
        self._index, self._bytes, self._end = index, rest, len(rest)
        symbols, planes = _places(index)
        self._arrays = Arrays(symbols, planes, tables, stream, index.states, measure=measure)
        self._left = Counter(p for s in index.slots for _, p in s.parts) + Counter(r.part for r in index.raw)
        self._found: dict[int, Value] = {}
        self.costs = [(0.0, 0)] * len(index.parts)
        self._place: dict[int, tuple[int, int]] = {}
        """Of a part: where its plain bytes begin, or which symbol array it is; its first plane."""
        plain = number = plane = 0
        for i, part in enumerate(index.parts):
            if part.type == "symbols":
                self._place[i] = number, plane
                number += 1
            else:
                self._place[i] = plain, plane
                plain += _plain_bytes(part)
                plane += len(part.forms)
        self._plain = plain

    def read(self, numbers: Iterable[int]) -> bool:
        """Read these parts; False: some can only be taken after `finish`. In the order of first mention."""
        ready = True
        for number in numbers:
            part, (place, _) = self._index.parts[number], self._place[number]
            if part.type != "symbols":
                ready &= place + _plain_bytes(part) <= self._end
            elif number not in self._found:
                values, bits = self._arrays.read(place)
                self._found[number], self.costs[number] = Symbols(values), (bits, 0)
        return ready

    def hold(self, numbers: Iterable[int]) -> None:
        """Keep what was read of these in as few bytes as it needs: it is taken only after all others."""
        for number in numbers:
            value = self._found.get(number)
            if isinstance(value, Symbols) and value.values.size:
                low, high = int(value.values.min()), int(value.values.max())
                narrow = np.promote_types(np.min_scalar_type(min(low, -1)), np.min_scalar_type(high))
                self._found[number] = Symbols(value.values.astype(narrow))

    def finish(self) -> None:
        """After all symbols were read. Raises FormatError unless everything was used."""
        freight = self._arrays.finish()
        carried = self._plain - self._end
        if any(freight[carried:]):
            raise FormatError("the stream carries more than there is to carry")
        self._bytes, self._end = memoryview(bytes(self._bytes) + freight[:carried]), self._plain

    def take(self, parts: Mapping[str, int]) -> dict[str, Value]:
        """The values of these parts; each part as often as it is mentioned in the index."""
        taken = {}
        for name, number in parts.items():
            value = self._found[number] if number in self._found else self._numbers(number)
            taken[name] = Symbols(value.values.astype(np.int32, copy=False)) if isinstance(value, Symbols) else value
            self._left[number] -= 1
            if not self._left[number]:
                self._found.pop(number, None)
        return taken

    def all(self) -> list[Value]:
        """Every part, in order."""
        self.read(range(len(self._index.parts)))
        self.finish()
        return [self._found[i] if i in self._found else self._numbers(i) for i in range(len(self._index.parts))]

    def _numbers(self, number: int) -> NDArray[Any]:
        part, (begin, plane) = self._index.parts[number], self._place[number]
        octets = np.empty((part.count, SIZES[part.type]), dtype=np.uint8)
        plain = [i for i, form in enumerate(part.forms) if form.table == PLAIN]
        flat = np.frombuffer(self._bytes[begin : begin + part.count * len(plain)], dtype=np.uint8)
        octets[:, plain] = flat.reshape(part.count, len(plain))
        bits = 0.0
        for i, form in enumerate(part.forms):
            if form.table != PLAIN:
                octets[:, i], spent = self._arrays.planes[plane + i]
                bits += spent
        self.costs[number] = bits, flat.size
        return octets.reshape(-1).view(np.dtype(_NUMPY.get(part.type, part.type)).newbyteorder("<"))


def _plain_bytes(part: Part) -> int:
    return part.count * sum(form.table == PLAIN for form in part.forms) if part.type != "symbols" else 0


def _places(index: Index) -> tuple[list[Place], list[Place]]:
    """Of symbols and of planes. A symbol array lies as the weight that mentions it first, if it has as many values."""
    shapes: dict[int, tuple[int, ...]] = {}
    for slot in index.slots:
        for _, mentioned in slot.parts:
            shapes.setdefault(mentioned, slot.shape)
    symbols, planes = [], []
    for number, part in enumerate(index.parts):
        if part.type == "symbols":
            shape = shapes.get(number, ())
            symbols.append(Place(part.count, part.forms[0], shape if prod(shape) == part.count else ()))
        else:
            planes += [Place(part.count, form) for form in part.forms]
    return symbols, planes
