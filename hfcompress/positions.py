"""Marian's tables of sinusoidal positions, which no file holds: the same bits as transformers', sooner.

Vaswani et al. 2017, "Attention is all you need", section 3.5, with the cosines after the sines instead of between them.
transformers fills a table of 1,024 × 512 number by number, which takes a second: most of the time that loading takes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hfcompress.claims import unsaved

_CLASS = "MarianSinusoidalPositionalEmbedding"
_TRIED = 3  # rows of a table that are compared with those of transformers


def tables(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → table, for each one in `model` (which may be empty), in float32; none that transformers fills otherwise.

    Whoever puts them into the model may set `_is_hf_initialized` on their modules, which keeps transformers from it.
    """
    found: dict[tuple[int, int], Tensor] = {}
    given = {}
    for name, module in model.named_modules():
        if type(module).__name__ != _CLASS or f"{name}.weight" not in unsaved(model):
            continue
        positions, width = (int(size) for size in module.weight.shape)
        if (positions, width) not in found:
            found[positions, width] = table_of(positions, width)
        table = found[positions, width]
        few = min(positions, _TRIED)
        if torch.equal(_theirs(type(module), few, width), table[:few]):
            given[f"{name}.weight"] = nn.Parameter(table.clone(), requires_grad=False)
    return given


def table_of(positions: int, width: int) -> Tensor:
    """[positions, width], float32: position p, column i < ⌈width / 2⌉ is sin(p / 10000^(2i / width)), then cosines."""
    # divided one by one and raised to their powers one by one, as in a loop: whole arrays may take other kernels
    powers = np.array([np.power(10000, 2 * (j // 2) / width) for j in range(width)])
    angles = np.arange(positions)[:, None] / powers
    halves = np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])
    return torch.from_numpy(np.concatenate(halves, axis=1).astype(np.float32))


def _theirs(kind: Any, positions: int, width: int) -> Tensor:
    table: Tensor = kind(positions, width).create_weight()
    return table.float()
