"""What methods hand over to be coded, and the forms that the coder has for it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_SHIFT = 13


@dataclass(frozen=True)
class Symbols:
    """Integers to be entropy coded. values: int32 [n].

    `shape`: how they lie, where that is a weight [rows, channels, *kernel]: neighbours may then tell of each other.
    """

    values: NDArray[np.int32]
    shape: tuple[int, ...] | None = None

    def entropy(self) -> float:
        """Empirical entropy of the whole array in bits: n · H."""
        if self.values.size == 0:
            return 0.0
        counts = np.unique(self.values, return_counts=True)[1]
        return float(-(counts * np.log2(counts / counts.sum())).sum())


@dataclass(frozen=True)
class Form:
    """How an array is coded: value = center + high · 2^shift + low, low in `shift` plain bits, high by a table.

    table: number of a frequency table; CONTEXTS: by the tables of contexts, with `prior` (see contexts.Grid);
    PLAIN: not in the stream (an empty array, or a plane of bytes stored as it is). joined: what has been decoded is all
    but the lowest bit, which a trellis tells (see trellis.join).
    """

    table: int
    shift: int = 0
    center: int = 0
    prior: int = 0
    joined: bool = False


CONTEXTS, PLAIN = -1, -2
_PIECE = 1 << 20


def count(values: NDArray[np.integer], first: int, size: int) -> NDArray[np.int64]:
    """How often each of `size` values from `first` on occurs in `values` [n], all of which are among them.

    Piece by piece: numpy counts in 64 bits, which is twice the memory of the values.
    """
    counts = np.zeros(size, dtype=np.int64)
    for begin in range(0, len(values), max(_PIECE, size)):
        piece = values[begin : begin + max(_PIECE, size)]
        counts += np.bincount(np.subtract(piece, first, dtype=np.int64) if first else piece, minlength=size)
    return counts
