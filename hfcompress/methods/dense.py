"""The weight itself, in a floating-point format of choice: the control, and the place for norms and biases."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from hfcompress.reparameterization import Description, Latents, Reparameterization, Slot, array_in
from hfcompress.rounding import replace_all_through
from hfcompress.together import joined, parted

_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Dense(Reparameterization):
    """Store the weight as `dtype`; the gradient passes straight through the cast.

    Rate: 16 or 32 bits a weight. A float32 weight outside float16's range decodes to infinity there, which the
    compressor and the file refuse.
    """

    dtype: Literal["float16", "float32"] = "float16"

    decayed: ClassVar[frozenset[str]] = frozenset({"weight"})

    def init(self, weight: Tensor, slot: Slot) -> Latents:
        return {"weight": weight.detach().clone()}

    def decode(self, latents: Latents, slot: Slot, *, hard: bool) -> Tensor:
        return self.decode_group([(latents, slot)], hard=hard)[0]

    def decode_group(self, members: Sequence[tuple[Latents, Slot]], *, hard: bool) -> Sequence[Tensor]:
        weights = [latents["weight"] for latents, _ in members]
        flat = joined([weight.detach() for weight in weights])
        return replace_all_through(weights, parted(flat.to(_DTYPES[self.dtype]).to(flat.dtype), weights))

    def rate(self, latents: Latents, slot: Slot) -> Tensor:
        bits = slot.numel * _DTYPES[self.dtype].itemsize * 8
        return latents["weight"].new_tensor(bits, dtype=torch.float32)

    def describe(self, latents: Latents, slot: Slot) -> Description:
        return {"weight": latents["weight"].detach().to(_DTYPES[self.dtype]).cpu().numpy()}

    def restore(self, description: Description, slot: Slot) -> Latents:
        weight = array_in(description, "weight", slot.numel, self.dtype)
        return {"weight": torch.from_numpy(weight.astype(np.float32)).reshape(slot.shape)}
