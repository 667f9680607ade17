"""Slow plain loops written from the papers' text, against which the fast code is held."""

import cmath
import math
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


def zero_point(
    weights: Sequence[float], bits: int, bucket: int | None, stored: Callable[[float], float] = float
) -> list[Quantized]:
    """A grid that holds 0, as low-bit kernels have it: w = (code − zero) · step with whole numbers code and zero."""
    k = bucket if bucket is not None and len(weights) > bucket else len(weights)
    top = 2**bits - 1
    result = []
    for start in range(0, len(weights), k):
        row = weights[start : start + k]
        low, high = min(0.0, *row), max(0.0, *row)
        step = stored((high - low) / top)
        for weight in row:
            if step == 0:
                result.append(Quantized(0.0, 0.0, 0.5))
                continue
            zero = min(max(round(-low / step), 0), top)
            position = weight / step + zero
            code = min(max(round(position), 0), top)
            margins = [abs(x - int(x) - 0.5) for x in (abs(position), -low / step)]
            result.append(Quantized((code - zero) * step, step, min(margins)))
    return result


def levels(
    weights: Sequence[float],
    points: Sequence[float],
    bucket: int | None,
    stored: Callable[[float], float] = float,
    gradients: Sequence[float] | None = None,
) -> tuple[list[tuple[float, float]], list[float]]:
    """Differentiable quantization of Polino, Pascanu, Alistarh 2018, section 4 and algorithm 2.

    points: p₁ … p_m in any order. Gives (weight, how near it lay to a tie) for each, and each point's gradient.
    """
    k = bucket if bucket is not None and len(weights) > bucket else len(weights)
    kept = [stored(p) for p in points]
    result, of_points = [], [0.0] * len(points)
    for start in range(0, len(weights), k):
        row = weights[start : start + k]
        beta = stored(min(row))
        alpha = stored(max(row) - beta)
        alpha = alpha if alpha > 0 else 1.0
        for i, weight in enumerate(row):
            x = (weight - beta) / alpha
            distances = sorted((abs(x - p), p, j) for j, p in enumerate(kept))
            distance, point, nearest = distances[0]
            others = [far - distance for far, p, _ in distances if p != point]
            result.append((alpha * point + beta, min(others, default=1.0)))
            if gradients is not None:
                of_points[nearest] += alpha * gradients[start + i]
    return result, of_points


def multi_hash(
    left: Sequence[Sequence[float]], right: Sequence[Sequence[float]], sizes: Sequence[int], scales: Sequence[float]
) -> list[list[float]]:
    """Structured multi-hashing of Eban et al. 2020, equation 4: tensors cut one after another from W = L · R.

    left: n rows of M; right: M rows of n; sizes, scales: elements and scale of every tensor.
    """
    n, rank = len(left), len(right)
    pool = []
    for i in range(n):
        for j in range(n):
            pool.append(sum(left[i][m] * right[m][j] for m in range(rank)))  # row-major
    result, start = [], 0
    for size, scale in zip(sizes, scales, strict=True):
        result.append([scale * w for w in pool[start : start + size]])
        start += size
    return result


def factorized(parameters: Sequence[float], x: float) -> float:
    """p(x) = c(x + ½) − c(x − ½) of Ballé et al. 2018: layers of 3, 3, 3 and 1 units, one layer's H, a, g on end."""

    def cumulative(at: float) -> float:
        numbers, y = iter(parameters), [at]
        for units in (3, 3, 3, 1):
            weights = [[math.log1p(math.exp(next(numbers))) for _ in y] for _ in range(units)]
            biases = [next(numbers) for _ in range(units)]
            y = [sum(w * v for w, v in zip(row, y, strict=True)) + a for row, a in zip(weights, biases, strict=True)]
            if units > 1:
                y = [v + math.tanh(next(numbers)) * math.tanh(v) for v in y]
        return 1 / (1 + math.exp(min(-y[0], 700)))

    return cumulative(x + 0.5) - cumulative(x - 0.5)


def fourier(kernel: Sequence[Sequence[float]]) -> list[list[float]]:
    """Real coefficients of one H×W slice: √2 · Re of each frequency's complex one, −√2 · Im where its conjugate came
    earlier, the real number itself where it is its own conjugate."""
    height, width = len(kernel), len(kernel[0])
    result = []
    for fy in range(height):
        row = []
        for fx in range(width):
            turns = [[fy * y / height + fx * x / width for x in range(width)] for y in range(height)]
            waves = [[cmath.exp(-2j * math.pi * t) for t in line] for line in turns]
            total = sum(kernel[y][x] * waves[y][x] for y in range(height) for x in range(width))
            coefficient = total / math.sqrt(height * width)
            conjugate = (-fy % height, -fx % width)
            if conjugate == (fy, fx):
                row.append(coefficient.real)
            else:
                row.append(math.sqrt(2) * (-coefficient.imag if conjugate < (fy, fx) else coefficient.real))
        result.append(row)
    return result


def soft_threshold(
    weights: Sequence[float], s: float, gradients: Sequence[float]
) -> tuple[list[float], list[float], float]:
    """Soft threshold reparameterization of Kusupati et al. 2020, section 3.

    Gives the weights with g(s) = 1 / (1 + e^−s) taken off their size; and, given the gradients of the loss in these,
    those in w and in s.
    """
    g = 1 / (1 + math.exp(-s))
    values, of_weights, of_s = [], [], 0.0
    for w, gradient in zip(weights, gradients, strict=True):
        sign = (w > 0) - (w < 0)
        value = sign * max(abs(w) - g, 0.0)
        values.append(value)
        of_weights.append(gradient if value else 0.0)
        if value:
            of_s += gradient * sign
    return values, of_weights, -g * (1 - g) * of_s


def magnitude(weights: Sequence[float], sparsity: float) -> list[float]:
    """The smallest ⌊sparsity · n⌋ of n weights are zero; of those as large as the smallest that is kept none is."""
    kept = sorted(abs(w) for w in weights)[math.floor(sparsity * len(weights)) :]
    return [w if abs(w) >= kept[0] else 0.0 for w in weights]


def soft_count(weights: Sequence[float], s: float, sharpness: int) -> float:
    """How many weights are above g(s), each counted as 1 / (1 + e^−x) with x = sharpness · log(|w| / g(s))."""
    g = 1 / (1 + math.exp(-s))
    return sum(1 / (1 + math.exp(-sharpness * math.log(abs(w) / g))) for w in weights)
