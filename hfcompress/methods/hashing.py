"""All weights of a rule cut from one matrix of low rank: structured multi-hashing.

Eban, Movshovitz-Attias, Wu, Sandler, Poon, Idelbayev, Carreira-Perpiñán, "Structured Multi-Hashing for Model
Compression", CVPR 2020, section 3 and equation 4. The N weights of a rule lie one after another, row-major, in a matrix
of side n = ⌈√N⌉ that is never stored; tensors may end in the middle of a row. With M the rank,

    W = L · R,   L: [n, M],   R: [M, n],   ŵ = gain · deviation · (this tensor's elements of W)

so 2·M·n numbers stand for N, and M = ⌈fraction · N / 2n⌉. Entries of L and R are drawn from N(0, M^−½) (variance),
which gives W a variance of 1; `deviation` is the root mean square of the weight at the start, `gain` is learned for
every tensor (the paper's "learnable scale"). Norms do not belong here, and biases only with reason: give a rule the
kinds conv, linear and embedding.

What the paper does not do: the file keeps L and R as integers of `bits` bits, trained straight through, with one
amplitude for every row of L and every column of R. The integers are small enough for every partial sum of a product to
be an integer that the floating-point type holds exactly; hence the sum does not depend on its order, and every machine
and every number of threads decodes the same weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hfcompress.coding import Symbols
from hfcompress.errors import ConfigError, FormatError
from hfcompress.reparameterization import Description, Latents, Reparameterization, Slot, array_in, symbols_in
from hfcompress.together import spread, sums

_AMPLITUDE_BITS = 16
_SCALE_BITS = 32
_LEFT = "left_codes", "left_amplitude"
_RIGHT = "right_codes", "right_amplitude"


@dataclass(frozen=True)
class MultiHash(Reparameterization):
    """Weights drawn anew and learned as a matrix of low rank that all tensors of the rule share.

    Exactly one of `fraction` (0 … 1: numbers in L and R, of the rule's weights) and `bytes` (the most that L and R may
    take in the file, amplitudes included; each tensor's scale takes 4 more) says how large the rank is. `bits`, 2 … 16:
    of every number in L and R. `seed`: of the draws. Training is from scratch: of a weight only its size is kept.

    Rate: bits · 2Mn + 16 bits an amplitude, shared out by the tensors' numbers of elements, and 32 bits a scale; the
    entropy coder only takes away from it.

    Latents: `left` [n, M], `right` [M, n], common to the rule; `gain`, a scalar; `deviation`, a constant.

    Raises ConfigError: not exactly one of fraction and bytes, one out of range, fewer bytes than rank 1 takes.
    """

    fraction: float | None = None
    bytes: int | None = None
    bits: int = 8
    seed: int = 0

    shared: ClassVar[frozenset[str]] = frozenset({"left", "right"})
    frozen: ClassVar[frozenset[str]] = frozenset({"deviation"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.fraction is None) == (self.bytes is None):
            raise ConfigError(f"multihash: give either fraction or bytes, found {self.fraction} and {self.bytes}")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"multihash: fraction must be above 0 and at most 1, found {self.fraction}")
        if self.bytes is not None and self.bytes < 1:
            raise ConfigError(f"multihash: bytes must be at least 1, found {self.bytes}")
        if not 2 <= self.bits <= 16:
            raise ConfigError(f"multihash: bits must be 2 to 16, found {self.bits}")

    def init(self, weight: Tensor, slot: Slot) -> Latents:
        """The draws depend on the seed and the rule's number of weights alone, so that every slot finds the same."""
        n, rank = _side(slot.total), self.rank(slot.total)
        seed = blake2b(f"{self.seed}/{slot.total}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        drawn = torch.randn(2, n, rank, generator=generator).mul_(rank**-0.25).to(weight.device)
        return {
            "left": drawn[0].clone(),
            "right": drawn[1].t().contiguous(),
            "gain": torch.ones((), device=weight.device),
            "deviation": _deviation(weight.detach()),
        }

    def common(self, latents: Latents) -> Latents:
        """The rounded factors, whole."""
        with torch.no_grad():
            left, right = self._quantize(latents["left"], 1), self._quantize(latents["right"], 0)
        return {name: part for names, parts in ((_LEFT, left), (_RIGHT, right)) for name, part in zip(names, parts)}

    def decode(self, latents: Latents, slot: Slot, *, hard: bool) -> Tensor:
        if "scale" in latents:  # from a file
            left, right = (_named(latents, names) for names in (_LEFT, _RIGHT))
            return self._cut(left, right, latents["scale"], [slot]).view(slot.shape)
        return self.decode_group([(latents, slot)], hard=hard)[0]

    def decode_group(self, members: Sequence[tuple[Latents, Slot]], *, hard: bool) -> Sequence[Tensor]:
        slots = [slot for _, slot in members]
        if any(one.offset + one.numel != other.offset for one, other in pairwise(slots)):
            return super().decode_group(members, hard=hard)
        latents = members[0][0]
        found = latents if _LEFT[0] in latents else self.common(latents)
        deviations, gains = (torch.stack([own[name] for own, _ in members]) for name in ("deviation", "gain"))
        rounded = (*_named(found, _LEFT), *_named(found, _RIGHT))
        scales = deviations.float() * gains.float()
        flat = _Cut.apply(latents["left"], latents["right"], scales, *rounded, self, slots).to(deviations.dtype)
        return [part.view(slot.shape) for part, slot in zip(flat.split([slot.numel for slot in slots]), slots)]

    def rate(self, latents: Latents, slot: Slot) -> Tensor:
        bits = self._factor_bits(slot.total) * (slot.numel / max(slot.total, 1)) + _SCALE_BITS
        return latents["gain"].new_tensor(bits, dtype=torch.float32)

    def rate_of_group(self, members: Sequence[tuple[Latents, Slot]]) -> Tensor:
        bits = self._factor_bits(members[0][1].total) + _SCALE_BITS * len(members)
        return members[0][0]["gain"].new_tensor(bits, dtype=torch.float32)

    def describe(self, latents: Latents, slot: Slot) -> Description:
        description: Description = {}
        for name, factor in (("left", latents["left"]), ("right", latents["right"].t())):  # both: n rows of M codes
            codes, amplitude = self._quantize(factor.detach().float(), 1)
            description[name] = Symbols(codes.flatten().to(torch.int32).cpu().numpy())
            description[f"{name}_amplitude"] = amplitude.flatten().to(torch.float16).cpu().numpy()
        scale = latents["deviation"].detach().float() * latents["gain"].detach().float()
        return {**description, "scale": scale.reshape(1).cpu().numpy()}

    def restore(self, description: Description, slot: Slot) -> Latents:
        """The codes of those rows and columns that the slot needs."""
        if slot.offset + slot.numel > slot.total:
            raise FormatError(f"the slot ends at {slot.offset + slot.numel} of {slot.total} weights")
        try:
            n, rank = _side(slot.total), self.rank(slot.total)
        except ConfigError as error:
            raise FormatError(str(error)) from error
        rows, columns, _ = _place([slot])
        latents: Latents = {}
        for name, part in (("left", rows), ("right", columns)):
            codes = symbols_in(description, name, n * rank, -self._top, self._top).reshape(n, rank)[part]
            latents[f"{name}_codes"] = torch.from_numpy(codes)
            amplitude = array_in(description, f"{name}_amplitude", n, "float16")[part]
            latents[f"{name}_amplitude"] = torch.from_numpy(amplitude.astype(np.float32)).unsqueeze(1)
        scale = array_in(description, "scale", 1, "float32")
        latents |= {name: z.t() for name, z in latents.items() if name.startswith("right")}
        return {**latents, "scale": torch.from_numpy(scale.copy()).reshape(())}

    def rank(self, total: int) -> int:
        """M for a rule of `total` weights, at least 1. Raises ConfigError: `bytes` are too few for it."""
        n = _side(total)
        if n == 0:
            return 1
        if self.fraction is not None:
            return max(1, math.ceil(self.fraction * total / (2 * n)))
        assert self.bytes is not None
        room = 8 * self.bytes - 2 * n * _AMPLITUDE_BITS  # in bits, for the codes of both factors
        if room < 2 * n * self.bits:
            least = -(-2 * n * (self.bits + _AMPLITUDE_BITS) // 8)
            raise ConfigError(f"multihash: {self.bytes} bytes are too few for {total} weights: at least {least}")
        return room // (2 * n * self.bits)

    def _factor_bits(self, total: int) -> int:
        n = _side(total)
        return 2 * n * (self.rank(total) * self.bits + _AMPLITUDE_BITS)

    @property
    def _top(self) -> int:
        """The greatest code."""
        return int(2 ** (self.bits - 1) - 1)

    def _quantize(self, factor: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Codes −top … top as float32, amplitudes of rows (dim 1) or columns (0): factor ≈ codes · amplitude / top."""
        amplitude = factor.abs().amax(dim, keepdim=True).half().float()
        inverse = torch.where(amplitude > 0, self._top / amplitude, 0.0)
        return (factor * inverse).round_().clamp_(-self._top, self._top), amplitude

    def _cut(
        self, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], scales: Tensor, slots: Sequence[Slot]
    ) -> Tensor:
        """The weights of adjoining slots, float32 [n], from codes and amplitudes of the rows and columns they need.

        Every partial sum of codes is an integer of at most M · top², and no more than 2^24 in float32 or 2^53 in
        float64: exact in any order of summation, fused or not. Codes of 9 bits are exact in bfloat16 and TF32 too, to
        which torch may be told to round the operands of a float32 product.
        """
        rank = left[0].shape[1]
        exact = torch.float32 if self.bits <= 9 and rank * self._top**2 <= 2**24 else torch.float64
        with torch.autocast(scales.device.type, enabled=False):
            product = (left[0].to(exact) @ right[0].to(exact)).float()
        product.mul_(left[1]).mul_(right[1])
        _, _, skip = _place(slots)
        counts = [slot.numel for slot in slots]
        flat = product.view(-1)[skip : skip + sum(counts)]
        # by a tensor: a GPU divides by a plain number as a product with its reciprocal, which rounds twice
        factors = scales / torch.full_like(scales, self._top**2)
        return flat.mul_(spread(factors, counts)).add_(0.0)  # −0 + 0 = 0: a kernel may sum zeros to either


class _Cut(torch.autograd.Function):
    """`MultiHash._cut` of the rounded factors; the gradient passes straight through the rounding.

    What waits for the gradient is what all slots have in common.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, scales: Tensor, *given: Any) -> Tensor:
        left_codes, left_amplitude, right_codes, right_amplitude, method, slots = given
        ctx.save_for_backward(scales, left_codes, left_amplitude, right_codes, right_amplitude)
        ctx.method, ctx.slots = method, slots
        rows, columns, _ = _place(slots)
        own, other = (left_codes[rows], left_amplitude[rows]), (right_codes[:, columns], right_amplitude[:, columns])
        cut: Tensor = method._cut(own, other, scales, slots)
        return cut

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scales, left_codes, left_amplitude, right_codes, right_amplitude = ctx.saved_tensors
        counts = [slot.numel for slot in ctx.slots]
        rows, columns, skip = _place(ctx.slots)
        own = left_codes[rows] * (left_amplitude[rows] / ctx.method._top)
        other = right_codes[:, columns] * (right_amplitude[:, columns] / ctx.method._top)
        here = slice(skip, skip + gradient.numel())
        along = gradient.new_zeros(len(own), other.shape[1])
        along.view(-1)[here] = gradient if len(counts) == 1 else gradient * spread(scales, counts)
        to_left, to_right = torch.zeros_like(left_codes), torch.zeros_like(right_codes)
        through = torch.mm(along, other.t(), out=to_left[rows])
        if len(counts) == 1:  # the scale is left out so far, and its own gradient needs no further product
            to_scales = torch.dot(own.view(-1), through.view(-1)).view(1)
            through.mul_(scales)
            own.mul_(scales)
        else:
            to_scales = sums(torch.mm(own, other).view(-1)[here].mul_(gradient), counts)
        torch.mm(own.t(), along, out=to_right[:, columns])
        return to_left, to_right, to_scales, *(None for _ in range(6))


def _named(latents: Latents, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Codes of a factor as float32, and its amplitudes."""
    return latents[names[0]].float(), latents[names[1]]


def _side(total: int) -> int:
    """n = ⌈√total⌉."""
    return math.isqrt(total - 1) + 1 if total > 0 else 0


def _place(slots: Sequence[Slot]) -> tuple[slice, slice, int]:
    """The rows and columns of W in which adjoining slots lie, and how many elements of these come before them."""
    count = sum(slot.numel for slot in slots)
    if count == 0:
        return slice(0, 0), slice(0, 0), 0
    n, offset = _side(slots[0].total), slots[0].offset
    (first, start), last = divmod(offset, n), (offset + count - 1) // n
    if first == last:
        return slice(first, first + 1), slice(start, start + count), 0
    return slice(first, last + 1), slice(0, n), start


def _deviation(weight: Tensor) -> Tensor:
    """The root mean square of `weight`, a scalar of its dtype, within what that holds; of zeros, 0.01."""
    size = weight.double().square().mean().sqrt().item() if weight.numel() else 0.0
    room = torch.finfo(weight.dtype).max / 16
    deviation = weight.new_tensor(min(size, room))
    return deviation if deviation > 0 else weight.new_tensor(0.01)
