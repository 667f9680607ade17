"""Entropy-penalised reparameterization: weights as integers on learned grids, their code length part of the loss.

Oktay, Ballé, Singh, Shrivastava, "Scalable model compression by entropy penalized reparameterization", ICLR 2020. With
latents φ, a step Δ = exp(log_step) per weight tensor and a probability model p shared by the tensors of one rule,

    ŵ = Δ · round(φ / Δ),        loss = task(ŵ) + rate_weight / parameters · Σ E[−log2 p(φ / Δ + u)],  u ~ U(−½, ½).

Rounding is straight through for the task; φ, Δ and p are learned together. `dft`: φ holds the real discrete Fourier
transform of each H×W slice of a convolution kernel, with a step for each of its H·W coefficients.

Where the code differs. φ is kept in the weights' own unit, not the step's, so that the learning rates and weight decay
that suit the weights suit it, and a change of Δ does not move the weights. There is no shift: 0 is a code. The
expectation over u is computed instead of sampled (`density.py`). The transform is orthonormal and real, without
redundant coefficients. What `rate` returns is the code length of the rounded latents, which is what a file costs, with
the gradient of the noisy one: near the end of training many latents drift about within ±½ of zero, and the noisy value
is two to three times the file. The probability model itself is not in the file: the coder counts its tables anew.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, repeat
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hfcompress.coding import Symbols
from hfcompress.density import Family, Table, code_length, pieces, slopes_, start, tabulate
from hfcompress.dependent import dependent_codes
from hfcompress.errors import ConfigError, FormatError
from hfcompress.fourier import real_dft
from hfcompress.reparameterization import Description, Latents, Reparameterization, Slot, array_in, symbols_in
from hfcompress.together import batches, joined, parted, spread, sums

LIMIT = 32_767
"""Codes go from −LIMIT to LIMIT, an alphabet that the coder takes; what lies beyond is clamped."""
_LARGEST_KERNEL = 64
_STEP_AT_ZERO = 2**-7
_STEP_RANGE = 2.0**-126, 2.0**126  # positive and finite in bfloat16


@dataclass(frozen=True)
class EntropyPenalized(Reparameterization):
    """Integers times a learned step; their entropy falls as far as `rate_weight` makes it.

    Rate: bits of the integers under a `prior` shared by the rule's weights, and 16 bits a step. `prior`: "factorized",
    the density of Ballé et al. (43 parameters, any shape of distribution), or a one-parameter "logistic" or "laplace",
    for rules that claim few weights. `transform`: "dft" gives the kernels of two-dimensional convolutions, up to 64
    taps, a step per frequency; other weights have one step. `step`: the first step, relative to the weight's root mean
    square; at 1/8 rounding adds an error of 0.13 % of the weight's power, and weights start at about 5 bits.

    The step is rounded to bfloat16 before the integers are chosen, so that the weights trained are the weights shipped.

    Raises ConfigError: a step outside 1/64 … 1; above, every weight would start as zero and learn from nothing.
    """

    transform: Literal["none", "dft"] = "none"
    prior: Family = "factorized"
    step: float = 1 / 8

    shared: ClassVar[frozenset[str]] = frozenset({"prior"})
    decayed: ClassVar[frozenset[str]] = frozenset({"weight"})
    auxiliary: ClassVar[Mapping[str, float]] = MappingProxyType({"log_step": 1e-2, "prior": 1e-2})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 / 64 <= self.step <= 1:
            raise ConfigError(
                f"entropypenalized: step is relative to the weights' size and must be 1/64 to 1, found {self.step}"
            )

    def init(self, weight: Tensor, slot: Slot) -> Latents:
        latent = weight.detach().clone(memory_format=torch.contiguous_format)
        basis = self._basis(slot, weight.device)
        if basis is not None:
            latent = (latent.float().view(-1, len(basis)) @ basis.T).to(weight.dtype).view(slot.shape)
        return {
            "weight": latent,
            "log_step": torch.full((self._steps(slot),), math.log(self._first_step(latent)), device=weight.device),
            "prior": start(self.prior, 1 / self.step).to(weight.device),
        }

    def decode(self, latents: Latents, slot: Slot, *, hard: bool) -> Tensor:
        codes = latents.get("codes")
        if codes is not None:
            return _from_codes(codes.float(), latents["step"], self._basis(slot, codes.device)).view(slot.shape)
        return self.decode_group([(latents, slot)], hard=hard)[0]

    def decode_group(self, members: Sequence[tuple[Latents, Slot]], *, hard: bool) -> Sequence[Tensor]:
        bases = [self._basis(slot, latents["weight"].device) for latents, slot in members]
        decoded: dict[int, Tensor] = {}
        for basis in {id(found): found for found in bases}.values():
            places = [place for place, found in enumerate(bases) if found is basis]
            weights, log_steps = ([members[place][0][name] for place in places] for name in ("weight", "log_step"))
            decoded |= zip(places, _Decode.apply(basis, *weights, *log_steps))
        return [decoded[place] for place in range(len(members))]

    def rate(self, latents: Latents, slot: Slot) -> Tensor:
        return self.rate_of_group([(latents, slot)])

    def rate_of_group(self, members: Sequence[tuple[Latents, Slot]]) -> Tensor:
        """One look-up for all slots. Latents that are not finite give NaN."""
        weights, log_steps = ([latents[name] for latents, _ in members] for name in ("weight", "log_step"))
        prior = members[0][0]["prior"]
        z = _in_steps(weights, log_steps)
        furthest = torch.linalg.vector_norm(z, math.inf).item() if z.numel() else 0.0
        if not math.isfinite(furthest):
            return prior.sum() * math.nan
        table = tabulate(self.prior, prior, furthest)
        noisy, rounded = code_length(z, table)
        bits = noisy + (rounded - noisy).detach() + 16.0 * sum(len(log_step) for log_step in log_steps)
        linked: Tensor = _RateOf.apply(bits, table, *weights, *log_steps)
        return linked

    def describe(self, latents: Latents, slot: Slot) -> Description:
        step = _step(latents["log_step"].detach())
        codes = _codes(latents["weight"].detach(), step).to(torch.int32)
        return {
            "codes": Symbols(codes.flatten().cpu().numpy()),
            "step": step.to(torch.bfloat16).view(torch.int16).cpu().numpy(),  # numpy has no bfloat16
        }

    def restore(self, description: Description, slot: Slot) -> Latents:
        codes = symbols_in(description, "codes", slot.numel, -LIMIT, LIMIT)
        raw = array_in(description, "step", self._steps(slot), "int16")
        step = torch.from_numpy(raw.copy()).view(torch.bfloat16).float()
        if not ((step >= _STEP_RANGE[0]) & (step <= _STEP_RANGE[1])).all():
            raise FormatError("'step' holds numbers that are not positive and finite")
        return {"codes": torch.from_numpy(codes).view(-1, len(step)), "step": step}

    def on_dependent_grid(self, latents: Latents, step: float) -> Latents:
        """For weights that are stored without training: latents on a grid of which a trellis opens every other point.

        step: the distance of open points, relative to the weights' size. They are near `latents` as `init` gives them;
        which of them, the bits decide too (`dependent`). Float32, which holds step · code exactly.
        """
        least = latents["weight"].detach().abs().max().double() / LIMIT
        log_step = torch.maximum(latents["log_step"].detach() + math.log(step / 2 / self.step), least.log().float())
        grid = _step(log_step)
        places = (latents["weight"].detach().float().view(-1, len(grid)) / grid).flatten()
        codes = torch.from_numpy(dependent_codes(places.cpu().numpy(), LIMIT)).to(places.device)
        weight = (codes.view(-1, len(grid)) * grid).view(latents["weight"].shape)
        return {**latents, "weight": weight, "log_step": log_step}

    def _basis(self, slot: Slot, device: torch.device) -> Tensor | None:
        """[H·W, H·W], or None where a slot is not transformed."""
        if self.transform == "none" or len(slot.shape) != 4 or not 1 < slot.shape[2] * slot.shape[3] <= _LARGEST_KERNEL:
            return None
        return real_dft(slot.shape[2], slot.shape[3], device)

    def _steps(self, slot: Slot) -> int:
        basis = self._basis(slot, torch.device("cpu"))
        return 1 if basis is None else len(basis)

    def _first_step(self, weight: Tensor) -> float:
        """Such that every weight has a code; the same for all frequencies, since the transform is orthonormal."""
        most = weight.abs().max().item() if weight.numel() else 0.0
        if most == 0:
            return _STEP_AT_ZERO
        root_mean_square = most * (weight.double() / most).square().mean().sqrt().item()
        return max(self.step * root_mean_square, most / LIMIT, _STEP_RANGE[0])


class _Decode(torch.autograd.Function):
    """ŵ = Δ · round(φ / Δ), transformed back.

    Gradients: of φ, straight through; of log Δ, Δ · Σ gradient · (code − φ / Δ), as in Esser et al., "Learned step size
    quantization", ICLR 2020. Only φ and log Δ are kept for them: codes are cheaper to compute again than to hold.
    """

    @staticmethod
    def forward(ctx: Any, basis: Tensor | None, *latents: Tensor) -> tuple[Tensor, ...]:
        weights, step, counts = _halves(latents)
        ctx.save_for_backward(*latents)
        ctx.basis = basis
        step = spread(step, counts)
        decoded = _from_codes(_codes(joined(weights), step), step, basis)
        return parted(decoded.to(weights[0].dtype), weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weights, step, counts = _halves(ctx.saved_tensors)
        gradient = joined(gradients).view(-1, step.shape[1])
        if ctx.basis is not None:
            gradient = (gradient.float() @ ctx.basis.T).to(weights[0].dtype)
        latent = joined(weights).view(gradient.shape)
        total = torch.zeros_like(step)
        if len(counts) == 1:
            for z, g in zip(pieces(latent), pieces(gradient)):
                total += _off_grid(z, step).mul_(g).sum(0)
        else:
            total += sums(_off_grid(latent, spread(step, counts)).mul_(gradient), counts)
        return None, *parted(gradient, weights), *(total * step)


class _RateOf(torch.autograd.Function):
    """`bits`, whose slope at each latent the table has. Looked up once more in backward, sooner than held till then."""

    @staticmethod
    def forward(ctx: Any, bits: Tensor, table: Table, *latents: Tensor) -> Tensor:
        ctx.table = table
        ctx.save_for_backward(*latents)
        return bits.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        latents = ctx.saved_tensors
        weights, log_steps = latents[: len(latents) // 2], latents[len(latents) // 2 :]
        z = _in_steps(weights, log_steps)
        slopes_(z, ctx.table)
        of_weights: list[Tensor] = []
        of_steps: list[Tensor] = []
        for alike, step, counts, slopes in _runs(weights, log_steps, z):
            factor, latent = gradients[0] / step, joined(alike).view(slopes.shape)
            total = torch.zeros_like(factor)
            if len(counts) == 1:
                for slope, w in zip(pieces(slopes), pieces(latent)):
                    total -= slope.mul_(factor).mul(w).sum(0)
            else:
                total -= sums(slopes.mul_(spread(factor, counts)) * latent, counts)
            most = torch.finfo(latent.dtype).max  # bits per unit of a small weight may be beyond float16
            of_weights += parted(slopes.clamp_(-most, most).to(latent.dtype), alike)
            of_steps += total
        return gradients[0], None, *of_weights, *of_steps


def _runs(
    weights: Sequence[Tensor], log_steps: Sequence[Tensor], z: Tensor
) -> Iterator[tuple[Sequence[Tensor], Tensor, list[int], Tensor]]:
    """What is worked on together: N weights with k steps each; steps [N, k]; rows of each; their part of z [n, k]."""
    used = 0
    for batch in batches(list(zip(weights, log_steps)), lambda pair: pair[0]):
        for k, run in groupby(batch, lambda pair: len(pair[1])):
            alike, steps = zip(*run)
            counts = [weight.numel() // k for weight in alike]
            yield alike, _step(torch.stack(steps)), counts, z[used : used + k * sum(counts)].view(-1, k)
            used += k * sum(counts)


def _halves(latents: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor, list[int]]:
    """Of N weights followed by their log steps: the weights; steps [N, k]; rows of each."""
    weights, log_steps = latents[: len(latents) // 2], latents[len(latents) // 2 :]
    step = _step(torch.stack(tuple(log_steps)))
    return weights, step, [weight.numel() // step.shape[1] for weight in weights]


def _off_grid(latent: Tensor, step: Tensor) -> Tensor:
    """round(φ / Δ) − φ / Δ of [n, k]."""
    z = (latent / step).clamp_(-LIMIT, LIMIT)
    return torch.round(z).sub_(z)


def _in_steps(weights: Sequence[Tensor], log_steps: Sequence[Tensor]) -> Tensor:
    """φ / Δ of all slots, float32, one after the other."""
    z = torch.empty(sum(weight.numel() for weight in weights), device=log_steps[0].device)
    for alike, step, counts, part in _runs(weights, log_steps, z):
        torch.div(joined(alike).detach().view(part.shape), spread(step.detach(), counts), out=part)
    return z


def _step(log_step: Tensor) -> Tensor:
    """As the file keeps it: bfloat16, whose 8 binary digits make step · code exact in float32.

    In double precision: the last digit of a float32 exponential may depend on how many are worked out at once.
    """
    return log_step.double().exp().clamp(*_STEP_RANGE).to(torch.bfloat16).float()


def _codes(weight: Tensor, step: Tensor) -> Tensor:
    """Integers in float32, [n, k], of weights and steps, [k] or [n, k]."""
    latent = weight.view(-1, step.shape[-1])
    codes = torch.empty(latent.shape, device=weight.device)
    for w, code, beside in zip(pieces(latent), pieces(codes), _beside(step, codes)):
        torch.div(w, beside, out=code).clamp_(-LIMIT, LIMIT).round_()
    return codes


def _from_codes(codes: Tensor, step: Tensor, basis: Tensor | None) -> Tensor:
    """The weights [n, k] of `codes`, which are overwritten: the same to the last bit on every machine."""
    for code, beside in zip(pieces(codes), _beside(step, codes)):
        code.mul_(beside).add_(0.0)  # −0 becomes 0, which is what a file holds
    if basis is None:
        return codes
    rows = codes.t().contiguous()
    # a matrix product may sum in any order and fuse; here each addition and each product rounds once, in this order
    total, term = torch.zeros_like(rows), torch.empty_like(rows)
    for frequency, coefficients in zip(basis, rows):
        total += torch.mul(frequency.unsqueeze(1), coefficients, out=term)
    return total.t().contiguous()


def _beside(step: Tensor, rows: Tensor) -> Iterable[Tensor]:
    """The steps of each of the pieces of `rows`."""
    return pieces(step) if step.shape == rows.shape else repeat(step)
