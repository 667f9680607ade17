"""Magnitude pruning: of each tensor the smallest weights are zero, as many as are asked for.

Zhu and Gupta, "To prune, or not to prune", 2017, section 2, with the fraction fixed from the first step; the mask is
taken anew at every step, and weights under it keep their gradient, so that they can return (Guo, Yao, Chen, "Dynamic
Network Surgery for Efficient DNNs", NeurIPS 2016). This is what learned thresholds are measured against.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hfcompress.errors import ConfigError
from hfcompress.methods.threshold import entropy, sparse, sparse_values
from hfcompress.reparameterization import Description, Latents, Reparameterization, Slot
from hfcompress.rounding import replace_all_through
from hfcompress.together import joined, parted, spread


@dataclass(frozen=True)
class Magnitude(Reparameterization):
    """The ⌊sparsity · n⌋ weights of least size are zero, the others are kept in float16; straight through.

    Of weights of one size all are zero or none: those at the boundary are kept. Rate: the entropy of which weights are
    zero, and 16 bits a survivor; it is set by `sparsity`, and has no gradient.

    Raises ConfigError: `sparsity` is not in [0, 1).
    """

    sparsity: float = 0.9

    decayed: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"magnitude: sparsity must be at least 0 and less than 1, found {self.sparsity}")

    def init(self, weight: Tensor, slot: Slot) -> Latents:
        return {"weight": weight.detach().clone()}

    def decode(self, latents: Latents, slot: Slot, *, hard: bool) -> Tensor:
        if "values" in latents:
            return latents["values"].reshape(slot.shape)
        return self.decode_group([(latents, slot)], hard=hard)[0]

    def decode_group(self, members: Sequence[tuple[Latents, Slot]], *, hard: bool) -> Sequence[Tensor]:
        weights = [latents["weight"] for latents, _ in members]
        pruned = self._pruned([weight.detach() for weight in weights])
        return replace_all_through(weights, parted(pruned.to(weights[0].dtype), weights))

    def rate(self, latents: Latents, slot: Slot) -> Tensor:
        alive = int(self._pruned([latents["weight"].detach()]).count_nonzero())
        zeros = slot.numel - alive
        bits = entropy(np.array([zeros, alive])) + 16.0 * alive
        return latents["weight"].new_tensor(bits, dtype=torch.float32)

    def describe(self, latents: Latents, slot: Slot) -> Description:
        return sparse(self._pruned([latents["weight"].detach()]))

    def restore(self, description: Description, slot: Slot) -> Latents:
        return {"values": sparse_values(description, slot)}

    def _pruned(self, weights: Sequence[Tensor]) -> Tensor:
        """In numbers that float16 has, float32 [n]."""
        found, numbers = joined(weights).float(), [weight.numel() for weight in weights]
        counts = [math.floor(self.sparsity * number) for number in numbers]
        if any(counts):
            size = found.abs()
            parts = zip(size.split(numbers), counts)
            # of each tensor the smallest that is kept; without any to drop, that is every one
            least = torch.stack(
                [part.kthvalue(count + 1).values if count else part.new_zeros(()) for part, count in parts]
            )
            kept = (
                (size - spread(least, numbers)).sign_().clamp_(max=0).add_(1)
            )  # 0 or 1: choosing takes several times as long
            found = found * kept
        return found.half().float() + 0.0  # −0 + 0 = 0, as the file gives
