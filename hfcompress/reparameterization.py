"""The contract: a way to store a weight, weight = decode(latents), with a rate in bits and an exact description."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, TypeAlias

import numpy as np
from torch import Tensor

from hfcompress.coding import Symbols

Latents: TypeAlias = dict[str, Tensor]
"""Named tensors of one slot: float tensors are trained, integer tensors are constants."""

Description: TypeAlias = dict[str, Symbols | np.ndarray]
"""What a decoder needs to rebuild the weight, and nothing more."""


class Kind(str, Enum):
    """What a weight does in its network."""

    CONV = "conv"
    LINEAR = "linear"
    EMBEDDING = "embedding"
    BIAS = "bias"
    NORM = "norm"
    OTHER = "other"


@dataclass(frozen=True)
class Slot:
    """The place in a model that one decoded weight fills.

    `offset` and `total` count elements: where this weight starts among those of its group (the slots one rule
    claimed) and how many the group has. `draw` seeds whatever random numbers a training decode takes.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind = Kind.OTHER
    offset: int = 0
    total: int = 0
    draw: int = 0

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


class Reparameterization(ABC):
    """A method: concrete ones are frozen dataclasses, so that the method is its own configuration.

    Laws (each one a test over every method, shape and dtype):

    * fill: ``decode(init(w, s), s)`` has ``s.shape``, w's dtype, and is finite;
    * learn: the gradient of decode + rate reaches every float latent;
    * exact: ``decode(restore(describe(z)), hard=True)`` equals ``decode(z, hard=True)`` bit for bit;
    * honest: bytes on disk ≤ 1.02 · rate / 8 + a small constant;
    * hard is certain: ``hard=True`` draws no random number, and decode changes no latent;
    * own config: ``Method(**json.loads(json.dumps(asdict(m)))) == m``.
    """

    shared: ClassVar[frozenset[str]] = frozenset()
    """Latents that the slots of a group hold in common."""
    decayed: ClassVar[frozenset[str]] = frozenset()
    """Latents on which the optimizer's weight decay acts."""

    @property
    def noisy(self) -> bool:
        """Whether ``decode(hard=False)`` differs in value from ``decode(hard=True)``."""
        return False

    @abstractmethod
    def init(self, weight: Tensor, slot: Slot) -> Latents:
        """Latents whose decode is near `weight` (of ``slot.shape``)."""

    @abstractmethod
    def decode(self, latents: Latents, slot: Slot, *, hard: bool) -> Tensor:
        """The weight, of ``slot.shape``; differentiable in the float latents. `hard`: exactly what a file gives."""

    @abstractmethod
    def rate(self, latents: Latents, slot: Slot) -> Tensor:
        """Bits to store this slot: a scalar, differentiable where the method can make it so."""

    @abstractmethod
    def describe(self, latents: Latents, slot: Slot) -> Description:
        """Integers and arrays from which `restore` rebuilds the latents' hard decode."""

    @abstractmethod
    def restore(self, description: Description, slot: Slot) -> Latents:
        """Latents whose hard decode is the described weight, bit for bit."""
