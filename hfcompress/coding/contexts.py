"""Contexts: the class of a symbol, from the magnitudes and signs of those decoded before it around it.

A weight's symbols lie in rows (output channels) of I input channels × a kernel of k places, kw in a line. Trained
filters differ in scale from row to row and from channel to channel, and neighbours in a kernel resemble each other. So

    scale  ≈ row^w · channel^w · neighbours^w · mean^(1−…)   running means of |symbol|, in eighths of octaves
    mean   ≈ 5 left + 4 above − the one between, against the scale: its sign mirrors the symbol, its size is 0 … 3

and the class is (scale in quarter octaves, size of the mean). All in integers, so every machine finds the same classes.

To have many symbols to work on at once, the rows are dealt to lanes, `ROWS` consecutive rows each, and all lanes of all
parts go ahead in step: step t is the t-th symbol of each lane that is so long, in the order of parts and lanes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

ROWS = 8
SCALES, SIZES = 64, 4
LIMIT = (1 << 16) - 1
LOG = np.array([((v + 1) ** 8).bit_length() - 1 for v in range(LIMIT + 1)], dtype=np.int64)
"""⌊8 log2(v + 1)⌋"""
_LEAN = np.concatenate([[-128], LOG[1:]])
SIZE_STEPS = (-25, -13, -5)
_SIZE = np.array([sum(s - 512 * (s > 128) >= step for step in SIZE_STEPS) for s in range(512)], dtype=np.int64)
"""How many of the steps are ≤ a number from −255 (at the end, as an index below 0 is) to 128."""
_KERNEL = (12, 12, 6)
"""Sixteenths: exponents of row, channel and neighbours where there is a kernel."""
_PLAIN = (8, 12, 0)


@dataclass(frozen=True)
class Grid:
    """How a weight of `shape` [rows, channels, *kernel] is walked; `prior`: a code for its mean magnitude."""

    rows: int
    channels: int
    places: int
    line: int
    prior: int

    @staticmethod
    def of(shape: Sequence[int], prior: int) -> "Grid":
        """A linear weight's kernel is one place."""
        return Grid(shape[0], shape[1], prod(shape[2:]), shape[-1] if len(shape) > 2 else 1, prior)

    @property
    def columns(self) -> int:
        return self.channels * self.places

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def mean(self) -> int:
        """The mean magnitude before anything is known, in 1/256."""
        return (8 + self.prior % 8 << self.prior // 8) >> 3

    @property
    def weights(self) -> tuple[int, int, int]:
        return _KERNEL if self.places > 1 else _PLAIN


def columns(grids: Sequence[Grid], group: NDArray[np.int64]) -> NDArray[np.int64]:
    """What `fast.walk` has to know of each: rows, channels, places, line, mean, weights, the group. [grids, 9]"""
    rows = [(g.rows, g.channels, g.places, g.line, g.mean, *g.weights, n) for g, n in zip(grids, group.tolist())]
    return np.array(rows, dtype=np.int64).reshape(-1, 9)


def prior_of(magnitudes: NDArray[np.int64]) -> int:
    """The code whose `Grid.mean` is next below the mean of `magnitudes`."""
    mean = max(256 * int(magnitudes.sum()) // max(magnitudes.size, 1), 1)
    octave = mean.bit_length() - 1
    return min(8 * octave + ((mean << 3) >> octave) - 8, 127)


def walk(
    grids: Sequence[Grid], visit: Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Go through all symbols of all `grids` in step and return them, one grid after the other.

    visit(class, part, position) gets, for each lane in step, the class (scale · SIZES + size; ~class, its complement,
    where the symbol is mirrored), the grid's number and the place among all symbols; it returns the symbols.
    """
    column = {name: np.array([getattr(g, name) for g in grids], dtype=np.int64) for name in ("places", "line", "mean")}
    columns = np.array([g.columns for g in grids], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum([g.size for g in grids])])
    w_row, w_channel, w_near = np.array([g.weights for g in grids], dtype=np.int64).T.reshape(3, -1)
    w_mean = LOG[column["mean"]] * (16 - w_row - w_channel - w_near)
    lanes = np.array([-(-g.rows // ROWS) for g in grids], dtype=np.int64)
    part_of = np.repeat(np.arange(len(grids)), lanes)
    number = np.concatenate([np.arange(n) for n in lanes])
    starts = offsets[:-1][part_of] + number * ROWS * columns[part_of]
    lengths = np.minimum(ROWS * columns[part_of], offsets[1:][part_of] - starts)

    pad = int(column["line"].max()) + 1
    symbols = np.zeros(pad + int(offsets[-1]), dtype=np.int64)
    row_sums = np.zeros(len(part_of), dtype=np.int64)
    channel_base = np.concatenate([[0], np.cumsum([g.channels for g in grids])[:-1]])
    channel_sums = np.zeros(sum(g.channels for g in grids), dtype=np.int64)

    begin = 0
    for end in np.unique(lengths).tolist():
        at = np.flatnonzero(lengths >= end)  # the lanes of this stretch
        parts, first, part = np.unique(part_of[at], return_index=True, return_inverse=True)
        position = starts[at] + begin
        sums = row_sums[at]
        places, line, mean, wide = (v[parts] for v in (column["places"], column["line"], column["mean"], columns))
        weight_row, weight_near = w_row[parts][part], w_near[parts][part]
        prior_row, prior_near, line_back = 4 * mean[part], mean[part], line[part]
        which, kernels = parts[part], bool((places > 1).any())
        for t in range(begin, end):
            c = t % wide
            channel, place = c // places, c % places
            seen = lanes[parts] * (t // wide * places + place)
            address = channel_base[parts] + channel
            of_channel = ((channel_sums[address] << 8) + 4 * mean) // (seen + 4)
            base = w_channel[parts] * LOG[np.minimum(of_channel, LIMIT)] + w_mean[parts]
            of_row = ((sums << 8) + prior_row) // (c + 4)[part]
            scale = weight_row * LOG[np.minimum(of_row, LIMIT)] + base[part]
            if kernels:
                has_left, has_above = (place % line > 0), place >= line
                left_here, above_here = has_left[part], has_above[part]
                left = symbols[position + (pad - 1)] * left_here
                above = symbols[position + pad - line_back] * above_here
                between = symbols[position + (pad - 1) - line_back] * (left_here & above_here)
                near = ((np.abs(left) + np.abs(above)) << 8) + prior_near * ((3 - has_left) - has_above)[part]
                scale += weight_near * LOG[np.minimum(near // 3, LIMIT)]
            scale = np.minimum(np.maximum(scale >> 4, 0), 2 * SCALES - 1)
            kind = (scale >> 1) * SIZES
            if kernels:
                lean = 5 * left + 4 * above - between
                kind += _SIZE[_LEAN[np.minimum(20 * np.abs(lean), LIMIT)] - scale]
                kind ^= lean >> 63  # the complement where it is negative
            found = visit(kind, which, position)
            symbols[position + pad] = found
            magnitude = np.abs(found)
            sums += magnitude
            channel_sums[address] += np.add.reduceat(magnitude, first)
            sums *= (c + 1 < wide)[part]
            position += 1
        row_sums[at] = sums
        begin = end
    return symbols[pad:]
