"""Frequency tables: integers that sum to 2^14, fitted to counts and written in about half a logarithm of each count."""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hfcompress.coding.bits import BitReader, BitWriter
from hfcompress.errors import FormatError

PRECISION = 14
TOTAL = 1 << PRECISION
MAX_ALPHABET = 1 << 12
_FINENESS = 3  # bits that say how finely a table's counts are written


@dataclass(frozen=True)
class Table:
    """Symbol `first + i` has probability frequencies[i] / 2^14."""

    first: int
    frequencies: tuple[int, ...]

    @property
    def constant(self) -> bool:
        """One symbol only: it costs no bits and is not in the stream."""
        return len(self.frequencies) == 1

    @cached_property
    def costs(self) -> NDArray[np.float64]:
        """Bits of each symbol, infinite where its frequency is 0."""
        with np.errstate(divide="ignore"):
            return PRECISION - np.log2(np.asarray(self.frequencies, dtype=np.float64))

    @cached_property
    def starts(self) -> NDArray[np.uint32]:
        """Where the slots of each symbol begin among the 2^14."""
        return np.concatenate([[0], np.cumsum(self.frequencies)[:-1]]).astype(np.uint32)

    def symbols(self) -> NDArray[np.uint16]:
        """The symbol's index for each of the 2^14 slots."""
        return np.repeat(np.arange(len(self.frequencies), dtype=np.uint16), self.frequencies)

    def lookup(self) -> NDArray[np.uint32]:
        """For each slot: the frequency of its symbol · 2^14 + the slot's place among those of its symbol."""
        index = self.symbols()
        places = np.arange(TOTAL, dtype=np.uint32) - self.starts[index]
        return (np.asarray(self.frequencies, dtype=np.uint32)[index] << np.uint32(PRECISION)) | places

    def bits(self, counts: NDArray[np.int64], first: int) -> float:
        """Code length in bits of symbols counted from `first` on; infinite if one has no probability."""
        low, high = first - self.first, first - self.first + len(counts)
        if low < 0 or high > len(self.frequencies):
            return float("inf")
        used = counts > 0
        return float((counts[used] * self.costs[low:high][used]).sum())


Fitted: TypeAlias = tuple[Table, BitWriter]
"""A table and how it is written."""


def fit(counts: NDArray[np.int64], first: int) -> Fitted:
    """The table for `counts` [k] and how it is written, at the fineness that makes both together shortest."""
    used = np.flatnonzero(counts)
    trimmed = counts[used[0] : used[-1] + 1]
    start, best = first + int(used[0]), None
    spare = int(trimmed.sum()) // TOTAL  # `normalise` gives each symbol 1 before it shares out the rest
    shares = [max(c - spare, 1) if c else 0 for c in trimmed.tolist()]
    for fineness in range(1 << _FINENESS):
        values = [_coarse(share, fineness) for share in shares]
        table = Table(start, normalise(values))
        written = write(start, values, fineness)
        cost = table.bits(trimmed, start) + len(written)
        if best is None or cost < best[0]:
            best = cost, table, written
        if len(trimmed) == 1:
            break
    assert best is not None
    return best[1], best[2]


def estimate(counts: NDArray[np.int64]) -> float:
    """About what `counts` (the first and last not 0) cost with a table of their own, in bits."""
    if len(counts) < 2:
        return 16.0
    lengths = np.frexp(counts.astype(np.float64))[1]  # bit lengths
    steps = np.abs(np.diff(lengths, prepend=0))
    written = len(counts) + 2 * float(np.frexp(steps)[1].sum()) + 0.5 * float(lengths.sum())
    c = counts[counts > 0].astype(np.float64)
    return float(c.sum() * np.log2(c.sum()) - (c * np.log2(c)).sum()) + written + 20


def write(first: int, values: list[int], fineness: int) -> BitWriter:
    """first, k − 1, the fineness, then each value as its bit length (against the one before) and its leading bits."""
    out = BitWriter()
    out.signed(first, 2)
    out.golomb(len(values) - 1, 3)
    if len(values) == 1:
        return out
    out.fixed(fineness, _FINENESS)
    before = 0
    for value in values:
        length = value.bit_length()
        out.signed(length - before)
        kept = _kept(length, fineness)
        out.fixed((value >> (length - 1 - kept) if length else 0) & ((1 << kept) - 1), kept)
        before = length
    return out


def read(source: BitReader) -> Table:
    """The inverse of `write`. Raises FormatError: malformed, too many symbols, a first or last that never occurs."""
    first, k = source.signed(2), source.golomb(3) + 1
    if k > MAX_ALPHABET:
        raise FormatError(f"a frequency table declares {k} symbols; at most {MAX_ALPHABET} are allowed")
    if not -(2**31) <= first <= 2**31 - k:
        raise FormatError(f"a frequency table starts at {first}, outside 32-bit integers")
    if k == 1:
        return Table(first, (TOTAL,))
    fineness, values, length = source.fixed(_FINENESS), [], 0
    for _ in range(k):
        length += source.signed()
        if not 0 <= length <= 48:
            raise FormatError(f"a frequency table declares a count of {length} bits")
        kept = _kept(length, fineness)
        leading = (1 << kept | source.fixed(kept)) if length else 0
        values.append(_middle(leading, length, kept))
    if values[0] == 0 or values[-1] == 0:
        raise FormatError("a frequency table begins or ends with a symbol that never occurs")
    return Table(first, normalise(values))


def normalise(values: list[int]) -> tuple[int, ...]:
    """Frequencies that sum to 2^14: 1 for each value that is not 0, the rest in proportion; what is left over by
    rounding down goes to the first of the greatest."""
    used = sum(v > 0 for v in values)
    total = sum(values)
    frequencies = [1 + v * (TOTAL - used) // total if v else 0 for v in values]
    frequencies[frequencies.index(max(frequencies))] += TOTAL - sum(frequencies)
    return tuple(frequencies)


def _kept(length: int, fineness: int) -> int:
    """Bits written after the leading one of a count of `length` bits: its statistical error is half its bits."""
    return max(length - fineness, 0) // 2


def _coarse(count: int, fineness: int) -> int:
    length = count.bit_length()
    kept = _kept(length, fineness)
    return _middle(count >> (length - 1 - kept), length, kept) if length else 0


def _middle(leading: int, length: int, kept: int) -> int:
    """The middle of the numbers of `length` bits that begin with the kept + 1 bits of `leading`."""
    dropped = length - 1 - kept
    return (leading << dropped) + (1 << dropped >> 1) if length else 0
