"""Points learned for every tensor while its weights stay as they are: differentiable quantization.

Polino, Pascanu, Alistarh, "Model compression via distillation and quantization", ICLR 2018, section 4 and algorithm 2.
A weight is flattened and cut into buckets of `bucket` elements; with low and span the least weight of a bucket and the
distance to its greatest one, x = (w − low) / span lies in [0, 1]. Of the tensor's points p₁ … p_m, which all its
buckets share, every weight takes the nearest:

    code(w) = argmin_j |x − p_j|,   ŵ = low + span · p_code,   ∂loss/∂p_j = Σ over {w : code(w) = j} of span · ∂loss/∂ŵ

Only the points are trained, and sorted anew at every decode, wherever the optimizer leaves them. The paper starts them
at the quantiles of x, the least and the greatest included; here Lloyd's iteration moves them on from there to where
Σ (ŵ − w)² is least, which is worth more than the training where points are few. `low`, `span` and the points are
rounded to the precision in which the file keeps them *before* codes are chosen. Batch-norm statistics follow by
themselves, as the paper's do: the network trains in train mode on the quantized weights, and they are written as they
are then.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from hfcompress.coding import Symbols
from hfcompress.errors import ConfigError, FormatError
from hfcompress.reparameterization import Description, Latents, Reparameterization, Slot, array_in, symbols_in
from hfcompress.rounding import all_extremes, all_from_buckets, all_to_buckets, cast_through, rooms, to_buckets
from hfcompress.together import joined, spread

LEAST, MOST = 2, 256
"""How many points a tensor may have."""
_SCALES = {"float16": torch.float16, "float32": torch.float32}
CELLS = 4096
"""Of the table in which a CPU looks up many values."""
_SAMPLE = 1 << 18
_ROUNDS = 50


@dataclass(frozen=True)
class Levels(Reparameterization):
    """`points` learned points for each tensor, scaled to each bucket of `bucket` weights (None: the whole tensor).

    Rate: log2(points) · n + 2 scales a bucket + the points, in bits; the entropy coder only takes away from it.
    `start`: points nearest to the weights, at the quantiles of the scaled weights (the paper), or evenly spaced (the
    paper's ablation). `scales`: the format of low, span and points; float16 reaches from 6e-8 to 65,504.

    Latents: `weight`, a constant; `points` [points], scaled coordinates in units of 1 / (points − 1), so that one
    learning rate suits few points and many. Start from trained weights: only the points change.

    Raises ConfigError: points outside 2 … 256, bucket < 1.
    """

    points: int = 16
    bucket: int | None = 256
    start: Literal["nearest", "quantile", "uniform"] = "nearest"
    scales: Literal["float16", "float32"] = "float16"

    frozen: ClassVar[frozenset[str]] = frozenset({"weight"})
    auxiliary: ClassVar[Mapping[str, float]] = MappingProxyType({"points": 1e-3})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not LEAST <= self.points <= MOST:
            raise ConfigError(f"levels: points must be {LEAST} to {MOST}, found {self.points}")
        if self.bucket is not None and self.bucket < 1:
            raise ConfigError(f"levels: bucket must be at least 1, or null for the whole tensor, found {self.bucket}")

    def init(self, weight: Tensor, slot: Slot) -> Latents:
        detached = weight.detach()
        even = torch.linspace(0, 1, self._points(slot), device=weight.device)
        if self.start == "uniform" or not slot.numel:
            return {"weight": detached.clone(), "points": even * (self.points - 1)}
        x, _, span = self._scaled([detached])
        flat = x.flatten()[: slot.numel]
        points = _quantiles(flat, even)
        if self.start == "nearest":
            points = _lloyd(flat, span.expand_as(x).flatten()[: slot.numel], points)
        return {"weight": detached.clone(), "points": points * (self.points - 1)}

    def decode(self, latents: Latents, slot: Slot, *, hard: bool) -> Tensor:
        if "codes" in latents:
            return self._weights(latents["codes"], latents["codebook"], latents["low"], latents["span"], [slot])[0]
        return self.decode_group([(latents, slot)], hard=hard)[0]

    def decode_group(self, members: Sequence[tuple[Latents, Slot]], *, hard: bool) -> Sequence[Tensor]:
        weights = [latents["weight"].detach() for latents, _ in members]
        slots = [slot for _, slot in members]
        points = self._codebook([latents["points"] for latents, _ in members])
        with torch.no_grad():
            x, low, span = self._scaled(weights)
            codes = self._nearest(x, points, slots)
        decoded: tuple[Tensor, ...] = _Take.apply(points, codes, low, span, self, slots, weights[0].dtype)
        return decoded

    def rate(self, latents: Latents, slot: Slot) -> Tensor:
        numbers = 2 * self._buckets(slot) + self._points(slot)
        bits = slot.numel * np.log2(self.points) + 8 * _SCALES[self.scales].itemsize * numbers
        return latents["points"].new_tensor(bits, dtype=torch.float32)

    def describe(self, latents: Latents, slot: Slot) -> Description:
        points = self._codebook([latents["points"].detach()]).flatten()
        x, low, span = self._scaled([latents["weight"].detach()])
        codes = nearest(x, points).flatten()[: slot.numel]
        arrays = {"points": points, "low": low.flatten(), "span": span.flatten()}
        stored = {name: array.to(_SCALES[self.scales]).cpu().numpy() for name, array in arrays.items()}
        return {"codes": Symbols(codes.to(torch.int32).cpu().numpy()), **stored}

    def restore(self, description: Description, slot: Slot) -> Latents:
        codes = symbols_in(description, "codes", slot.numel, 0, self.points - 1)
        counts = {"points": self._points(slot), "low": self._buckets(slot), "span": self._buckets(slot)}
        points, low, span = (
            array_in(description, name, n, self.scales).astype(np.float32) for name, n in counts.items()
        )
        if (span <= 0).any():
            raise FormatError("'span' holds numbers that are not positive")
        return {
            "codes": to_buckets(torch.from_numpy(codes), self.bucket),
            "codebook": torch.from_numpy(points),
            "low": torch.from_numpy(low).unsqueeze(1),
            "span": torch.from_numpy(span).unsqueeze(1),
        }

    def _points(self, slot: Slot) -> int:
        return self.points if slot.numel else 0

    def _buckets(self, slot: Slot) -> int:
        return -(-slot.numel // (self.bucket or max(slot.numel, 1)))

    def _codebook(self, points: Sequence[Tensor]) -> Tensor:
        """[tensors, points], sorted, and rounded to what the file keeps; differentiable."""
        stacked = torch.stack(tuple(points)).float()
        return cast_through(stacked.sort(-1).values / (self.points - 1), _SCALES[self.scales])

    def _scaled(self, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [buckets, bucket], low [buckets, 1], span [buckets, 1], all float32; the span of equal weights is 1.

        Of several whole tensors [n, 1] each.
        """
        rows = all_to_buckets(weights, self.bucket).float()
        if rows.numel() == 0:
            return rows, rows.new_zeros(0, 1), rows.new_zeros(0, 1)
        scale = _SCALES[self.scales]
        low, high = all_extremes(rows, weights, self.bucket)
        low = low.to(scale).float()
        span = (high - low).to(scale).float()
        span = torch.where(span > 0, span, 1.0)
        return (rows - low).div_(span), low, span

    def _nearest(self, x: Tensor, points: Tensor, slots: Sequence[Slot]) -> Tensor:
        """Each tensor's by itself: what `nearest` searches is its own."""
        parts = x.view(-1).split(self._rooms(slots))
        codes = [_between(part, middles) for part, middles in zip(parts, _middles(points))]
        return joined(codes).view(x.shape)

    def _rooms(self, slots: Sequence[Slot]) -> list[int]:
        return rooms([slot.numel for slot in slots], self.bucket)

    def _weights(self, codes: Tensor, points: Tensor, low: Tensor, span: Tensor, slots: Sequence[Slot]) -> list[Tensor]:
        taken = points.view(-1).index_select(0, self._flat(codes, slots).view(-1)).view(codes.shape)
        # two kernels on purpose: a fused multiply-add would round once instead of twice, and differ between machines
        return all_from_buckets(taken.mul_(span).add_(low), [slot.shape for slot in slots], self.bucket)

    def _flat(self, codes: Tensor, slots: Sequence[Slot]) -> Tensor:
        """Codes counted through the points of all slots."""
        if len(slots) == 1:
            return codes
        firsts = torch.arange(0, len(slots) * self.points, self.points, device=codes.device, dtype=torch.int32)
        rows = [room // codes.shape[1] for room in self._rooms(slots)]
        return codes + spread(firsts, rows).unsqueeze(1)


def redistribute(norms: Mapping[str, float], points: Mapping[str, int]) -> dict[str, int]:
    """How many points each tensor gets when all of `points` are shared out anew, more where gradients are larger.

    The paper's section 4 and its code: a tensor keeps ⌊m / 2⌋ of its m points, what is left over goes to the tensors in
    proportion to the norms of their gradients, rounded; what rounding gave too much is taken from the tensor that has
    most, what is lacking is given to the one that has least. Here one point at a time, and no tensor gets fewer than 2
    points or more than 256. The sum stays the same; where all norms are 0, so do the points.

    Raises ConfigError: a tensor without a norm, a norm that is negative or not finite, points outside 2 … 256.
    """
    for name, count in points.items():
        if not (name in norms and math.isfinite(norms[name]) and norms[name] >= 0):
            raise ConfigError(f"levels: {name} needs a finite norm of its gradient, found {norms.get(name)}")
        if not LEAST <= count <= MOST:
            raise ConfigError(f"levels: points must be {LEAST} to {MOST}, found {count} for {name}")
    whole = sum(norms[name] for name in points)
    if whole == 0:
        return dict(points)
    rest = sum(count - count // 2 for count in points.values())
    shares = {name: count // 2 + round(norms[name] / whole * rest) for name, count in points.items()}
    shares = {name: min(max(count, LEAST), MOST) for name, count in shares.items()}
    while surplus := sum(shares.values()) - sum(points.values()):
        picked = (max if surplus > 0 else min)(shares, key=shares.__getitem__)
        shares[picked] -= 1 if surplus > 0 else -1
    return shares


def nearest(x: Tensor, points: Tensor) -> Tensor:
    """The index of the point nearest to each of `x`, int32 of x's shape; half-way, the lower one.

    points: float32 [m ≥ 1], sorted. Found by binary search among the m − 1 middles between neighbours; on the CPU many
    values are first looked up in a table of cells of [0, 1], and then compared with the middles that share their cell.
    """
    return _between(x, _middles(points))


def _middles(points: Tensor) -> Tensor:
    return (points[..., 1:] + points[..., :-1]) / 2


def _between(x: Tensor, middles: Tensor) -> Tensor:
    if x.is_cuda or x.numel() <= CELLS:
        return torch.bucketize(x, middles, out_int32=True)

    def cell(values: Tensor) -> Tensor:  # does not decrease where `values` do not
        return values.mul(CELLS).clamp_(0, CELLS - 1).to(torch.int32)

    inside = torch.bincount(cell(middles), minlength=CELLS)
    below = (inside.cumsum(0) - inside).to(torch.int32)
    flat = x.reshape(-1)
    codes = below.index_select(0, cell(flat))
    ceilings = torch.cat([middles, middles.new_full((1,), torch.inf)])
    for _ in range(int(inside.max())):
        codes += flat > ceilings.index_select(0, codes)
    return codes.view(x.shape)


class _Take(torch.autograd.Function):
    """The point that every weight took, scaled; the gradient of a point is gathered from the weights that took it."""

    @staticmethod
    def forward(
        ctx: Any,
        points: Tensor,
        codes: Tensor,
        low: Tensor,
        span: Tensor,
        method: Levels,
        slots: Sequence[Slot],
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(codes.to(torch.uint8), span)  # up to 256 points: a byte a weight waits for the gradient
        ctx.method, ctx.slots, ctx.points = method, slots, points.shape
        return tuple(part.to(dtype) for part in method._weights(codes, points, low, span, slots))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, span = ctx.saved_tensors
        padded: list[Tensor] = []  # padding has no gradient
        for gradient, room in zip(gradients, ctx.method._rooms(ctx.slots)):
            padded += gradient.reshape(-1), gradient.new_zeros(room - gradient.numel())
        scaled = torch.cat(padded).float().view(codes.shape).mul_(span)
        taken = ctx.method._flat(codes, ctx.slots)
        sums = torch.bincount(taken.view(-1), scaled.view(-1), minlength=ctx.points.numel())
        return sums.to(torch.float32).view(ctx.points), *(None for _ in range(6))


def _quantiles(x: Tensor, at: Tensor) -> Tensor:
    """Of x [n ≥ 1] at the fractions `at` of the way from the least to the greatest, linear between neighbours."""
    ordered = x.sort().values
    position = at.double() * (x.numel() - 1)
    below = position.long()
    above = (below + 1).clamp(max=x.numel() - 1)
    return torch.lerp(ordered[below].double(), ordered[above].double(), position - below).float()


def _lloyd(x: Tensor, span: Tensor, points: Tensor) -> Tensor:
    """Sorted points [m] for which Σ (span · (x − nearest point))² is least, near to where `points` are.

    x, span: [n]; of very many weights a fixed sample.
    """
    stride = -(-x.numel() // _SAMPLE)
    x, weight = x[::stride], span[::stride].double().square()
    weighted = weight * x
    for _ in range(_ROUNDS):
        codes = nearest(x, points)
        masses, sums = (torch.bincount(codes, each, minlength=points.numel()) for each in (weight, weighted))
        moved = torch.where(masses > 0, sums / masses, points.double()).float().sort().values
        if (moved - points).abs().max() < 1e-4 / points.numel():
            break
        points = moved
    return points
