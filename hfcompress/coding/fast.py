"""The loops of the coder compiled by numba, where that is installed: the same results, sooner."""

import numba
import numpy as np
from numpy.typing import NDArray

from hfcompress.coding.tables import PRECISION, TOTAL


@numba.njit(cache=True, nogil=True)
def take(
    x: NDArray[np.uint32],
    words: NDArray[np.uint16],
    at: int,
    turn: int,
    lookup: NDArray[np.uint32],
    symbols: NDArray[np.int32],
    bases: NDArray[np.int64],
    out: NDArray[np.int32],
) -> tuple[int, int]:
    """`rans.Decoder.take`: fills `out`, changes the states `x`, returns the next word and turn.

    No symbols: slots; one base: for all. `words` has one more than the stream's; a next word beyond that tells
    that words were missing.
    """
    states, last, several = len(x), len(words) - 1, len(bases) != 1 or len(out) == 1
    begin = 0
    while begin < len(out):
        end = min(begin + states - turn, len(out))
        for i in range(begin, end):
            state = x[turn]
            slot = state & np.uint32(TOTAL - 1)
            where = np.int64(slot) + (bases[i] if several else bases[0])
            entry = lookup[where]
            out[i] = symbols[where] if len(symbols) else slot
            state = (entry >> np.uint32(PRECISION)) * (state >> np.uint32(PRECISION)) + (entry & np.uint32(TOTAL - 1))
            small = state < np.uint32(1 << 16)
            longer = (state << np.uint32(16)) | np.uint32(words[at])  # read in any case: a branch would be a guess
            at += small
            if at > last:
                return at, turn
            x[turn] = longer if small else state
            turn += 1
        turn = turn if turn < states else 0
        begin = end
    return at, turn


@numba.njit(cache=True, nogil=True)
def push(
    x: NDArray[np.uint32],
    turn: int,
    frequencies: NDArray[np.uint32],
    starts: NDArray[np.uint32],
    numbers: NDArray[np.uint16],
    spilt: NDArray[np.uint16],
) -> int:
    """`rans.encode` of one segment whose last symbol's state precedes number `turn`: changes `x`; fills `spilt` [n]
    from its end, and returns where that begins."""
    at, states = len(spilt), len(x)
    for i in range(len(numbers) - 1, -1, -1):
        turn = (turn if turn else states) - 1
        f, state = frequencies[numbers[i]], x[turn]
        if state >> np.uint32(32 - PRECISION) >= f:
            at -= 1
            spilt[at] = state & np.uint32(0xFFFF)
            state >>= np.uint32(16)
        x[turn] = state + state // f * (np.uint32(TOTAL) - f) + starts[numbers[i]]
    return at
