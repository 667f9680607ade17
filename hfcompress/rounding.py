"""Rounding with stated gradients, and buckets: pure functions."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hfcompress.together import joined, parted, spread


class _ReplaceThrough(torch.autograd.Function):
    """xs, then as many values."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[len(tensors) // 2 :]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        passed = parted(joined(gradients), gradients)  # of one tensor, so that each is taken over and not copied
        return *passed, *(None for _ in gradients)


def replace_through(x: Tensor, value: Tensor) -> Tensor:
    """`value` (exactly), whose gradient reaches `x` unchanged: the straight-through estimator.

    x, value: same shape and dtype.
    """
    return replace_all_through([x], [value])[0]


def replace_all_through(xs: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`replace_through` of each pair, at once."""
    result: tuple[Tensor, ...] = _ReplaceThrough.apply(*xs, *values)
    return result


def cast_through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to the numbers that `dtype` has, in x's own dtype; straight-through gradient."""
    return replace_through(x, x.detach().to(dtype).to(x.dtype))


def round_by(x: Tensor, uniform: Tensor) -> Tensor:
    """⌊x⌋, and 1 more where x − ⌊x⌋ is above `uniform`, of x's shape: with a draw of U[0, 1), unbiased."""
    floor = x.floor()
    return floor + (uniform < x - floor)


def uniform_draw(count: int, seed: int) -> Tensor:
    """U[0, 1), float32 [count], on the CPU: the draw depends on `seed` alone, not on a device's generator."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


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


def all_to_buckets(xs: Sequence[Tensor], size: int | None) -> Tensor:
    """The rows of `to_buckets` of every x, one below the other.

    Of several that are not empty: those shorter than `size` are filled up too; with size None [Σ n, 1], no rows at all.
    """
    if len(xs) == 1:
        return to_buckets(xs[0], size)
    if size is None:
        return joined(xs).unsqueeze(1)
    parts = []
    for flat in (x.reshape(-1) for x in xs):
        missing = -len(flat) % size
        parts += [flat, flat[-1:].repeat(missing)] if missing else [flat]
    return torch.cat(parts).view(-1, size)


def all_from_buckets(rows: Tensor, shapes: Sequence[tuple[int, ...]], size: int | None) -> list[Tensor]:
    """The inverse of `all_to_buckets`."""
    if len(shapes) == 1:
        return [from_buckets(rows, shapes[0])]
    parts = rows.reshape(-1).split(rooms([math.prod(shape) for shape in shapes], size))
    return [from_buckets(part, shape) for part, shape in zip(parts, shapes)]


def rooms(counts: Sequence[int], size: int | None) -> list[int]:
    """Elements that tensors of so many take in the rows of `all_to_buckets`, padding included."""
    if len(counts) == 1 and (size is None or counts[0] <= size):
        return list(counts)
    return [count + -count % (size or 1) for count in counts]


def extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest of each row [n, 1]. Two passes: on a CPU, aminmax takes eight times as long as both."""
    return rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)


def all_extremes(rows: Tensor, xs: Sequence[Tensor], size: int | None) -> tuple[Tensor, Tensor]:
    """Of the rows of `all_to_buckets`: of their bucket, or, with size None, of their whole tensor."""
    if size is not None or len(xs) == 1:
        return extremes(rows)
    counts = [x.numel() for x in xs]
    low, high = (torch.stack([one(x) for x in xs]).float().unsqueeze(1) for one in (torch.amin, torch.amax))
    return spread(low, counts), spread(high, counts)


def from_buckets(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `to_buckets`: drops the padding and gives `shape`."""
    return rows.reshape(-1)[: math.prod(shape)].reshape(shape)
