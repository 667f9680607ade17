"""Slow plain loops written from the papers' text, against which the fast code is held."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantized:
    """One weight: the point it went to, the distance to the next point, and how near it lay to a tie (0 … 0.5)."""

    value: float
    step: float
    margin: float


def uniform(
    weights: Sequence[float],
    bits: int,
    bucket: int | None,
    stored: Callable[[float], float] = float,
    draws: Iterator[float] | None = None,
) -> list[Quantized]:
    """Uniform quantization of Polino, Pascanu, Alistarh 2018, sections 2.1 and 3: linear scaling, buckets.

    weights: row-major. stored: what is left of a number that is written down. draws: uniform in [0, 1), one for each
    weight of each bucket, padding included: a weight goes up where the draw is below its fraction (none: to nearest).
    """
    k = bucket if bucket is not None and len(weights) > bucket else len(weights)
    padded = list(weights)
    while len(padded) % k:
        padded.append(weights[-1])  # "pad with the last value"
    points = 2**bits
    result = []
    for start in range(0, len(padded), k):
        row = padded[start : start + k]
        beta = stored(min(row))
        # alpha = max − min is written down as the distance of two points, alpha / (points − 1)
        step = stored(max(0.0, max(row) - beta) / (points - 1))
        alpha = step * (points - 1)
        for weight in row:
            x = 0.0 if alpha == 0 else min(max((weight - beta) / alpha, 0.0), 1.0)  # in [0, 1]
            position = x * (points - 1)
            below = int(position)
            fraction = position - below
            if draws is None:
                point, margin = round(position), abs(fraction - 0.5)
            else:
                draw = next(draws)
                point, margin = below + (draw < fraction), min(abs(fraction - draw), fraction, 1 - fraction)
            result.append(Quantized(alpha * (point / (points - 1)) + beta, step, margin))
    return result[: len(weights)]
