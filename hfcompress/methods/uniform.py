"""Uniform quantization with linear scaling per bucket, trained straight through.

Polino, Pascanu, Alistarh, "Model compression via distillation and quantization", ICLR 2018, sections 2.1, 3 and
algorithm 1 (quantized distillation). A weight is flattened and cut into buckets of `bucket` elements; with low and
high the least and greatest weight of a bucket,

    step = (high − low) / (2^bits − 1),   code = round((w − low) / step) ∈ {0 … 2^bits − 1},   ŵ = low + step · code

and the gradient of ŵ is applied to w unchanged. `low` and `step` are rounded to the precision in which the file keeps
them *before* the codes are chosen, so that the weights trained are the weights shipped.

With `zero_point` the grid holds 0 exactly, which the paper's need not: low and high are widened to include 0, and

    zero = round(−low / step) ∈ {0 … 2^bits − 1},   code = round(w / step) + zero,   ŵ = (code − zero) · step

the form in which low-bit kernels take their weights (ONNX Runtime's MatMulNBits, torch's 4-bit matrix products).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from hfcompress.coding import Symbols
from hfcompress.errors import ConfigError, FormatError
from hfcompress.reparameterization import Description, Latents, Reparameterization, Slot, array_in, symbols_in
from hfcompress.rounding import (
    all_extremes,
    all_from_buckets,
    all_to_buckets,
    replace_all_through,
    rooms,
    round_by,
    to_buckets,
    uniform_draw,
)
from hfcompress.together import joined

_SCALES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Uniform(Reparameterization):
    """`bits` per weight on a uniform grid scaled to each bucket of `bucket` weights (None: the whole tensor).

    Rate: bits · n + 2 scales a bucket, in bits; the entropy coder only takes away from it. `stochastic`: in training
    decodes a weight goes up with the probability of its fraction (unbiased); hard decodes always round to nearest.
    `scales`: the format of low and step; float16 reaches from 6e-8 to 65,504. `zero_point`: an integer in place of low;
    it costs 8 bits a bucket, and more error where a bucket's weights all lie on one side of 0.

    Raises ConfigError: bits outside 1 … 8, bucket < 1.
    """

    bits: int = 4
    bucket: int | None = 256
    stochastic: bool = False
    scales: Literal["float16", "float32"] = "float16"
    zero_point: bool = False

    decayed: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"uniform: bits must be 1 to 8, found {self.bits}")
        if self.bucket is not None and self.bucket < 1:
            raise ConfigError(f"uniform: bucket must be at least 1, or null for the whole tensor, found {self.bucket}")

    @property
    def noisy(self) -> bool:
        return self.stochastic

    def init(self, weight: Tensor, slot: Slot) -> Latents:
        return {"weight": weight.detach().clone()}

    def decode(self, latents: Latents, slot: Slot, *, hard: bool) -> Tensor:
        if "codes" in latents:
            return self._dequantize(latents["codes"].float(), latents[self._origin], latents["step"], [slot])[0]
        return self.decode_group([(latents, slot)], hard=hard)[0]

    def decode_group(self, members: Sequence[tuple[Latents, Slot]], *, hard: bool) -> Sequence[Tensor]:
        weights = [latents["weight"] for latents, _ in members]
        slots = [slot for _, slot in members]
        with torch.no_grad():
            codes, origin, step = self._quantize(weights, None if hard or not self.stochastic else slots)
            decoded = self._dequantize(codes, origin, step, slots, weights[0].dtype)
        return replace_all_through(weights, decoded)

    def rate(self, latents: Latents, slot: Slot) -> Tensor:
        scale_bits = 8 * _SCALES[self.scales].itemsize
        origin_bits = 8 if self.zero_point else scale_bits
        bits = self.bits * slot.numel + (scale_bits + origin_bits) * self._buckets(slot)
        return latents["weight"].new_tensor(bits, dtype=torch.float32)

    def describe(self, latents: Latents, slot: Slot) -> Description:
        codes, origin, step = self._quantize([latents["weight"].detach()], None)
        values = codes.flatten()[: slot.numel].to(torch.int32).cpu().numpy()
        scale = _SCALES[self.scales]
        return {
            "codes": Symbols(values),
            self._origin: origin.flatten().to(torch.uint8 if self.zero_point else scale).cpu().numpy(),
            "step": step.flatten().to(scale).cpu().numpy(),
        }

    def restore(self, description: Description, slot: Slot) -> Latents:
        """Codes and scales themselves: quantizing the decoded weight a second time need not give the same codes."""
        codes = symbols_in(description, "codes", slot.numel, 0, 2**self.bits - 1)
        buckets, kept_as = self._buckets(slot), "uint8" if self.zero_point else self.scales
        origin = array_in(description, self._origin, buckets, kept_as)
        step = array_in(description, "step", buckets, self.scales)
        if (step < 0).any():
            raise FormatError("'step' holds negative numbers")
        if self.zero_point and (origin >= 2**self.bits).any():
            raise FormatError(f"'zero' holds numbers above {2**self.bits - 1}")
        origins, steps = (torch.from_numpy(s.astype(np.float32)).unsqueeze(1) for s in (origin, step))
        return {"codes": to_buckets(torch.from_numpy(codes), self.bucket), self._origin: origins, "step": steps}

    @property
    def _origin(self) -> str:
        """What a bucket's codes are counted from: its least weight, or the code that means 0."""
        return "zero" if self.zero_point else "low"

    def _buckets(self, slot: Slot) -> int:
        return -(-slot.numel // (self.bucket or max(slot.numel, 1)))

    def _quantize(self, weights: Sequence[Tensor], drawn: Sequence[Slot] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [buckets, bucket] as float32, low or zero [buckets, 1], step [buckets, 1] as float32.

        Of several whole tensors [n, 1] each. drawn: the slots, whose draws round.
        """
        rows = all_to_buckets(weights, self.bucket).float()
        top = 2**self.bits - 1
        scale = _SCALES[self.scales]
        if rows.numel() == 0:
            empty = rows.new_zeros(0, 1)
            return rows, empty, empty
        low, high = all_extremes(rows, weights, self.bucket)
        if self.zero_point:
            low, high = low.clamp(max=0), high.clamp(min=0)
        else:
            low = low.to(scale).float()
        step = ((high - low) / top).clamp(min=0).to(scale).float()  # low may have been rounded to above high
        divisor = torch.where(step > 0, step, torch.inf)
        if self.zero_point:
            origin = (-low / divisor).round_().clamp_(0, top)
            position = (rows / divisor).add_(origin)
        else:
            origin = low
            position = (rows - low).div_(divisor)
        rounded = position.round_() if drawn is None else round_by(position, self._draws(drawn, position))
        return rounded.clamp_(0, top).abs_(), origin, step  # abs: a code −0 would decode to −0, from the file to 0

    def _draws(self, slots: Sequence[Slot], position: Tensor) -> Tensor:
        """Of each slot as many as its buckets hold, as if it were alone."""
        parts = []
        for slot, room in zip(slots, rooms([slot.numel for slot in slots], self.bucket)):
            drawn = uniform_draw(rooms([slot.numel], self.bucket)[0], slot.draw)
            parts.append(torch.nn.functional.pad(drawn, (0, room - drawn.numel())))
        return joined(parts).view(position.shape).to(position.device)

    def _dequantize(
        self, codes: Tensor, origin: Tensor, step: Tensor, slots: Sequence[Slot], dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """Overwrites `codes`, float32 [buckets, bucket]: this runs every step, and fresh memory is the slow part."""
        # two kernels on purpose: a fused multiply-add would round once instead of twice, and differ between machines
        rows = codes.sub_(origin).mul_(step) if self.zero_point else codes.mul_(step).add_(origin)
        return all_from_buckets(rows.to(dtype), [slot.shape for slot in slots], self.bucket)
