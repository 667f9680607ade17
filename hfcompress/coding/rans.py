"""Interleaved range coding with asymmetric numeral systems (Duda 2013; Giesen 2014): S states of 32 bits, 16-bit words.

Symbol number i belongs to state i mod S. Decoding it, with x the state and P = 14:

    slot = x mod 2^P → its symbol, that symbol's frequency f, the slot's place r among the symbol's slots
    x = f · (x >> P) + r;      if x < 2^16: x = x · 2^16 + the next word

The stream is the S states (two words each, the high one first), then the words. After the last symbol every state is
2^16 + 16 bits of freight: the encoder began there, so the states carry 2 bytes each of something else.
"""

import importlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfcompress.coding.tables import PRECISION, TOTAL
from hfcompress.errors import FormatError

MAX_STATES = 1 << 14
FEW = 24  # below this many states numpy's overhead for each step outweighs a plain loop
_MASK, _SHIFT, _LEAST, _WORD = (np.uint32(n) for n in (TOTAL - 1, PRECISION, 1 << 16, 16))

fast: ModuleType | None
try:
    fast = importlib.import_module("hfcompress.coding.fast")
except ImportError:  # numba is not installed: the same bytes, more slowly
    fast = None


def states_for(bits: float, freight: int) -> int:
    """How many states a stream of about `bits` is worth, at 0.04 % of it in all.

    A state costs 3 bytes, less the 2 that it carries while there are `freight` bytes to carry.
    """
    states = 1
    while states < MAX_STATES and 48 * states - 8 * min(4 * states, freight) <= bits / 2500:
        states *= 2
    return states


@dataclass(frozen=True)
class Segment:
    """Consecutive symbols by their number; frequencies and starts [k] of each number."""

    frequencies: NDArray[np.uint32]
    starts: NDArray[np.uint32]
    numbers: NDArray[Any]


def encode(segments: Sequence[Segment], states: int, freight: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """The stream of all segments, in order. freight: [states]."""
    x = freight.astype(np.uint32) + np.uint32(1 << 16)
    words: list[NDArray[np.uint16]] = []
    end = sum(len(segment.numbers) for segment in segments)
    for segment in reversed(segments):
        begin = end - len(segment.numbers)
        if fast is not None:
            spilt = np.empty(len(segment.numbers), dtype=np.uint16)
            kept = fast.push(x, end % states, segment.frequencies, segment.starts, segment.numbers, spilt)
            words.append(spilt[kept:].copy())
        elif states < FEW:
            x = _push_one_by_one(segment, x, begin, words)
        else:
            _push_in_rows(segment, x, begin, words)
        end = begin
    head = np.stack([x >> np.uint32(16), x & np.uint32(0xFFFF)], axis=1).astype(np.uint16).reshape(-1)
    return np.concatenate([head, *reversed(words)])


def classes_by_numba(
    columns: NDArray[np.int64], values: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]] | None:
    """Of symbols known: classes, grids and symbols in the order of the stream (see `fast.walk`); None without numba."""
    if fast is None:
        return None
    kinds, parts, ordered = (np.empty(len(values), dtype=np.int32) for _ in range(3))
    none, words, bits = np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.uint16), np.zeros(0)
    number, symbols = np.zeros((0, 0), dtype=np.int64), np.zeros(0, dtype=np.int32)
    fast.walk(
        columns, number, fast.OCTAVES, none, words, 0, 0, none, symbols, bits, bits, values, kinds, parts, ordered
    )
    return kinds, parts, ordered


def _push_in_rows(segment: Segment, x: NDArray[np.uint32], begin: int, words: list[NDArray[Any]]) -> None:
    """For as many symbols at once as there are states."""
    states, end = len(x), begin + len(segment.numbers)
    while end > begin:
        start = max(begin, (end - 1) // states * states)
        numbers = segment.numbers[start - begin : end - begin]
        f, now = segment.frequencies[numbers], x[start % states : start % states + len(numbers)]
        full = np.flatnonzero(now >> np.uint32(32 - PRECISION) >= f)
        if full.size:
            spilling = now[full]
            words.append(spilling.astype(np.uint16))
            now[full] = spilling >> _WORD
        quotient = (now / f.astype(np.float64)).astype(np.uint32)  # exact: 32 bits by 15 in double precision
        now += quotient * (np.uint32(TOTAL) - f) + segment.starts[numbers]
        end = start


def _push_one_by_one(segment: Segment, x: NDArray[Any], begin: int, words: list[NDArray[Any]]) -> NDArray[np.uint32]:
    state, spilt, states = x.tolist(), [], len(x)
    frequencies, starts = segment.frequencies.tolist(), segment.starts.tolist()
    turn = (begin + len(segment.numbers)) % states
    for number in reversed(segment.numbers.tolist()):
        turn = (turn or states) - 1
        f, now = frequencies[number], state[turn]
        if now >> (32 - PRECISION) >= f:
            spilt.append(now & 0xFFFF)
            now >>= 16
        state[turn] = (now // f << PRECISION) + now % f + starts[number]
    words.append(np.array(spilt[::-1], dtype=np.uint16))
    return np.array(state, dtype=np.uint32)


class Decoder:
    """Reads slots from a stream of `encode`; the caller knows each symbol's table."""

    def __init__(self, stream: NDArray[np.uint16], states: int) -> None:
        if not 1 <= states <= MAX_STATES or 2 * states > stream.size:
            raise FormatError("the symbol stream is truncated")
        head = stream[: 2 * states].astype(np.uint32).reshape(-1, 2)
        self._x = head[:, 0] << np.uint32(16) | head[:, 1]
        if (self._x < 1 << 16).any():
            raise FormatError("the symbol stream begins with a state that no encoder writes")
        self._words = stream[2 * states :]
        self._padded = np.append(self._words, np.uint16(0)) if fast is not None else self._words
        self._at = 0
        self._turn = 0
        self._entry, self._factor = (np.empty(states, dtype=np.uint32) for _ in range(2))
        self._small, self._where = np.empty(states, dtype=bool), np.empty(states, dtype=np.int64)

    def take(
        self,
        lookup: NDArray[np.uint32],
        base: NDArray[np.int64] | int,
        count: int,
        symbols: NDArray[np.int32] | None = None,
    ) -> NDArray[np.int32]:
        """The next `count` slots, or what `symbols` has for them.

        lookup: tables' `lookup()`, one after the other; symbols: likewise; base: where each symbol's table begins.
        """
        out = np.empty(count, dtype=np.int32)
        if fast is not None:
            bases = np.zeros(1, dtype=np.int64) if isinstance(base, int) else base
            none = np.zeros(0, dtype=np.int32) if symbols is None else symbols
            self._at, self._turn = fast.take(self._x, self._padded, self._at, self._turn, lookup, none, bases, out)
            if self._at > self._words.size:
                raise FormatError("the symbol stream is truncated")
        elif len(self._x) < FEW:
            self._take_one_by_one(lookup, base, out, symbols)
        else:
            begin = 0
            while begin < count:
                end = min(begin + len(self._x) - self._turn, count)
                self._step(lookup, base if isinstance(base, int) else base[begin:end], out[begin:end], symbols)
                begin = end
        return out

    def walk(
        self,
        columns: NDArray[np.int64],
        number: NDArray[np.int64],
        lookup: NDArray[np.uint32],
        symbols: NDArray[np.int32],
        costs: NDArray[np.float64],
        bits: NDArray[np.float64],
    ) -> NDArray[np.int32] | None:
        """All symbols of contexts by `fast.walk`, which says what the arguments are; None without numba."""
        if fast is None:
            return None
        out, none = np.empty(int(columns[:, :3].prod(axis=1).sum()), dtype=np.int32), np.zeros(0, dtype=np.int32)
        coder = self._x, self._padded, self._at, self._turn
        self._at, self._turn = fast.walk(
            columns, number, fast.OCTAVES, *coder, lookup, symbols, costs, bits, out, none, none, none
        )
        if self._at > self._words.size:
            raise FormatError("the symbol stream is truncated")
        return out

    def _step(
        self,
        lookup: NDArray[np.uint32],
        base: NDArray[np.int64] | int,
        out: NDArray[np.int32],
        symbols: NDArray[np.int32] | None,
    ) -> None:
        """A symbol for each of consecutive states. Everything goes to buffers: fresh memory would be the slow part."""
        n, turn = len(out), self._turn
        self._turn = (turn + n) % len(self._x)
        x, entry, factor, small = self._x[turn : turn + n], self._entry[:n], self._factor[:n], self._small[:n]
        where = self._where[:n]
        np.bitwise_and(x, _MASK, out=factor)
        where[:] = factor
        if symbols is None:
            out[:] = factor
        if not isinstance(base, int):
            where += base
        if symbols is not None:
            np.take(symbols, where, out=out, mode="clip")
        np.take(lookup, where, out=entry, mode="clip")
        np.right_shift(x, _SHIFT, out=x)
        np.right_shift(entry, _SHIFT, out=factor)
        np.multiply(x, factor, out=x)
        np.bitwise_and(entry, _MASK, out=entry)
        np.add(x, entry, out=x)
        np.less(x, _LEAST, out=small)
        low = small.nonzero()[0]
        if low.size:
            words = self._words[self._at : self._at + low.size]
            if words.size < low.size:
                raise FormatError("the symbol stream is truncated")
            self._at += low.size
            x[low] = (x[low] << _WORD) | words

    def _take_one_by_one(
        self,
        lookup: NDArray[np.uint32],
        base: NDArray[np.int64] | int,
        out: NDArray[np.int32],
        symbols: NDArray[np.int32] | None,
    ) -> None:
        x, words, at, turn, states = self._x.tolist(), self._words.data, self._at, self._turn, len(self._x)
        bases = base.tolist() if isinstance(base, np.ndarray) else itertools.repeat(base, len(out))
        entries, found = lookup.data, []
        for here in bases:
            state = x[turn]
            slot = state & (TOTAL - 1)
            entry = entries[slot + here]
            state = (entry >> PRECISION) * (state >> PRECISION) + (entry & (TOTAL - 1))
            if state < 1 << 16:
                if at == len(words):
                    raise FormatError("the symbol stream is truncated")
                state = state << 16 | words[at]
                at += 1
            x[turn] = state
            turn = turn + 1 if turn + 1 < states else 0
            found.append(slot + here)
        where = np.array(found, dtype=np.int64)
        out[:] = where - base if symbols is None else symbols[where]
        self._x, self._at, self._turn = np.array(x, dtype=np.uint32), at, turn

    def finish(self) -> NDArray[np.uint16]:
        """The freight. Raises FormatError unless every word was used and every state is one to begin with."""
        if self._at != self._words.size or (self._x >> np.uint32(16) != 1).any():
            raise FormatError("the symbol stream does not end with its symbols: it is damaged or of another file")
        return (self._x & np.uint32(0xFFFF)).astype(np.uint16)
