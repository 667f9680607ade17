"""The loops of the coder compiled by numba, where that is installed: the same results, sooner."""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from hfcompress.coding.contexts import LIMIT, LOG, ROWS, SCALES, SIZE_STEPS, SIZES
from hfcompress.coding.tables import PRECISION, TOTAL

OCTAVES = LOG.astype(np.uint8)
"""What `walk` takes for `log`."""
_TINY, _SMALL, _LARGE = SIZE_STEPS


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


@numba.njit(cache=True, nogil=True)
def walk(
    grids: NDArray[np.int64],
    number: NDArray[np.int64],
    log: NDArray[np.uint8],
    x: NDArray[np.uint32],
    words: NDArray[np.uint16],
    at: int,
    turn: int,
    lookup: NDArray[np.uint32],
    symbols: NDArray[np.int32],
    costs: NDArray[np.float64],
    bits: NDArray[np.float64],
    out: NDArray[np.int32],
    kinds: NDArray[np.int32],
    parts: NDArray[np.int32],
    ordered: NDArray[np.int32],
) -> tuple[int, int]:
    """`contexts.walk` with the decoder inside: fills `out` [all symbols], and returns the next word and turn.

    grids: `contexts.columns`; number: [group, class], where in `lookup` and `symbols` the class's table begins; costs:
    bits of each place there, none where they are not to be summed into `bits` [grids]. Where there are no states (`x`),
    `out` is known, and `kinds`, `parts`, `ordered` [all symbols] take classes, grids, symbols in the stream's order.
    """
    states, last, visited, steps = len(x), len(words) - 1, 0, 0
    begins, lanes_before, channels_before = np.zeros((3, len(grids) + 1), dtype=np.int64)
    for g in range(len(grids)):
        rows, channels, places = grids[g, 0], grids[g, 1], grids[g, 2]
        begins[g + 1] = begins[g] + rows * channels * places
        lanes_before[g + 1] = lanes_before[g] + (rows + ROWS - 1) // ROWS
        channels_before[g + 1] = channels_before[g] + channels
        steps = max(steps, min(rows, ROWS) * channels * places)
    size_of_row = np.zeros(lanes_before[-1], dtype=np.int64)
    size_of_channel = np.zeros(channels_before[-1], dtype=np.int64)
    for t in range(steps):
        for g in range(len(grids)):
            rows, channels, places, line, mean = grids[g, 0], grids[g, 1], grids[g, 2], grids[g, 3], grids[g, 4]
            w_row, w_channel, w_near, group = grids[g, 5], grids[g, 6], grids[g, 7], grids[g, 8]
            wide = channels * places
            if t >= min(rows, ROWS) * wide:
                continue
            row, c = t // wide, t % wide
            lanes, address, place = (rows - row + ROWS - 1) // ROWS, channels_before[g] + c // places, c % places
            seen = (lanes_before[g + 1] - lanes_before[g]) * (row * places + place)
            of_channel = ((size_of_channel[address] << 8) + 4 * mean) // (seen + 4)
            base = w_channel * log[min(of_channel, LIMIT)] + (16 - w_row - w_channel - w_near) * log[mean]
            total: Any = 0
            has_left, has_above = place % line > 0, place >= line
            missing = mean * (3 - has_left - has_above)
            for lane in range(lanes):
                here = begins[g] + (lane * ROWS + row) * wide + c
                of_row = ((size_of_row[lanes_before[g] + lane] << 8) + 4 * mean) // (c + 4)
                scale: Any = base + w_row * log[min(of_row, LIMIT)]
                lean: Any = 0
                if places > 1:
                    left: Any = np.int64(out[here - 1]) if has_left else 0
                    above: Any = np.int64(out[here - line]) if has_above else 0
                    near = ((abs(left) + abs(above)) << 8) + missing
                    scale += w_near * log[min(near // 3, LIMIT)]
                    lean = 5 * left + 4 * above - (np.int64(out[here - line - 1]) if has_left and has_above else 0)
                scale = max(min(scale >> 4, 2 * SCALES - 1), 0)
                kind = (scale >> 1) * SIZES
                if lean != 0:
                    octaves = np.int64(log[min(20 * abs(lean), LIMIT)]) - scale
                    kind += np.int64(octaves >= _TINY) + np.int64(octaves >= _SMALL) + np.int64(octaves >= _LARGE)
                if states:
                    state = x[turn]
                    where = np.int64(state & np.uint32(TOTAL - 1)) + number[group, kind]
                    entry, symbol = lookup[where], np.int64(symbols[where])
                    state = (entry >> np.uint32(PRECISION)) * (state >> np.uint32(PRECISION))
                    state += entry & np.uint32(TOTAL - 1)
                    if state < np.uint32(1 << 16):
                        state = (state << np.uint32(16)) | np.uint32(words[at])
                        at += 1
                        if at > last:
                            return at, turn
                    x[turn] = state
                    turn = turn + 1 if turn + 1 < states else 0
                    if len(costs):
                        bits[g] += costs[where]
                    out[here] = -symbol if lean < 0 else symbol
                else:
                    kinds[visited], parts[visited], ordered[visited] = ~kind if lean < 0 else kind, g, out[here]
                    visited += 1
                size = abs(np.int64(out[here]))
                total += size
                size_of_row[lanes_before[g] + lane] += size
                if c + 1 == wide:
                    size_of_row[lanes_before[g] + lane] = 0
            size_of_channel[address] += total
    return at, turn
