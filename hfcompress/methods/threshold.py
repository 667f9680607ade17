"""Soft threshold reparameterization: a learned threshold per tensor, below which weights are zero.

Kusupati, Ramanujan, Somani, Wortsman, Jain, Kakade, Farhadi, "Soft Threshold Weight Reparameterization for Learnable
Sparsity", ICML 2020, section 3: with g = sigmoid,

    ŵ = sign(w) · relu(|w| − g(s))
    ∂L/∂w = ∂L/∂ŵ · [ŵ ≠ 0],    ∂L/∂s = −g′(s) · Σᵢ ∂L/∂ŵᵢ · sign(wᵢ) · [ŵᵢ ≠ 0]

The paper lets weight decay pull s up from a start found by hand; here g(s) starts at a hundredth of the weights' size,
where its gradient is alive, and the rate in bits pulls it up, so that a target can say how far. One more difference: a
weight of exactly 0 gets its gradient too, or a tensor that starts at zero (the last of a residual branch) stays there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hfcompress.coding import Symbols
from hfcompress.errors import ConfigError, FormatError
from hfcompress.reparameterization import Description, Latents, Reparameterization, Slot, array_in, symbols_in

_START = 0.01  # the first threshold, in units of the weights' root mean square
_SHARPNESS = 4  # of the soft count |w|^k / (|w|^k + g(s)^k); `_soft_count` squares twice for it


@dataclass(frozen=True)
class SoftThreshold(Reparameterization):
    """Weights up to a learned threshold are zero, the others lose it from their size.

    `survivors`: how those are kept: "float16", or a whole number of bits, 2 … 8, for a uniform grid of 2^bits − 1
    points, zero among them: ±(q − ½) · step with q = 1 … 2^(bits − 1) − 1 and one step a tensor, which follows the mean
    size of the survivors (so that the grid is best for sizes that fall off exponentially); straight through.

    Rate: the entropy of which weights are zero, and the survivors'. Its value is that of the codes as they stand, its
    gradient that of a soft count of the survivors, Σ |w|^k / (|w|^k + g(s)^k), times the bits that one more would cost.
    The threshold cannot pass 1 (g is a sigmoid): larger weights cannot become zero.

    Raises ConfigError: survivors are neither "float16" nor 2 … 8.
    """

    survivors: Literal["float16"] | int = "float16"

    decayed: ClassVar[frozenset[str]] = frozenset({"weight"})
    auxiliary: ClassVar[Mapping[str, float]] = MappingProxyType({"threshold": 0.1})

    def __post_init__(self) -> None:
        if self.survivors not in ("float16", *range(2, 9)):
            raise ConfigError(f'softthreshold: survivors must be "float16" or 2 to 8 bits, found {self.survivors}')

    def init(self, weight: Tensor, slot: Slot) -> Latents:
        size = weight.detach().double().square().mean().sqrt().item() if slot.numel else 0.0
        start = min(max(_START * size, 1e-12), 0.5)
        threshold = torch.tensor(math.log(start / (1 - start)), dtype=torch.float32, device=weight.device)
        return {"weight": weight.detach().clone(), "threshold": threshold}

    def decode(self, latents: Latents, slot: Slot, *, hard: bool) -> Tensor:
        if "codes" in latents:
            return _dequantize(latents["codes"].float(), latents["step"]).reshape(slot.shape)
        if "values" in latents:
            return latents["values"].reshape(slot.shape)
        weight, threshold = latents["weight"], latents["threshold"]
        with torch.no_grad():
            codes, step = self._codes(weight, threshold)
            value = codes if step is None else _dequantize(codes, step)
        decoded: Tensor = _SoftThreshold.apply(weight, threshold, value.to(weight.dtype))
        return decoded

    def rate(self, latents: Latents, slot: Slot) -> Tensor:
        return self.rate_of_group([(latents, slot)])

    def rate_of_group(self, members: Sequence[tuple[Latents, Slot]]) -> Tensor:
        """As the sum of `rate`, but what is counted of all slots is read from the device at once."""
        weights, thresholds = ([latents[name] for latents, _ in members] for name in ("weight", "threshold"))
        with torch.no_grad():
            counts = torch.stack([self._count(*pair) for pair in zip(weights, thresholds)]).cpu().double().numpy()
        costs = [self._cost(row) for row in counts]
        bits = weights[0].new_tensor(sum(bits for bits, _ in costs), dtype=torch.float32)
        rate: Tensor = _Rate.apply(bits, [price for _, price in costs], *weights, *thresholds)
        return rate

    def describe(self, latents: Latents, slot: Slot) -> Description:
        codes, step = self._codes(latents["weight"].detach(), latents["threshold"].detach())
        found = codes.flatten().cpu()
        if step is None:
            return sparse(found)
        return {"codes": Symbols(found.to(torch.int32).numpy()), "step": step.reshape(1).cpu().numpy()}

    def restore(self, description: Description, slot: Slot) -> Latents:
        if self.survivors != "float16":
            codes = symbols_in(description, "codes", slot.numel, -self._top, self._top)
            step = array_in(description, "step", 1, "float32")
            if step[0] < 0:
                raise FormatError("'step' is negative")
            return {"codes": torch.from_numpy(codes), "step": torch.from_numpy(step.copy())}
        return {"values": sparse_values(description, slot)}

    @property
    def _top(self) -> int:
        return 2 ** (int(self.survivors) - 1) - 1

    def _count(self, weight: Tensor, threshold: Tensor) -> Tensor:
        """How many weights are zero, and how many take each code (those in float16 are one code): int64."""
        if self.survivors == "float16":
            alive = (weight.float().abs() > threshold.sigmoid()).sum()
            return torch.stack([weight.numel() - alive, alive])
        codes, _ = self._codes(weight, threshold)
        counts = torch.bincount(codes.flatten().long() + self._top, minlength=2 * self._top + 1)
        return counts.roll(-self._top)

    def _cost(self, counts: NDArray[np.float64]) -> tuple[float, float]:
        """Bits of one weight with these counts, zeros first; and what one more survivor would add to them."""
        zeros, alive = float(counts[0]), float(counts[1:].sum())
        if self.survivors == "float16":
            each, more = 16.0, 0.0
        else:
            each, more = entropy(counts[1:]) / max(alive, 1), 32.0
        bits = entropy(np.array([zeros, alive])) + each * alive + more
        # where nearly all survive, one zero more would cost bits too: pruning has to begin all the same
        return bits, max(each + math.log2((zeros + 1) / (alive + 1)), 1.0)

    def _codes(self, weight: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is written down, float32 of the weight's shape, and the step of the grid.

        Without a grid (None) these are the weights themselves, in numbers that float16 has.
        """
        weight = weight.float()
        soft = (weight.abs() - threshold.sigmoid()).clamp_(min=0)
        if self.survivors == "float16":
            return soft.copysign_(weight).half().float().add_(0.0), None  # −0 + 0 = 0, as the file gives
        step = self._step(soft)
        codes = soft.div_(torch.where(step > 0, step, torch.inf)).ceil_().clamp_(max=self._top)
        return codes.copysign_(weight).add_(0.0), step

    def _step(self, soft: Tensor) -> Tensor:
        """Scalar, float32, from the sizes of the survivors."""
        if not soft.numel():
            return soft.new_zeros(())
        highest = soft.max()
        alive = soft.count_nonzero().clamp(min=1)
        mean = (soft / torch.where(highest > 0, highest, 1)).sum(dtype=torch.float64) / alive
        reach = (mean * (2 + 1.6 * math.log(self._top))).clamp(max=1).float() * highest
        # 8 bits of precision: whatever order the sum was taken in, the step is the same
        return (reach / self._top).to(torch.bfloat16).float()


def _dequantize(codes: Tensor, step: Tensor) -> Tensor:
    """±(q − ½) · step for a code ±q, 0 for 0. Two roundings on every machine: sums of halves are exact."""
    return (codes - 0.5 * codes.sign()) * step


def sparse(values: Tensor) -> Description:
    """Which of `values`, float32 numbers that float16 has, are not zero, and those."""
    found = values.flatten().cpu()
    survivors = found[found != 0].to(torch.float16).numpy()
    return {"alive": Symbols((found != 0).to(torch.int32).numpy()), "survivors": survivors}


def sparse_values(description: Description, slot: Slot) -> Tensor:
    """What `sparse` described: float32, flat. Raises FormatError."""
    alive = symbols_in(description, "alive", slot.numel, 0, 1).astype(bool)
    values = np.zeros(slot.numel, dtype=np.float32)
    values[alive] = array_in(description, "survivors", int(alive.sum()), "float16")
    return torch.from_numpy(values)


def entropy(counts: NDArray[np.float64]) -> float:
    """n · H of n symbols with these counts, in bits."""
    found = counts[counts > 0]
    return float(-(found * np.log2(found / found.sum())).sum())


class _SoftThreshold(torch.autograd.Function):
    """`value`, with the gradients of sign(w) · relu(|w| − g(s)). Only the latents themselves are kept for backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(weight, threshold)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, threshold = ctx.saved_tensors
        g = threshold.sigmoid()
        size = weight.float().abs()
        passed = _passes(size, g).to(gradient.dtype).mul_(gradient)
        slope = -g * (1 - g)
        return passed, slope * (passed * weight.sign()).sum(dtype=torch.float32), None


class _Rate(torch.autograd.Function):
    """`bits`, with the gradient of Σ price · Σ |w|^k / (|w|^k + g(s)^k); the outer sum is over the tensors."""

    @staticmethod
    def forward(ctx: Any, bits: Tensor, prices: list[float], *latents: Tensor) -> Tensor:
        ctx.save_for_backward(*latents)
        ctx.prices = prices
        return bits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        latents, count = ctx.saved_tensors, len(ctx.prices)
        pairs = [
            _soft_count(weight, threshold, gradient * price)
            for price, weight, threshold in zip(ctx.prices, latents[:count], latents[count:])
        ]
        return None, None, *(by_weight for by_weight, _ in pairs), *(by_threshold for _, by_threshold in pairs)


def _soft_count(weight: Tensor, threshold: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`scale` times the gradient of Σ |w|^k / (|w|^k + g(s)^k) in w and in s."""
    g, w = threshold.sigmoid(), weight.float()
    size = w.abs()
    ratio = (size / g).clamp_(1e-4, 1e4).square_().square_()  # ^k: pow_ takes ten times as long
    near = ratio.div_((ratio + 1).square_())  # p · (1 − p): of weights near the threshold
    by_threshold = -scale * _SHARPNESS * (1 - g) * near.sum()
    by_weight = near.mul_(w.sign()).mul_(scale * _SHARPNESS).div_(size.clamp_(min=torch.finfo(size.dtype).tiny))
    return by_weight.to(weight.dtype), by_threshold


def _passes(size: Tensor, g: Tensor) -> Tensor:
    """1 where |w| > g or w = 0, else 0: by signs, since comparing and choosing take several times as long on a CPU."""
    return (size - g).clamp_(min=0).sign_().sub_(size.sign()).add_(1)
