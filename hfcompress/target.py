"""The size that a training is to end at, in units a person can think in."""

import re
from dataclasses import fields
from typing import Annotated, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _read_bytes(value: object) -> object:
    """8500 from "8.5 KB", whatever the case; numbers as they are."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Z]+)", value.strip().upper())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"found {value!r}, expected a whole number, or a number with a unit: {', '.join(_UNITS)}")
    return round(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Target:
    """Exactly one of three.

    `bits_per_weight`: 8 · bytes of the file / parameters of the model. `bytes`: of the whole file; a whole number, or
    text with a decimal unit ("10MB", "8.5 KB"). `sparsity`: zeros among the weights of methods that can make zeros.
    """

    bits_per_weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    bytes: Annotated[Annotated[int, Field(gt=0)] | None, BeforeValidator(_read_bytes)] = None
    sparsity: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        found = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(found) != 1:
            raise ValueError(
                f"give exactly one of bits_per_weight, bytes, sparsity; found {' and '.join(found) or 'none'}"
            )
        return self

    @property
    def kind(self) -> str:
        """Which of the three is given."""
        return next(field.name for field in fields(self) if getattr(self, field.name) is not None)

    @property
    def wanted(self) -> float:
        """The number that is given."""
        number: float = getattr(self, self.kind)
        return number
