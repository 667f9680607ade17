"""Many tensors worked on as one: a GPU takes longer to start a small kernel than to run it. Pure functions.

Elements of all tensors lie one after another. Of a single tensor nothing is copied and nothing spread.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

AT_ONCE = {"cpu": 1 << 12}
"""Elements of a batch, by the type of device. On a CPU larger tensors stay alone, and in the cache."""
_AT_ONCE_ELSEWHERE = 1 << 24
_T = TypeVar("_T")


def batches(items: Sequence[_T], tensor: Callable[[_T], Tensor]) -> Iterator[list[_T]]:
    """`items` in their order, cut into lists to be worked on together: those whose `tensor` is on one device, of one
    dtype, not empty, and in sum no more than such a device takes at once; one item where that is too large."""
    batch: list[_T] = []
    size, last = 0, None
    for item in items:
        found = tensor(item)
        alike = (found.dtype, found.device, found.numel() > 0)
        room = AT_ONCE.get(found.device.type, _AT_ONCE_ELSEWHERE)
        if batch and (alike != last or size + found.numel() > room or not found.numel()):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size, last = size + found.numel(), alike
    if batch:
        yield batch


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """All elements, [n]."""
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])


def parted(flat: Tensor, shaped: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The inverse: views of `flat`, with the shapes of `shaped`."""
    if len(shaped) == 1:
        return (flat.view(shaped[0].shape),)
    parts = flat.view(-1).split([tensor.numel() for tensor in shaped])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, shaped))


def spread(values: Tensor, counts: Sequence[int]) -> Tensor:
    """[N, …] → [Σ counts, …]: values[i] counts[i] times. Of one, values itself, for it is broadcast."""
    if len(counts) == 1:
        return values
    return values.repeat_interleave(_on(tuple(counts), values.device), 0, output_size=sum(counts))


def sums(values: Tensor, counts: Sequence[int]) -> Tensor:
    """[Σ counts, …] → [N, …]: of each tensor's rows, every one summed as if it were alone."""
    return torch.stack([part.sum(0, dtype=torch.float32) for part in values.split(list(counts))])


@lru_cache(maxsize=256)
def _on(counts: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(counts, device=device)
