"""The way back: tables and stream to arrays, and where each array's bits went."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfcompress.coding import contexts, trellis
from hfcompress.coding.bits import BitReader
from hfcompress.coding.classes import Classes, read_classes
from hfcompress.coding.contexts import Grid
from hfcompress.coding.rans import Decoder
from hfcompress.coding.symbols import CONTEXTS, MAX_SHIFT, PLAIN, Form, count
from hfcompress.coding.tables import PRECISION, TOTAL, Table, read
from hfcompress.errors import FormatError

_LEAST_BITS = PRECISION - np.log2(TOTAL - 1)


@dataclass(frozen=True)
class Tables:
    """All of a file: shared ones, and those of contexts for weights with a kernel and without."""

    shared: tuple[Table, ...]
    classes: tuple[Classes | None, Classes | None]

    @staticmethod
    def read(data: bytes) -> "Tables":
        """Raises FormatError: truncated or malformed."""
        source = BitReader(data)
        shared = tuple(read(source) for _ in range(source.golomb()))
        kernel, plain = (read_classes(source) if source.fixed(1) else None for _ in range(2))
        source.finish()
        return Tables(shared, (kernel, plain))


@dataclass(frozen=True)
class Place:
    """An array to be decoded: how many values, in what form; `shape` where contexts need it."""

    count: int
    form: Form
    shape: tuple[int, ...] = ()

    @property
    def grid(self) -> Grid:
        return Grid.of(self.shape, self.form.prior)


def check(places: Sequence[Place], tables: Tables, stream_bits: int) -> None:
    """Raises FormatError unless forms and tables account for each other and the stream may be long enough."""
    for place in places:
        form = place.form
        if form.table >= len(tables.shared) or form.table < PLAIN:
            raise FormatError(f"table {form.table} of {len(tables.shared)} does not exist")
        if not 0 <= form.shift <= MAX_SHIFT or not 0 <= form.prior < 128:
            raise FormatError(f"a form with shift {form.shift} and prior {form.prior}")
        if form.table == CONTEXTS and (len(place.shape) < 2 or place.grid.size != place.count):
            raise FormatError("contexts for an array that is no weight")
    used = {p.form.table for p in places if p.form.table >= 0}
    if used != set(range(len(tables.shared))):
        raise FormatError("a frequency table that nothing uses")
    groups = {int(p.grid.places == 1) for p in places if p.form.table == CONTEXTS}
    if groups != {i for i, c in enumerate(tables.classes) if c is not None}:
        raise FormatError("context classes that nothing uses, or that are missing")
    varying = sum(p.count for p in places if p.form.table >= 0 and not tables.shared[p.form.table].constant)
    if (varying * _LEAST_BITS > stream_bits) or sum(p.count * p.form.shift for p in places) > stream_bits:
        raise FormatError("more symbols than the stream can hold")


class Arrays:
    """Reads arrays from a stream: first all that lies at its beginning, then the others one by one, in order.

    symbols: places of symbol arrays; planes: of planes of bytes. Raises FormatError: the stream does not fit.
    """

    def __init__(
        self,
        symbols: Sequence[Place],
        planes: Sequence[Place],
        tables: Tables,
        stream: NDArray[np.uint16],
        states: int,
        *,
        measure: bool = False,
    ) -> None:
        self._places, self._tables, self._measure = symbols, tables, measure
        self._decoder = Decoder(stream, states)
        self._ready: dict[int, tuple[NDArray[np.int32], float]] = {}
        self._cached: dict[int, tuple[NDArray[np.uint32], NDArray[np.int32]]] = {}
        self.planes = [(np.zeros(0, dtype=np.uint8), 0.0)] * len(planes)
        for number in range(len(tables.shared)):
            members = [i for i, p in enumerate(planes) if p.form.table == number]
            found = self._table(number, sum(planes[i].count for i in members))
            for i, plane in zip(members, np.split(found, np.cumsum([planes[i].count for i in members])[:-1])):
                if ((plane < 0) | (plane > 255)).any():
                    raise FormatError("bytes beyond 255")
                self.planes[i] = plane.astype(np.uint8), self._bits(number, plane)
        self._contexts([i for i, p in enumerate(symbols) if p.form.table == CONTEXTS])

    def read(self, number: int) -> tuple[NDArray[np.int32], float]:
        """Symbol array `number` and the bits it took (0 unless they are measured); to be called in order, once each."""
        place = self._places[number]
        if number in self._ready:
            return self._ready.pop(number)
        if place.form.table == PLAIN:
            return np.zeros(0, dtype=np.int32), 0.0
        high = self._table(place.form.table, place.count)
        bits = self._bits(place.form.table, high)
        return self._whole(high, place), bits + place.count * place.form.shift

    def finish(self) -> bytes:
        """The freight of the states. Raises FormatError unless everything was used."""
        return self._decoder.finish().astype("<u2").tobytes()

    def _table(self, number: int, count: int) -> NDArray[np.int32]:
        table = self._tables.shared[number]
        if table.constant:
            return np.broadcast_to(np.int32(table.first), count)  # no memory: a file may claim any count
        if number not in self._cached:
            self._cached[number] = table.lookup(), table.symbols().astype(np.int32) + np.int32(table.first)
        lookup, symbols = self._cached[number]
        return self._decoder.take(lookup, 0, count, symbols)

    def _bits(self, number: int, values: NDArray[np.int32]) -> float:
        table = self._tables.shared[number]
        if not self._measure or table.constant:
            return 0.0
        return table.bits(count(values, table.first, len(table.frequencies)), table.first)

    def _whole(self, high: NDArray[Any], place: Place) -> NDArray[np.int32]:
        """High and low bits together, around the center."""
        form = place.form
        if not form.shift and not form.center:
            return _joined(high.astype(np.int32, copy=False), form)
        whole = (high.astype(np.int64) << form.shift) + form.center
        if form.shift:
            whole += self._decoder.take(_uniform(form.shift), 0, place.count) >> (PRECISION - form.shift)
        if whole.size and not -(2**31) <= whole.min() <= whole.max() < 2**31:
            raise FormatError("symbols outside 32-bit integers")
        return _joined(whole.astype(np.int32), form)

    def _contexts(self, members: list[int]) -> None:
        if not members:
            return
        grids = [self._places[i].grid for i in members]
        flat = [t for c in self._tables.classes if c is not None for t in c.flat]
        lookup = np.concatenate([t.lookup() for t in flat])
        costs = PRECISION - np.log2(lookup >> np.uint32(PRECISION)) if self._measure else np.zeros(0)
        symbols = np.concatenate([t.symbols().astype(np.int32) + np.int32(t.first) for t in flat])
        group = np.array([int(g.places == 1) for g in grids])
        kinds = np.arange(contexts.SCALES * contexts.SIZES)
        number, before = np.zeros((2, len(kinds)), dtype=np.int64), 0
        for g, classes in enumerate(self._tables.classes):
            if classes is not None:
                number[g] = (before + classes.of(kinds)) * TOTAL
                before += len(classes.flat)
        bits = np.zeros(len(members))

        def visit(kind: NDArray[np.int64], part: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.int64]:
            mirrored = kind < 0
            base = number[group[part], np.where(mirrored, ~kind, kind)]
            at = base + self._decoder.take(lookup, base, len(base))
            if self._measure:
                np.add.at(bits, part, costs[at])
            return np.where(mirrored, -symbols[at], symbols[at])

        columns = contexts.columns(grids, group)
        whole = self._decoder.walk(columns, number, lookup, symbols, costs, bits)
        if whole is None:
            whole = contexts.walk(grids, visit).astype(np.int32)
        highs = np.split(whole, np.cumsum([g.size for g in grids])[:-1])
        for i, high, spent in zip(members, highs, bits.tolist()):
            place = self._places[i]
            self._ready[i] = self._whole(high, place), spent + place.count * place.form.shift


def _joined(values: NDArray[np.int32], form: Form) -> NDArray[np.int32]:
    if not form.joined or not values.size:
        return values
    if not -(2**30) <= values.min() <= values.max() < 2**30:
        raise FormatError("symbols outside 32-bit integers")
    return trellis.join(values if values.flags.writeable else values.copy())


def _uniform(shift: int) -> NDArray[np.uint32]:
    return Table(0, (TOTAL >> shift,) * (1 << shift)).lookup()
