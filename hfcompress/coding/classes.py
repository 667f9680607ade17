"""The frequency tables of contexts: neighbouring scales are merged until what is left pays for itself."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hfcompress.coding.bits import BitReader, BitWriter
from hfcompress.coding.contexts import SCALES, SIZES
from hfcompress.coding.tables import TOTAL, Table, estimate, fit, read
from hfcompress.errors import FormatError

_NOTHING = Table(0, (TOTAL,))


@dataclass(frozen=True)
class Classes:
    """number[scale] tells which row of `tables` a scale takes: SIZES tables, those that no symbol took missing."""

    number: tuple[int, ...]
    tables: tuple[tuple[Table | None, ...], ...]

    @property
    def flat(self) -> list[Table]:
        """All of them, row after row; in place of a missing one, one that no encoder uses."""
        return [table or _NOTHING for row in self.tables for table in row]

    def of(self, kinds: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places in `flat` of classes as `contexts.walk` gives them, mirrored or not."""
        kinds = np.where(kinds < 0, ~kinds, kinds)
        return np.asarray(self.number)[kinds // SIZES] * SIZES + kinds % SIZES


def fit_classes(counts: NDArray[np.int64], first: int) -> tuple[Classes, BitWriter]:
    """counts: [SCALES · SIZES, k], of values from `first` on."""
    rows = list(counts.reshape(SCALES, SIZES, -1))
    ends = list(range(1, SCALES + 1))
    costs = [_cost(row) for row in rows]
    joined = [_cost(a + b) for a, b in pairwise(rows)]
    while len(rows) > 1:
        gains = [costs[i] + costs[i + 1] - joined[i] for i in range(len(joined))]
        i = int(np.argmax(gains))
        if gains[i] < 0:
            break
        rows[i : i + 2], costs[i : i + 2], ends[i : i + 2] = [rows[i] + rows[i + 1]], [joined[i]], [ends[i + 1]]
        joined[max(i - 1, 0) : i + 2] = [_cost(rows[j] + rows[j + 1]) for j in (i - 1, i) if 0 <= j < len(rows) - 1]
    out, tables, before = BitWriter(), [], 0
    out.golomb(len(rows) - 1, 3)
    for end in ends[:-1]:
        out.golomb(end - before - 1)
        before = end
    for row in rows:
        of_row: list[Table | None] = []
        for cell in row:
            out.fixed(int(cell.any()), 1)
            if cell.any():
                table, written = fit(cell, first)
                out.append(written)
                of_row.append(table)
            else:
                of_row.append(None)
        tables.append(tuple(of_row))
    return Classes(_numbers(ends), tuple(tables)), out


def read_classes(source: BitReader) -> Classes:
    """What `fit_classes` wrote. Raises FormatError: malformed."""
    rows = source.golomb(3) + 1
    ends: list[int] = []
    for _ in range(min(rows, SCALES) - 1):
        ends.append((ends[-1] if ends else 0) + source.golomb() + 1)
    if rows > SCALES or (ends and ends[-1] >= SCALES):
        raise FormatError(f"context classes reach beyond {SCALES} scales")
    tables = tuple(tuple(read(source) if source.fixed(1) else None for _ in range(SIZES)) for _ in range(rows))
    return Classes(_numbers([*ends, SCALES]), tables)


def _numbers(ends: list[int]) -> tuple[int, ...]:
    return tuple(int(n) for n in np.repeat(np.arange(len(ends)), np.diff([0, *ends])))


def _cost(row: NDArray[np.int64]) -> float:
    return sum(estimate(cell) if cell.any() else 1.0 for cell in row)
