"""Soft threshold reparameterization: a learned threshold per tensor, below which weights are zero.

Kusupati, Ramanujan, Somani, Wortsman, Jain, Kakade, Farhadi, "Soft Threshold Weight Reparameterization for Learnable
Sparsity", ICML 2020, section 3: with g = sigmoid,

    ŵ = sign(w) · relu(|w| − g(s))
    ∂L/∂w = ∂L/∂ŵ · [ŵ ≠ 0],    ∂L/∂s = −g′(s) · Σᵢ ∂L/∂ŵᵢ · sign(wᵢ) · [ŵᵢ ≠ 0]

The paper lets weight decay pull s up from a start found by hand; here g(s) starts at a hundredth of the weights' size,
where its gradient is alive, and the rate in bits pulls it up, so that a target can say how far. Two more differences: a
weight of exactly 0 gets its gradient too, or a tensor that starts at zero (the last of a residual branch) stays there;
and the rate leaves alone what has become much sparser than the rest, or whole tensors would come to nothing.
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
from hfcompress.together import batches, joined, parted, spread, sums

_LEAST = 0.2  # of the density of all tensors, that each one keeps
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
        super().__post_init__()

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
        return self.decode_group([(latents, slot)], hard=hard)[0]

    def decode_group(self, members: Sequence[tuple[Latents, Slot]], *, hard: bool) -> Sequence[Tensor]:
        weights, thresholds = ([latents[name] for latents, _ in members] for name in ("weight", "threshold"))
        with torch.no_grad():
            codes, step = self._codes(weights, thresholds)
            value = codes if step is None else _dequantize(codes, spread(step, [w.numel() for w in weights]))
        decoded: tuple[Tensor, ...] = _SoftThreshold.apply(value.to(weights[0].dtype), *weights, *thresholds)
        return decoded

    def rate(self, latents: Latents, slot: Slot) -> Tensor:
        return self.rate_of_group([(latents, slot)])

    def rate_of_group(self, members: Sequence[tuple[Latents, Slot]]) -> Tensor:
        """What is counted of all slots is read from the device at once; no slot is made much sparser than all are."""
        weights, thresholds = ([latents[name] for latents, _ in members] for name in ("weight", "threshold"))
        pairs = list(zip(weights, thresholds))
        with torch.no_grad():
            found = [self._count(*zip(*batch)) for batch in batches(pairs, lambda pair: pair[0])]
        counts = torch.cat(found).cpu().double().numpy()
        costs = [self._cost(row) for row in counts]
        bits = weights[0].new_tensor(sum(bits for bits, _ in costs), dtype=torch.float32)
        prices = [(price, price * factor) for (_, price), factor in zip(costs, _kept_alive(counts))]
        rate: Tensor = _Rate.apply(bits, prices, *weights, *thresholds)
        return rate

    def describe(self, latents: Latents, slot: Slot) -> Description:
        codes, step = self._codes([latents["weight"].detach()], [latents["threshold"].detach()])
        found = codes.cpu()
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

    def _count(self, weights: Sequence[Tensor], thresholds: Sequence[Tensor]) -> Tensor:
        """How many weights are zero, and how many take each code (those in float16 are one code): int64 [N, codes]."""
        counts = [weight.numel() for weight in weights]
        if self.survivors == "float16":
            size = joined(weights).float().abs()
            alive = torch.stack([part.sum() for part in (size > _sizes(thresholds, counts)).split(counts)])
            return torch.stack([torch.tensor(counts, device=alive.device) - alive, alive], 1)
        codes, _ = self._codes(weights, thresholds)
        kinds = 2 * self._top + 1
        firsts = torch.arange(self._top, len(counts) * kinds, kinds, device=codes.device)
        found = torch.bincount(codes.long() + spread(firsts, counts), minlength=len(counts) * kinds)
        return found.view(len(counts), kinds).roll(-self._top, 1)

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

    def _codes(self, weights: Sequence[Tensor], thresholds: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """What is written down of N tensors, float32 [n], and the steps of their grids, [N].

        Without a grid (None) these are the weights themselves, in numbers that float16 has.
        """
        weight, counts = joined(weights).float(), [weight.numel() for weight in weights]
        soft = (weight.abs() - _sizes(thresholds, counts)).clamp_(min=0)
        if self.survivors == "float16":
            return soft.copysign_(weight).half().float().add_(0.0), None  # −0 + 0 = 0, as the file gives
        step = self._steps(soft, counts)
        codes = soft.div_(spread(torch.where(step > 0, step, torch.inf), counts)).ceil_().clamp_(max=self._top)
        return codes.copysign_(weight).add_(0.0), step

    def _steps(self, soft: Tensor, counts: Sequence[int]) -> Tensor:
        """Float32 [N], from the sizes of the survivors."""
        if not soft.numel():
            return soft.new_zeros(1)
        parts = soft.split(list(counts))
        highest = torch.stack([part.max() for part in parts])
        alive = torch.stack([part.count_nonzero() for part in parts]).clamp(min=1)
        shares = soft / spread(torch.where(highest > 0, highest, 1), counts)
        mean = torch.stack([part.sum(dtype=torch.float64) for part in shares.split(list(counts))]) / alive
        reach = (mean * (2 + 1.6 * math.log(self._top))).clamp(max=1).float() * highest
        # 8 bits of precision: whatever order the sum was taken in, the step is the same
        return (reach / self._top).to(torch.bfloat16).float()


def _thresholds(found: Sequence[Tensor]) -> Tensor:
    """g(s), float32 [N]; worked out in double precision, whose last digit depends on N where vectors end."""
    return torch.stack(tuple(found)).double().sigmoid().float()


def _sizes(thresholds: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """g(s) of each weight."""
    return spread(_thresholds(thresholds), counts)


def _kept_alive(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the price of a survivor is multiplied by in each tensor, given its zeros and its codes [N, codes].

    A tensor that comes to nothing takes its network's gradient with it, and cannot come back. So the price falls from
    where a tensor has twice `_LEAST` of the density of all tensors, is 0 at `_LEAST`, and below it pays for survivors.
    """
    alive, numbers = counts[:, 1:].sum(1), counts.sum(1)
    least = _LEAST * alive.sum() / max(numbers.sum(), 1)
    own = alive / np.maximum(numbers, 1)
    return np.clip(own / max(least, 1e-12) - 1, -1, 1)


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
    def forward(ctx: Any, value: Tensor, *latents: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*latents)
        return parted(value, latents[: len(latents) // 2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weights, thresholds = ctx.saved_tensors[: len(gradients)], ctx.saved_tensors[len(gradients) :]
        weight, counts = joined(weights), [weight.numel() for weight in weights]
        g = _thresholds(thresholds)
        gradient = joined(gradients)
        passed = _passes(weight.float().abs(), spread(g, counts)).to(gradient.dtype).mul_(gradient)
        of_thresholds = -g * (1 - g) * sums(passed * weight.sign(), counts)
        return None, *parted(passed, weights), *of_thresholds


class _Rate(torch.autograd.Function):
    """`bits`, with the gradient of Σ price · Σ |w|^k / (|w|^k + g(s)^k); the outer sum is over the tensors."""

    @staticmethod
    def forward(ctx: Any, bits: Tensor, prices: list[tuple[float, float]], *latents: Tensor) -> Tensor:
        ctx.save_for_backward(*latents)
        ctx.prices = prices
        return bits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.prices)
        weights, g = ctx.saved_tensors[:count], _thresholds(ctx.saved_tensors[count:])
        grow, shrink = gradients[0].new_tensor(ctx.prices).unbind(1)
        scale = gradients[0] * torch.where(gradients[0] > 0, shrink, grow) * _SHARPNESS
        of_weights: list[Tensor] = []
        nears: list[Tensor] = []
        for batch in batches(list(enumerate(weights)), lambda found: found[1]):
            alike, mine = [weight for _, weight in batch], slice(batch[0][0], batch[-1][0] + 1)
            slopes, near = _soft_counts(alike, g[mine], scale[mine])
            of_weights += parted(slopes, alike)
            nears.append(near)
        return None, None, *of_weights, *(-scale * (1 - g) * torch.cat(nears))


def _soft_counts(weights: Sequence[Tensor], g: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of each Σ p, where p = |w|^k / (|w|^k + g^k): the slopes in all w [n], times scale [N] / k; Σ p (1 − p) [N]."""
    weight, counts = joined(weights), [weight.numel() for weight in weights]
    w = weight.float()
    size = w.abs()
    ratio = (size / spread(g, counts)).clamp_(1e-4, 1e4).square_().square_()  # ^k: pow_ takes ten times as long
    near = ratio.div_((ratio + 1).square_())  # p · (1 − p): of weights near the threshold
    found = sums(near, counts)
    slope = near.mul_(w.sign()).mul_(spread(scale, counts)).div_(size.clamp_(min=torch.finfo(size.dtype).tiny))
    return slope.to(weight.dtype), found


def _passes(size: Tensor, g: Tensor) -> Tensor:
    """1 where |w| > g or w = 0, else 0: by signs, since comparing and choosing take several times as long on a CPU."""
    return (size - g).clamp_(min=0).sign_().sub_(size.sign()).add_(1)
