"""Integers ⇄ bytes: frequency tables of integers and one entropy-coded stream for all of them.

    Symbols ──counts──▶ Table (integers summing to 2^precision) ──serialise──▶ tables: bytes
       └──────────────── constriction's ANS coder, last array first ─────────▶ stream: uint32 words

The probabilities handed to the coder are ratios of integers to a power of two, hence the same on every machine. An
array takes its own table or one pooled over arrays of the same range, whichever is smaller in total.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from hfcompress.errors import FormatError

MAX_ALPHABET = 1 << 16
_ANS = constriction.stream.stack.AnsCoder
_Categorical = constriction.stream.model.Categorical


@dataclass(frozen=True)
class Symbols:
    """Integers to be entropy coded. values: int32 [n]."""

    values: NDArray[np.int32]

    def entropy(self) -> float:
        """Empirical entropy of the whole array in bits: n · H."""
        if self.values.size == 0:
            return 0.0
        counts = np.unique(self.values, return_counts=True)[1]
        return float(-(counts * np.log2(counts / counts.sum())).sum())


@dataclass(frozen=True)
class Table:
    """Symbol `first + i` has probability frequencies[i] / Σ frequencies; the sum is 2^precision(k)."""

    first: int
    frequencies: tuple[int, ...]

    @staticmethod
    def fit(counts: NDArray[np.int64], first: int) -> "Table":
        """The nearest table to `counts` [k] (at least one positive): every symbol seen keeps a frequency ≥ 1."""
        total = 1 << precision(len(counts))
        scaled = counts * (total / counts.sum())
        frequencies = np.where(counts > 0, np.maximum(np.floor(scaled), 1), 0).astype(np.int64)
        surplus = int(total - frequencies.sum())
        if surplus > 0:  # what rounding down left over, to the largest remainders
            frequencies[np.argsort(frequencies - scaled, kind="stable")[:surplus]] += 1
        for i in np.argsort(-scaled, kind="stable"):  # what raising to 1 took too much, from the most frequent symbols
            if surplus >= 0:
                break
            taken = min(-surplus, int(frequencies[i]) - 1)
            frequencies[i] -= taken
            surplus += taken
        return Table(first, tuple(frequencies.tolist()))

    def bits(self, symbols: Symbols) -> float:
        """Code length of `symbols` under this table, in bits; infinite if one of them has no probability."""
        index = symbols.values.astype(np.int64) - self.first
        if index.size == 0:
            return 0.0
        if index.min() < 0 or index.max() >= len(self.frequencies):
            return float("inf")
        counts = np.bincount(index, minlength=len(self.frequencies))
        frequencies = np.asarray(self.frequencies, dtype=np.float64)
        if ((counts > 0) & (frequencies == 0)).any():
            return float("inf")
        used = counts > 0
        return float(-(counts[used] * np.log2(frequencies[used] / frequencies.sum())).sum())

    def to_bytes(self) -> bytes:
        """zigzag(first), k, then k frequencies, as LEB128 varints."""
        zigzag = self.first * 2 if self.first >= 0 else -self.first * 2 - 1
        return b"".join(_varint(v) for v in (zigzag, len(self.frequencies), *self.frequencies))

    @property
    def constant(self) -> bool:
        """One symbol only: it costs no bits and is not in the stream."""
        return len(self.frequencies) == 1

    def model(self) -> Any:
        """What constriction codes by."""
        probabilities = np.asarray(self.frequencies, dtype=np.float64) / sum(self.frequencies)
        return _Categorical(probabilities, perfect=False)


@dataclass(frozen=True)
class Coded:
    """All arrays' symbols: one stream, the tables, and which table each array took."""

    stream: NDArray[np.uint32]
    tables: tuple[Table, ...]
    choice: tuple[int, ...]


def precision(k: int) -> int:
    """Bits of precision of a table of k symbols (part of the format)."""
    return 14 if k <= 256 else 20


def encode(arrays: Sequence[Symbols]) -> Coded:
    """One stream for all `arrays`. Raises FormatError for an alphabet over 65,536 values."""
    tables, choice = _choose_tables(arrays)
    coder = _ANS()
    for symbols, pick in zip(reversed(arrays), reversed(choice)):
        table = tables[pick]
        if symbols.values.size and not table.constant:
            coder.encode_reverse(symbols.values - np.int32(table.first), table.model())
    return Coded(coder.get_compressed(), tables, choice)


class Decoder:
    """Reads the arrays back in the order in which they were given to `encode`."""

    def __init__(self, stream: NDArray[np.uint32], tables: Sequence[Table]) -> None:
        if stream.size and stream[-1] == 0:
            raise FormatError("the symbol stream ends in a zero word, which no encoder writes")
        self._coder = _ANS(stream)
        self._tables = tables
        self._models = [None if table.constant else table.model() for table in tables]

    def read(self, count: int, table: int) -> Symbols:
        """The next array, of `count` symbols under table number `table`."""
        if not 0 <= table < len(self._tables):
            raise FormatError(f"table {table} of {len(self._tables)} does not exist")
        first, model = self._tables[table].first, self._models[table]
        if model is None or count == 0:
            return Symbols(np.broadcast_to(np.int32(first), count))  # no memory: a file may claim any count
        return Symbols(self._coder.decode(model, count) + np.int32(first))

    def finish(self) -> None:
        """Raises FormatError unless every bit was used."""
        if not self._coder.is_empty():
            raise FormatError("the symbol stream holds more than its arrays: it is damaged or of another file")


def tables_to_bytes(tables: Sequence[Table]) -> bytes:
    return b"".join(table.to_bytes() for table in tables)


def tables_from_bytes(data: bytes) -> tuple[Table, ...]:
    """The inverse of `tables_to_bytes`. Raises FormatError: truncated, a wrong sum, padded, too large an alphabet."""
    tables, position = [], 0
    while position < len(data):
        zigzag, position = _read_varint(data, position)
        k, position = _read_varint(data, position)
        if not 1 <= k <= MAX_ALPHABET:
            raise FormatError(f"a frequency table declares {k} symbols; 1 to {MAX_ALPHABET} are allowed")
        frequencies = []
        for _ in range(k):
            value, position = _read_varint(data, position)
            frequencies.append(value)
        if sum(frequencies) != 1 << precision(k):
            raise FormatError(f"a frequency table sums to {sum(frequencies)} instead of {1 << precision(k)}")
        if frequencies[0] == 0 or frequencies[-1] == 0:
            raise FormatError("a frequency table begins or ends with a symbol that never occurs")
        first = zigzag // 2 if zigzag % 2 == 0 else -(zigzag + 1) // 2
        if not -(2**31) <= first <= 2**31 - k:
            raise FormatError(f"a frequency table starts at {first}, outside 32-bit integers")
        tables.append(Table(first, tuple(frequencies)))
    return tuple(tables)


def _choose_tables(arrays: Sequence[Symbols]) -> tuple[tuple[Table, ...], tuple[int, ...]]:
    ranges = [(int(s.values.min()), int(s.values.max())) if s.values.size else (0, 0) for s in arrays]
    pools: dict[tuple[int, int], NDArray[np.int64]] = {}
    for symbols, (low, high) in zip(arrays, ranges):
        pools[low, high] = pools.get((low, high), 0) + _counts(symbols, low, high)
    tables: dict[Table, int] = {}
    choice = []
    for symbols, (low, high) in zip(arrays, ranges):
        pooled = Table.fit(pools[low, high], low)
        own = Table.fit(_counts(symbols, low, high), low)
        own_cost = own.bits(symbols) + 8 * len(own.to_bytes())
        best = own if own_cost < pooled.bits(symbols) else pooled
        choice.append(tables.setdefault(best, len(tables)))
    return tuple(tables), tuple(choice)


def _counts(symbols: Symbols, low: int, high: int) -> NDArray[np.int64]:
    if high - low >= MAX_ALPHABET:
        raise FormatError(f"symbols from {low} to {high}: more than {MAX_ALPHABET} different values cannot be coded")
    if symbols.values.size == 0:
        return np.ones(1, dtype=np.int64)
    return np.bincount(symbols.values.astype(np.int64) - low, minlength=high - low + 1)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        if position >= len(data) or shift > 35:
            raise FormatError("a frequency table is truncated or malformed")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
