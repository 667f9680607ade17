"""Rounding with stated gradients, and buckets: pure functions."""

from typing import Any

import torch
from torch import Tensor


class _ReplaceThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def replace_through(x: Tensor, value: Tensor) -> Tensor:
    """`value` (exactly), whose gradient reaches `x` unchanged: the straight-through estimator.

    x, value: same shape and dtype.
    """
    result: Tensor = _ReplaceThrough.apply(x, value)
    return result


def cast_through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to the numbers that `dtype` has, in x's own dtype; straight-through gradient."""
    return replace_through(x, x.detach().to(dtype).to(x.dtype))


def stochastic_round(x: Tensor, seed: int) -> Tensor:
    """⌊x⌋ + Bernoulli(x − ⌊x⌋), unbiased; the draw depends on `seed` alone, not on the device's generator."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(x.shape, generator=generator).to(x.device)
    floor = x.floor()
    return floor + (uniform < x - floor)


def to_buckets(x: Tensor, size: int | None) -> Tensor:
    """[n] or any shape → [⌈n / size⌉, size], row-major, the last row filled up with x's last element.

    With size None, or n ≤ size, one row of n: no padding. An empty x gives [0, 1].
    """
    flat = x.reshape(-1)
    n = flat.numel()
    if n == 0:
        return flat.reshape(0, 1)
    if size is None or n <= size:
        return flat.reshape(1, n)
    missing = -n % size
    if missing:
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    return flat.reshape(-1, size)


def extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest of each row [n, 1]. Two passes: on a CPU, aminmax takes eight times as long as both."""
    return rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)


def from_buckets(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `to_buckets`: drops the padding and gives `shape`."""
    numel = 1
    for size in shape:
        numel *= size
    return rows.reshape(-1)[:numel].reshape(shape)
