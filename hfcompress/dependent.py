"""Weights to codes of a dependent grid (`coding.trellis`): the path of least error and bits, by Viterbi's algorithm.

Of four consecutive points of the grid, a state of the trellis opens every other one, and which of the two is taken
leads to the next state. So in each state and at each place two points compete, the nearest open ones; with

    cost = (v − x)² + rate_weight · bits(v // 2)

summed along the path, bits from how often each v // 2 occurs, all eight states are followed to the end of a lane and
the best path back from there. Lanes are independent, and are followed together.
"""

import numpy as np
from numpy.typing import NDArray

from hfcompress.coding.trellis import LANE

RATE_WEIGHT = 0.6
"""In squared steps a bit: about minus the slope of error against bits where such a grid is worth its while."""
_AT_ONCE = 1024  # lanes
_SAMPLE = 64  # lanes from which the bits are told
_ROUNDS = 2


def _trellis() -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """[2, 8]: for each state (q(t), q(t − 1), q(t − 2)) the two it may be reached from, and v mod 4 on the way."""
    before, residue = np.zeros((2, 2, 8), dtype=np.intp)
    for state in range(8):
        q, a, b = state >> 2, state >> 1 & 1, state & 1
        for c in range(2):
            before[c, state] = a << 2 | b << 1 | c
            residue[c, state] = a + 2 * (q ^ b ^ c)
    return before, residue


_BEFORE, _RESIDUE = _trellis()


def dependent_codes(x: NDArray[np.float32], limit: int, rate_weight: float = RATE_WEIGHT) -> NDArray[np.int32]:
    """Codes for weights x, finite, in steps of the grid. [n] → int32 [n], within ±limit; their decode is v · step."""
    lanes = -(-len(x) // LANE)
    padded = np.zeros(lanes * LANE, dtype=np.float32)
    np.clip(x, 3 - limit, limit - 3, out=padded[: len(x)])  # the nearest code of each residue is within the limit
    rows = padded.reshape(lanes, LANE)
    some = rows[np.linspace(0, lanes - 1, min(lanes, _SAMPLE)).astype(np.intp)] if lanes else rows
    unused = rows.size - len(x)
    highs = np.clip(np.rint(some / 2), -limit // 2, limit // 2).astype(np.int32)
    for _ in range(_ROUNDS if lanes else 0):
        bits = _Bits(highs, limit, rate_weight)
        highs = _paths(some, bits, unused) >> 1
    pieces = [_paths(rows[i : i + _AT_ONCE], bits, unused * (i + _AT_ONCE >= lanes)) for i in range(0, lanes, _AT_ONCE)]
    return np.concatenate([np.zeros((0, LANE), dtype=np.int32), *pieces]).reshape(-1)[: len(x)]


class _Bits:
    """What a value of v // 2 costs, in squared steps, from how often it and its neighbours occur."""

    def __init__(self, highs: NDArray[np.int32], limit: int, rate_weight: float) -> None:
        self.least = -(limit // 2) - 1
        counts = np.bincount((highs - self.least).reshape(-1), minlength=2 * (limit // 2 + 1) + 1)
        smooth = np.convolve(counts, [0.25, 0.5, 0.25], mode="same") + 0.01
        self.table = (rate_weight * (np.log2(smooth.sum()) - np.log2(smooth))).astype(np.float32)

    def of(self, codes: NDArray[np.int32]) -> NDArray[np.float32]:
        return self.table[(codes >> 1) - self.least]


def _paths(x: NDArray[np.float32], bits: _Bits, unused: int) -> NDArray[np.int32]:
    """[lanes, LANE] → codes; `unused`: places at the end of the last lane for which nothing is to be paid.

    The states go along the first axis of what is in hand, lanes along the last.
    """
    costs, codes = _open(np.ascontiguousarray(x.T), bits)
    costs[LANE - unused :, :, -1] = 0
    total = np.full((8, len(x)), np.inf, dtype=np.float32)
    total[0] = 0
    second = np.empty((LANE, 8, len(x)), dtype=bool)
    for cost, chosen in zip(costs, second):
        first, other = (total[_BEFORE[c]] + cost[_RESIDUE[c]] for c in range(2))
        np.less(other, first, out=chosen)
        total = np.minimum(first, other)
    state, lane = total.argmin(0), np.arange(len(x))
    found = np.empty((LANE, len(x)), dtype=np.int32)
    for t in range(LANE - 1, -1, -1):
        way = second[t][state, lane].astype(np.intp)
        found[t] = codes[t][_RESIDUE[way, state], lane]
        state = _BEFORE[way, state]
    return found.T


def _open(x: NDArray[np.float32], bits: _Bits) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The nearest code of each residue mod 4, and what it costs. x: [t, lanes] → [t, 4, lanes] each."""
    costs, codes = (
        np.empty((len(x), 4, x.shape[1]), dtype=np.float32),
        np.empty((len(x), 4, x.shape[1]), dtype=np.int32),
    )
    for residue, (cost, code) in enumerate(zip(costs.swapaxes(0, 1), codes.swapaxes(0, 1))):
        nearest = np.rint((x - residue) * np.float32(0.25)) * np.float32(4) + np.float32(residue)
        code[:] = nearest
        nearest -= x
        np.multiply(nearest, nearest, out=cost)
        cost += bits.of(code)
    return costs, codes
