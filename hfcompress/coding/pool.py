"""Which arrays share a frequency table: arrays that look alike pay for one together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hfcompress.coding.symbols import count
from hfcompress.coding.tables import Fitted, estimate, fit

MAX_TABLES = 64


@dataclass(frozen=True)
class Histogram:
    """How often each value from `first` on occurs. The first and last count are not 0; no counts: an empty array."""

    first: int
    counts: NDArray[np.int64]

    @staticmethod
    def of(values: NDArray[np.integer]) -> "Histogram":
        if values.size == 0:
            return Histogram(0, np.zeros(0, dtype=np.int64))
        low, high = int(values.min()), int(values.max())
        return Histogram(low, count(values, low, high - low + 1))

    def __add__(self, other: "Histogram") -> "Histogram":
        first = min(self.first, other.first)
        end = max(self.first + len(self.counts), other.first + len(other.counts))
        counts = np.zeros(end - first, dtype=np.int64)
        for part in (self, other):
            counts[part.first - first : part.first - first + len(part.counts)] += part.counts
        return Histogram(first, counts)


def pool(histograms: Sequence[Histogram], plain_bits: Sequence[float], reach: int) -> tuple[list[Fitted], list[int]]:
    """Tables, and for each histogram the number of its table, or −1 where `plain_bits` is less (or it is empty).

    No table spans more than `reach` values.
    """
    pools = _gather(histograms, plain_bits, reach)
    tables = [fit(p.counts, p.first)[0] for p in pools]
    choice = []
    for histogram, plain in zip(histograms, plain_bits):
        costs = [table.bits(histogram.counts, histogram.first) for table in tables]
        best = min(range(len(costs)), key=costs.__getitem__, default=-1) if len(histogram.counts) else -1
        choice.append(-1 if best < 0 or plain <= costs[best] else best)
    used = sorted(set(choice) - {-1})
    merged = []
    for number in used:  # fitted again to what chose them
        members = [h for h, c in zip(histograms, choice) if c == number]
        whole = sum(members[1:], members[0])
        merged.append(fit(whole.counts, whole.first))
    return merged, [used.index(c) if c >= 0 else -1 for c in choice]


def _gather(histograms: Sequence[Histogram], plain_bits: Sequence[float], reach: int) -> list[Histogram]:
    """Each histogram, the largest first, joins the pool that it makes least longer, or begins one."""
    pools: list[Histogram] = []
    costs: list[float] = []
    for i in sorted(range(len(histograms)), key=lambda i: -int(histograms[i].counts.sum())):
        histogram = histograms[i]
        if not len(histogram.counts):
            continue
        best, best_cost, joined = -1, min(estimate(histogram.counts), plain_bits[i]), histogram
        alone = best_cost
        for number, other in enumerate(pools):
            if len(other.counts) == 1 and len(histogram.counts) == 1 and other.first != histogram.first:
                continue
            together = other + histogram
            if len(together.counts) > reach:
                continue
            more = estimate(together.counts) - costs[number]
            if more < best_cost:
                best, best_cost, joined = number, more, together
        if best >= 0:
            pools[best], costs[best] = joined, costs[best] + best_cost
        elif plain_bits[i] == float("inf") or (alone < plain_bits[i] and len(pools) < MAX_TABLES):
            pools.append(histogram)
            costs.append(alone)
    return pools
