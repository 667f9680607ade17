"""Codes whose lowest bit is told by those before them, so that no stream has to tell it.

Trellis coded quantization (Marcellin and Fischer, IEEE Trans. Comm. 38, 1990), known in video and network coding as
dependent quantization. A code is v = 2 h + q, and its lowest bit is the output of a machine of eight states that the
parities p = h mod 2 drive:

    q(t) = q(t − 2) xor q(t − 3) xor p(t − 1)        all of them 0 before the first of each `LANE` codes

At every place half of the grid is closed, which half depends on the past; so a code costs what one on a grid twice as
coarse costs, while the error is nearer to that of the fine one. Which codes to take is `hfcompress.dependent`'s.
"""

import numpy as np
from numpy.typing import NDArray

LANE = 1008  # 18 words of 56 bits
_PIECE = 1024 * LANE
_WORD = np.uint64((1 << 56) - 1)
_EVERY_SEVENTH = np.uint64(sum(1 << place for place in range(0, 56, 7)))


def join(high: NDArray[np.int32]) -> NDArray[np.int32]:
    """v = 2 h + q of each h, |h| < 2^30. [n], in place."""
    for begin in range(0, len(high), _PIECE):
        piece = high[begin : begin + _PIECE]
        lowest = _lowest(piece)
        piece <<= 1
        piece |= lowest
    return high


def split(values: NDArray[np.int32]) -> NDArray[np.int32] | None:
    """The h of codes v = 2 h + q, or None if they are not such codes, or none of them is odd."""
    odd = False
    for begin in range(0, len(values), _PIECE):
        piece = values[begin : begin + _PIECE]
        lowest = (piece & 1).astype(np.uint8)
        odd = odd or bool(lowest.any())
        if not np.array_equal(lowest, _lowest(piece >> 1)):
            return None
    return values >> 1 if odd else None


def _lowest(high: NDArray[np.int32]) -> NDArray[np.uint8]:
    """q for each h, 56 at a time: from 1 + D² + D³ = (1 + D⁷) / (1 + D² + D³ + D⁴) follows

    q(t) = q(t − 7) xor p(t − 1) xor p(t − 3) xor p(t − 4) xor p(t − 5)
    """
    lanes = -(-len(high) // LANE)
    parities = np.zeros(lanes * LANE, dtype=np.uint8)
    np.bitwise_and(high, 1, out=parities[: len(high)], casting="unsafe")
    octets = np.zeros((lanes, LANE // 56, 8), dtype=np.uint8)
    octets[..., :7] = np.packbits(parities, bitorder="little").reshape(octets[..., :7].shape)
    words = octets.view("<u8")[..., 0].astype(np.uint64)
    wide = words << np.uint64(8)
    wide[:, 1:] |= words[:, :-1] >> np.uint64(48)
    x = wide >> np.uint64(7) ^ wide >> np.uint64(5) ^ wide >> np.uint64(4) ^ wide >> np.uint64(3)
    for distance in (7, 14, 28):  # eight terms of the sum over every seventh
        x ^= x << np.uint64(distance)
    x &= _WORD
    before = np.bitwise_xor.accumulate(x >> np.uint64(49), axis=1)
    x[:, 1:] ^= before[:, :-1] * _EVERY_SEVENTH
    octets[..., :7] = x.astype("<u8").view(np.uint8).reshape(octets.shape)[..., :7]
    return np.unpackbits(np.ascontiguousarray(octets[..., :7]).reshape(-1), bitorder="little")[: len(high)]
