"""The contract: a way to store a weight, weight = decode(latents), with a rate in bits and an exact description."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from hfcompress.coding import Symbols
from hfcompress.errors import ConfigError, FormatError

Latents: TypeAlias = dict[str, Tensor]
"""Named tensors of one slot: float tensors are trained, integer tensors are constants."""

Description: TypeAlias = dict[str, Symbols | np.ndarray]
"""What a decoder needs to rebuild the weight, and nothing more."""


class Kind(StrEnum):
    """What a weight does in its network."""

    CONV = "conv"
    LINEAR = "linear"
    EMBEDDING = "embedding"
    BIAS = "bias"
    NORM = "norm"
    OTHER = "other"


MATRICES = (Kind.LINEAR, Kind.EMBEDDING, Kind.CONV)


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
        return math.prod(self.shape)


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
    frozen: ClassVar[frozenset[str]] = frozenset()
    """Float latents that are constants all the same."""
    auxiliary: ClassVar[Mapping[str, float]] = MappingProxyType({})
    """Latents whose scale has nothing to do with that of weights (steps, thresholds, probability models), each with
    the learning rate of the Adam that trains them beside the user's optimizer; it follows the user's schedule."""

    def __post_init__(self) -> None:
        """Raises ConfigError: an option that is not of its type. What else a method refuses, it adds."""
        name = type(self).__name__.lower()
        for field, adapter in _options(type(self)).items():
            found = getattr(self, field)
            try:
                adapter.validate_python(found, strict=True)
            except ValidationError as error:
                said = " or ".join(fault["msg"].removeprefix("Input should be ") for fault in error.errors())
                raise ConfigError(f"{name}: {field} must be {said}, found {found!r}") from error

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

    def decode_group(self, members: Sequence[tuple[Latents, Slot]], *, hard: bool) -> Sequence[Tensor]:
        """`decode` of several slots of one rule (at least one): their trained latents, on one device, of one dtype.

        Where there are several, none is empty. A method may take fewer and larger steps than one by one, which is what
        a GPU wants; a test holds the weights equal to the last bit, and the gradients but for their last digits.
        """
        return [self.decode(latents, slot, hard=hard) for latents, slot in members]

    def common(self, latents: Latents) -> Latents:
        """What every slot of a group would work out anew from the latents they share: constants of one decode of them
        all, which `decode` finds among its latents, or makes itself; a test holds both equal."""
        return {}

    @abstractmethod
    def rate(self, latents: Latents, slot: Slot) -> Tensor:
        """Bits to store this slot: a scalar, differentiable where the method can make it so."""

    @abstractmethod
    def describe(self, latents: Latents, slot: Slot) -> Description:
        """Integers and arrays from which `restore` rebuilds the latents' hard decode."""

    @abstractmethod
    def restore(self, description: Description, slot: Slot) -> Latents:
        """Latents whose hard decode is the described weight, bit for bit.

        Raises FormatError: the description is not one that `describe` gives for this slot.
        """

    def rate_of_group(self, members: Sequence[tuple[Latents, Slot]]) -> Tensor:
        """Bits of all slots that one rule claimed (at least one): a scalar, the sum of `rate`.

        A method whose slots share a probability model may do better than one by one; a test holds both equal. The
        gradient that comes back to it is positive where the rate has to fall and negative where it has to grow.
        """
        return torch.stack([self.rate(latents, slot) for latents, slot in members]).sum()


@cache
def _options(method: type[Reparameterization]) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(method)
    return {field.name: TypeAdapter(hints[field.name]) for field in fields(method)}  # type: ignore[arg-type]


def symbols_in(description: Description, name: str, count: int, low: int, high: int) -> NDArray[np.int32]:
    """The `count` symbols called `name`, all within low … high: not to be changed, for they may be another's too.

    Raises FormatError: they are not there.
    """
    part = description.get(name)
    if not isinstance(part, Symbols) or part.values.size != count:
        raise FormatError(f"'{name}' is not {count} symbols")
    if count and not low <= part.values.min() <= part.values.max() <= high:
        raise FormatError(f"'{name}' holds symbols from {part.values.min()} to {part.values.max()}, not {low} … {high}")
    return np.require(part.values, requirements=("C", "W"))  # torch wants it writeable; a constant is not


def array_in(description: Description, name: str, count: int, dtype: str) -> NDArray[Any]:
    """The `count` numbers of numpy's `dtype` called `name`, all finite. Raises FormatError: they are not there."""
    part = description.get(name)
    if not isinstance(part, np.ndarray) or part.size != count or part.dtype != dtype:
        raise FormatError(f"'{name}' is not {count} numbers of {dtype}")
    if not np.isfinite(part).all():
        raise FormatError(f"'{name}' holds numbers that are not finite")
    return part
