"""The table of methods: whoever adds one adds its line here, and every law and fault is tried on it.

`Scaled` is no method of the package: it has what the shipped ones lack so far (a latent shared by a group, one without
weight decay, a decode that is not straight through, a rate with a gradient).
"""

import json
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hfcompress.methods import Dense, EntropyPenalized, Levels, Magnitude, MultiHash, SoftThreshold, Uniform
from hfcompress.reparameterization import Description, Latents, Reparameterization, Slot

TABLE: tuple[Reparameterization, ...] = (
    Dense("float16"),
    Dense("float32"),
    Uniform(),
    Uniform(bits=1),
    Uniform(bits=2, bucket=7),
    Uniform(bits=3, bucket=None),
    Uniform(bits=5, bucket=1),
    Uniform(bits=8, scales="float32"),
    Uniform(bits=4, bucket=16, stochastic=True),
    Uniform(bits=2, bucket=None, stochastic=True, scales="float32"),
    Uniform(bits=4, bucket=32, zero_point=True),
    Uniform(bits=1, bucket=None, stochastic=True, zero_point=True),
    Levels(),
    Levels(points=2, bucket=7),
    Levels(points=5, bucket=None, start="uniform"),
    Levels(points=256, bucket=32, start="quantile", scales="float32"),
    EntropyPenalized(),
    EntropyPenalized(transform="dft", step=1 / 2),
    EntropyPenalized(prior="logistic", step=1 / 64),
    EntropyPenalized(transform="dft", prior="laplace"),
    MultiHash(fraction=0.1),
    MultiHash(fraction=0.5, bits=16),
    MultiHash(fraction=0.3, bits=3, seed=1),
    MultiHash(bytes=9000, bits=5),
    SoftThreshold(),
    SoftThreshold(survivors=2),
    SoftThreshold(survivors=5),
    SoftThreshold(survivors=8),
    Magnitude(),
    Magnitude(sparsity=0.0),
    Magnitude(sparsity=0.55),
)


def name_of(method: Reparameterization) -> str:
    """Short and unique: uniform-4-256-False-float16."""
    return "-".join([type(method).__name__.lower(), *(str(v) for v in asdict(method).values())])


def largest(method: Reparameterization, dtype: torch.dtype) -> float:
    """Weights up to this size survive the method's narrowest format, and the weight's own."""
    narrow = "float16" in json.dumps(asdict(method)) or isinstance(method, Magnitude) or dtype == torch.float16
    return 3e4 if narrow else 1e35  # sums over a tensor are finite too


@dataclass(frozen=True)
class Scaled(Reparameterization):
    """weight = direction · exp(log_scale), one log_scale for a whole group."""

    shared: ClassVar[frozenset[str]] = frozenset({"log_scale"})
    decayed: ClassVar[frozenset[str]] = frozenset({"direction"})

    def init(self, weight: Tensor, slot: Slot) -> Latents:
        return {"direction": 2 * weight.detach(), "log_scale": weight.new_tensor(np.log(0.5))}

    def decode(self, latents: Latents, slot: Slot, *, hard: bool) -> Tensor:
        return latents["direction"] * latents["log_scale"].exp()

    def rate(self, latents: Latents, slot: Slot) -> Tensor:
        return latents["direction"].abs().sum()

    def describe(self, latents: Latents, slot: Slot) -> Description:
        return {name: latent.detach().numpy() for name, latent in latents.items()}

    def restore(self, description: Description, slot: Slot) -> Latents:
        return {name: torch.as_tensor(array) for name, array in description.items()}
