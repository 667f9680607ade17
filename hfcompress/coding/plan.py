"""The shortest form for each array, and the order in which everything lies in the stream.

Order: for each table all planes of bytes that took it; the symbols of contexts as `contexts.walk` meets them, then the
low bits of each such array; then array after array the symbols of a table, and their low bits. So a reader can go
through large arrays one by one. Constant arrays are not in the stream, nor are lowest bits that a trellis tells.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfcompress.coding import contexts, trellis
from hfcompress.coding.bits import BitWriter
from hfcompress.coding.classes import Classes, fit_classes
from hfcompress.coding.contexts import Grid, prior_of
from hfcompress.coding.pool import Histogram, pool
from hfcompress.coding.rans import Segment, classes_by_numba, encode, states_for
from hfcompress.coding.symbols import CONTEXTS, MAX_SHIFT, PLAIN, Form, Symbols, count
from hfcompress.coding.tables import MAX_ALPHABET, PRECISION, Fitted, Table, estimate, fit
from hfcompress.errors import FormatError

CONTEXT_LIMIT = 1 << 23
"""Symbols of a file that may be coded by contexts, small arrays first: they are decoded more slowly."""
_WORTH = 0.99  # contexts are decoded several times more slowly
_LEAST = 256
_SHORT = 32  # alphabets of which nothing is split off
_NONE = np.zeros(0, dtype=np.uint16)


@dataclass(frozen=True)
class Plan:
    """What `plan` chose. forms: one per symbol array; planes: one per plane; `states`: of the stream."""

    forms: tuple[Form, ...]
    planes: tuple[Form, ...]
    tables: bytes
    states: int
    segments: tuple[Segment, ...]

    def stream(self, freight: bytes) -> NDArray[np.uint16]:
        """The stream; its states carry `freight`, 2 bytes each. [words]"""
        carried = np.frombuffer(freight.ljust(2 * self.states, b"\0"), dtype="<u2")
        return encode(self.segments, self.states, carried)


def plan(arrays: Sequence[Symbols], planes: Sequence[NDArray[np.uint8]]) -> Plan:
    """Choose. planes: bytes of other arrays, which may also stay as they are.

    Raises FormatError: values 2^24 or more apart.
    """
    told = [trellis.split(a.values) for a in arrays]
    arrays = [a if high is None else replace(a, values=high) for a, high in zip(arrays, told)]
    forms, histograms = map(list, zip(*map(_static, arrays))) if arrays else ([], [])
    highs = [_high(a, f) for a, f in zip(arrays, forms)]
    whole = [*histograms, *map(Histogram.of, planes)]
    plain = [float("inf")] * len(arrays) + [8.0 * p.size for p in planes]

    coded = _Contexts.choose(
        arrays, [estimate(h.counts) + f.shift * a.values.size for h, f, a in zip(histograms, forms, arrays)]
    )
    shared, choice = pool(
        [Histogram.of(highs[0][:0]) if i in coded.grids else h for i, h in enumerate(whole)], plain, MAX_ALPHABET
    )
    for i, form in enumerate(forms):
        forms[i] = coded.forms.get(i) or Form(choice[i] if choice[i] >= 0 else PLAIN, form.shift, form.center)
    written = _write(shared, coded)
    segments = [
        _segment(table, [p for p, c in zip(planes, choice[len(arrays) :]) if c == number])
        for number, (table, _) in enumerate(shared)
    ]
    segments += coded.segments
    segments += [_low(arrays[i], forms[i]) for i in coded.grids if forms[i].shift]
    for array, form, high in zip(arrays, forms, highs):
        if form.table >= 0:
            segments += [_segment(shared[form.table][0], [high]), *([_low(array, form)] if form.shift else [])]
    segments = [s for s in segments if len(s.numbers) and len(s.frequencies) > 1]
    bits = sum(_bits(s) for s in segments)
    freight = sum(p.size for p, c in zip(planes, choice[len(arrays) :]) if c < 0)
    planes_forms = tuple(Form(c if c >= 0 else PLAIN) for c in choice[len(arrays) :])
    forms = [replace(form, joined=high is not None) for form, high in zip(forms, told)]
    return Plan(tuple(forms), planes_forms, written, states_for(bits, freight), tuple(segments))


def _static(array: Symbols) -> tuple[Form, Histogram]:
    """The shift for a table of its own, and what that table has to code."""
    if array.values.size == 0:
        return Form(PLAIN), Histogram.of(array.values)
    low, high = int(array.values.min()), int(array.values.max())
    if high - low >= 1 << 24:
        raise FormatError(f"symbols from {low} to {high}: more than 2^24 different values cannot be coded")
    least = next(s for s in range(MAX_SHIFT + 2) if (high >> s) - (low >> s) < MAX_ALPHABET)
    costs, histograms = {}, {}
    for shift in range(least, MAX_SHIFT + 1):
        whole = histograms[shift] = Histogram.of(array.values >> shift if shift else array.values)
        if len(whole.counts) < _SHORT and shift == least:
            return Form(0, shift), whole
        table, written = fit(whole.counts, whole.first)
        costs[shift] = table.bits(whole.counts, whole.first) + len(written) + shift * array.values.size
        if len(whole.counts) < _SHORT or costs[shift] > costs[max(shift - 1, least)]:
            break
    best = min(costs, key=lambda s: costs[s])
    return Form(0, best), histograms[best]


def _high(array: Symbols, form: Form) -> NDArray[np.integer]:
    if not form.shift and not form.center:
        return array.values
    return (array.values.astype(np.int64) - form.center) >> form.shift


def _low(array: Symbols, form: Form) -> Segment:
    k = 1 << form.shift
    low = ((array.values.astype(np.int64) - form.center) & (k - 1)).astype(np.uint16)
    width = 1 << (PRECISION - form.shift)
    return Segment(np.full(k, width, dtype=np.uint32), np.arange(k, dtype=np.uint32) * np.uint32(width), low)


def _segment(table: Table, units: Sequence[NDArray[np.integer]]) -> Segment:
    # units of one table may come in several types, some of which cannot hold a negative `first`
    numbers = [
        np.subtract(u, table.first, dtype=np.int32).astype(np.uint16) if table.first else u.astype(np.uint16)
        for u in units
    ]
    return Segment(np.asarray(table.frequencies, dtype=np.uint32), table.starts, np.concatenate([*numbers, _NONE]))


def _bits(segment: Segment) -> float:
    counts = count(segment.numbers, 0, len(segment.frequencies))
    used = counts > 0
    return float((counts[used] * (PRECISION - np.log2(segment.frequencies[used]))).sum())


@dataclass
class _Contexts:
    """The arrays that contexts make shorter, and their tables: [kernel, plain]."""

    grids: dict[int, Grid]
    forms: dict[int, Form]
    classes: list[tuple[Classes, BitWriter] | None]
    segments: list[Segment]

    @staticmethod
    def choose(arrays: Sequence[Symbols], static: Sequence[float]) -> "_Contexts":
        """`static`: bits of each array without contexts."""
        candidates = _candidates(arrays)
        nothing = _Contexts({}, {}, [None, None], [])
        while candidates:
            walked = _Walked(arrays, candidates)
            bits = walked.fit()
            kept = {i: f for (i, f), b in zip(candidates.items(), bits) if b < _WORTH * static[i] - 32}
            tables = sum(8 * len(c[1].to_bytes()) for c in walked.classes if c is not None)
            if len(kept) == len(candidates):
                if sum(bits) + tables >= _WORTH * sum(static[i] for i in kept):
                    return nothing
                grids = dict(zip(candidates, walked.grids))
                return _Contexts(grids, candidates, walked.classes, [walked.segment()])
            candidates = kept
        return nothing


class _Walked:
    """All candidates' symbols with their classes, in the order of the stream."""

    def __init__(self, arrays: Sequence[Symbols], candidates: dict[int, Form]) -> None:
        highs = [_high(arrays[i], form).astype(np.int64) for i, form in candidates.items()]
        self.grids = [Grid.of(arrays[i].shape or (), form.prior) for i, form in candidates.items()]
        self.group = np.array([int(g.places == 1) for g in self.grids])
        flat = np.concatenate(highs)
        found = classes_by_numba(contexts.columns(self.grids, self.group), flat.astype(np.int32))
        kinds, part, symbols = found or _classes(self.grids, flat)
        self.part: NDArray[Any] = part
        self.symbols = np.where(kinds < 0, -symbols, symbols)
        self.kinds = np.where(kinds < 0, ~kinds, kinds)
        self.classes: list[tuple[Classes, BitWriter] | None] = [None, None]

    def fit(self) -> NDArray[np.float64]:
        """Tables for both groups; the bits of each candidate."""
        reach = int(np.abs(self.symbols).max())
        k = 2 * reach + 1
        costs = np.full((2, contexts.SCALES * contexts.SIZES, k), np.inf)
        groups = self.group[self.part]
        for group in set(self.group.tolist()):
            mine = groups == group
            cells = self.kinds[mine] * k + self.symbols[mine] + reach
            counts = np.bincount(cells, minlength=costs[0].size).reshape(-1, k)
            fitted = self.classes[group] = fit_classes(counts, -reach)
            classes = fitted[0]
            for kind, place in enumerate(classes.of(np.arange(contexts.SCALES * contexts.SIZES))):
                table = classes.flat[place]
                begin = table.first + reach
                costs[group, kind, begin : begin + len(table.frequencies)] = table.costs
        bits = costs[groups, self.kinds, self.symbols + reach]
        return np.bincount(self.part, bits, minlength=len(self.grids)).astype(np.float64)

    def segment(self) -> Segment:
        tables = [t for c in self.classes for t in (c[0].flat if c is not None else [])]
        sizes = np.cumsum([0, *(len(t.frequencies) for t in tables)])
        firsts = np.array([t.first for t in tables])
        number = np.zeros(len(self.kinds), dtype=np.int64)
        groups, before = self.group[self.part], 0
        for group, pair in enumerate(self.classes):
            if pair is not None:
                mine = groups == group
                number[mine] = before + pair[0].of(self.kinds[mine])
                before += len(pair[0].flat)
        numbers = (self.symbols - firsts[number] + sizes[number]).astype(np.uint32)
        frequencies = np.concatenate([np.asarray(t.frequencies, dtype=np.uint32) for t in tables])
        return Segment(frequencies, np.concatenate([t.starts for t in tables]), numbers)


def _classes(grids: Sequence[Grid], flat: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """As `classes_by_numba`."""
    found: list[tuple[NDArray[np.int64], ...]] = []

    def visit(kind: NDArray[np.int64], part: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.int64]:
        symbols = flat[position]
        found.append((kind, part, symbols))
        return symbols

    contexts.walk(grids, visit)
    kinds, parts, symbols = (np.concatenate(column) for column in zip(*found))
    return kinds, parts, symbols


def _candidates(arrays: Sequence[Symbols]) -> dict[int, Form]:
    found, room = {}, CONTEXT_LIMIT
    for i in sorted(range(len(arrays)), key=lambda i: arrays[i].values.size):
        values, shape = arrays[i].values, arrays[i].shape
        if shape is None or len(shape) < 2 or values.size < _LEAST or values.min() == values.max():
            continue
        room -= values.size
        if room < 0:
            break
        center = (2 * int(values.sum(dtype=np.int64)) + values.size) // (2 * values.size)
        magnitudes = np.abs(values.astype(np.int64) - center)
        shift = max((int(magnitudes.mean()) // 4).bit_length() - 1, 0)
        while int(magnitudes.max()) >> shift >= MAX_ALPHABET // 2 - 1:
            shift += 1
        form = Form(CONTEXTS, shift, center - (1 << shift >> 1))
        if shift <= MAX_SHIFT:
            found[i] = Form(CONTEXTS, shift, form.center, prior_of(np.abs(_high(arrays[i], form).astype(np.int64))))
    return dict(sorted(found.items()))


def _write(shared: Sequence[Fitted], coded: _Contexts) -> bytes:
    """How many tables, the tables; for each group of contexts whether it is there, and its classes."""
    out = BitWriter()
    out.golomb(len(shared))
    for _, written in shared:
        out.append(written)
    for group in coded.classes:
        out.fixed(int(group is not None), 1)
        if group is not None:
            out.append(group[1])
    return out.to_bytes()
