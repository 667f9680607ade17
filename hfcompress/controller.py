"""Targets a person can think in: a controller of the rate's weight that ends the training at the size asked for.

    goal ──▶ e = log(found / goal) ──▶ λ₊ − λ₋ ──▶ one optimizer step ──▶ rate in bits, zeros ──▶ found ──┐
                 ▲─────────────────────────────────────────────────────────────────────────────────────┘

Least loss at a given size is a constrained problem; its Lagrangian is loss + (λ₊ − λ₋) · size, with one multiplier
for "not larger" and one for "not smaller". Dual ascent raises the first and lowers the second while the size is above
the goal; here it does so in their logarithms, with a part in proportion to e and a part in its sum over time, so that
neither the unit of the loss nor that of the size matters. For the same reason the multipliers count in units of
balance: at 1 the gradient of the rate is as large as that of the loss.

The goal moves from what the weights take at the start to the target over the first part of the training; in the rest
the network settles at its size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hfcompress.errors import ConfigError
from hfcompress.target import Target

_APPROACH = 0.55  # of the training: until then the goal moves
_PROPORTIONAL = 40.0  # an error of 1 % changes λ by the factor e^0.4
_SUMMED = 160.0  # the same over a whole training
_CLIPPED = (0.3, 0.2)  # errors beyond count as these, in proportion and in the sum: one e-fold off is far off
_START = 0.1
_HIGHEST = 10.0  # more than the loss can ever withstand
_APART = 2.0  # log λ₊ and log λ₋ differ by this at most, so that either can take over soon
_SMOOTHED = 20  # steps over which the balance is averaged
_MEASURED = (0.0, 0.3, 0.5, 0.65, 0.8, 0.95)  # parts of the training after which a real file is encoded
_TOLERANCE = {"bits_per_weight": 0.02, "bytes": 0.02, "sparsity": 0.005}  # relative; of a sparsity absolute


@dataclass(frozen=True)
class Outcome:
    """How near a target was come. `kind`: bits_per_weight, bytes or sparsity; `wanted` and `found` in its unit."""

    kind: str
    wanted: float
    found: float

    @property
    def reached(self) -> bool:
        """Within 2 % of the bits or bytes, or 0.5 points of the sparsity."""
        unit = 1.0 if self.kind == "sparsity" else self.wanted
        return abs(self.found - self.wanted) <= _TOLERANCE[self.kind] * unit

    def __str__(self) -> str:
        if self.kind == "sparsity":
            off = f"{100 * (self.found - self.wanted):+.2f} points"
        else:
            off = f"{100 * (self.found / self.wanted - 1):+.1f} %"
        digits = ",.0f" if self.kind == "bytes" else ".4g"
        return f"{self.kind} {self.wanted:{digits}} was asked for, {self.found:{digits}} found ({off})"


@dataclass
class _State:
    """What a checkpoint holds of a controller. start: log of what was found first; more, less: log λ₊, log λ₋."""

    done: int = 0
    start: float | None = None
    more: float = math.log(_START)
    less: float = math.log(_START) - _APART
    balance: float | None = None
    calibration: float = 1.0
    bits: float = math.nan
    sparsity: float = math.nan
    rate_weight: float = 0.0


class Controller:
    """Finds the weight of the rate for a `target`. `parameters`: of the whole model, which bits per weight refer to."""

    def __init__(self, target: Target, parameters: int) -> None:
        self.kind, self.wanted = target.kind, target.wanted
        self.parameters = parameters
        self._state = _State()
        self._plan: tuple[int, Callable[[], int]] | None = None

    def plan(self, steps: int, measure: Callable[[], int]) -> None:
        """A training of `steps` optimizer steps begins; `measure()` gives the bytes of the file as it would be now."""
        self._plan = steps, measure
        self._state.done, self._state.start = 0, None

    def update(self, bits: float, sparsity: float, balance: float | None) -> float:
        """The weight of the rate in the loss for one optimizer step; negative where the weights have to grow.

        bits: the rate of all claimed weights. sparsity: of those whose rate can be trained. balance: the weight at
        which the rate's gradient is as large as that of the loss; None if this step cannot tell.

        Raises ConfigError: no training was planned.
        """
        steps, measure = self._planned()
        state = self._state
        if bits > 0 and state.done in {round(part * steps) for part in _MEASURED}:
            state.calibration = 8 * measure() / bits
        state.bits, state.sparsity = bits * state.calibration, sparsity
        if balance is not None:
            old = math.log(balance) if state.balance is None else state.balance
            state.balance = old + (math.log(balance) - old) / _SMOOTHED
        force = self._force(self._error(steps), steps)
        state.rate_weight = 0.0 if state.balance is None else force * math.exp(state.balance)
        state.done += 1
        return state.rate_weight

    def measured(self, sparsity: float) -> Outcome:
        """As it is in the file now; `sparsity`: of the weights now. Raises ConfigError: nothing was planned."""
        _, measure = self._planned()
        if self.kind == "sparsity":
            return Outcome(self.kind, self.wanted, sparsity)
        size = measure()
        return Outcome(self.kind, self.wanted, size if self.kind == "bytes" else 8 * size / self.parameters)

    @property
    def arrived(self) -> bool:
        """Whether the goal has come to the target."""
        return self._plan is not None and self._state.done >= _APPROACH * self._plan[0]

    @property
    def rate_weight(self) -> float:
        """That of the last step; 0 before the first."""
        return self._state.rate_weight

    def log_line(self) -> dict[str, float]:
        """For the training's log: what the last step took and estimated."""
        state = self._state
        bits = state.bits / self.parameters
        return {"rate_weight": state.rate_weight, "bits_per_weight": bits, "sparsity": state.sparsity}

    def state_dict(self) -> dict[str, Any]:
        return asdict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = _State(**state)

    def _planned(self) -> tuple[int, Callable[[], int]]:
        if self._plan is None:
            what = f"a target ({self.kind}) needs to know how long the training is"
            raise ConfigError(f"{what}: call Compressor.plan(steps, measure) first")
        return self._plan

    def _error(self, steps: int) -> float:
        """log(found / goal) of the file's size, or of the density that a sparsity leaves."""
        if self.kind == "sparsity":
            found, wanted = max(1 - self._state.sparsity, 1 / self.parameters), 1 - self.wanted
        else:
            wanted = self.wanted * (self.parameters / 8 if self.kind == "bits_per_weight" else 1)
            found = max(self._state.bits / 8, 1)
        if self._state.start is None:
            self._state.start = math.log(found)
        way = min(self._state.done / (_APPROACH * steps), 1.0)
        way = way * way * (3 - 2 * way)  # slow at both ends
        return math.log(found) - (1 - way) * self._state.start - way * math.log(wanted)

    def _force(self, error: float, steps: int) -> float:
        """λ₊ − λ₋ in units of balance."""
        state, highest = self._state, math.log(_HIGHEST)
        change = _SUMMED / steps * _clip(error, _CLIPPED[1])
        more, less = state.more + change, state.less - change
        least = max(more, less) - _APART
        state.more, state.less = min(max(more, least), highest), min(max(less, least), highest)
        now = _PROPORTIONAL * _clip(error, _CLIPPED[0])
        return math.exp(min(state.more + now, highest)) - math.exp(min(state.less - now, highest))


def check(rate_weight: float, controller: Controller | None, *, trainable: bool) -> None:
    """Raises ConfigError: a rate weight and a target at once, or one of them where no method has a rate to train."""
    given = [f"rate_weight is {rate_weight}"] if rate_weight else []
    if controller is not None:
        given.append(f"the target is {controller.kind} {controller.wanted:,}")
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}, but a target finds the rate's weight itself: leave one of them out")
    if given and not trainable:
        raise ConfigError(
            f"{given[0]}, but no method of the rules has a rate that can be trained: leave it out, or give some "
            "weights to a method that has one, such as softthreshold or entropypenalized"
        )


def balance(gradients: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """The weight at which the rate's gradients are as large as the loss's: the geometric mean over the latents.

    gradients: (of the loss, of the rate) of each latent that has both. None: there are none but zeros.
    """
    if not gradients:
        return None
    loss, rate = (torch.stack(torch._foreach_norm(side, 2, torch.float32)) for side in zip(*gradients))
    ratio = (loss / rate).log()
    ratio = ratio[ratio.isfinite()]
    return ratio.mean().exp().item() if ratio.numel() else None


def _clip(error: float, bound: float) -> float:
    return max(-bound, min(error, bound))
