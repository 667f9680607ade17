"""The outer optimizer: any torch optimizer, stepping on latents instead of on the weights they decode to."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Adam, Optimizer

from hfcompress.compressor import Compressor
from hfcompress.errors import ConfigError


class CompressedOptimizer(Optimizer):
    """Wraps `base`, a fresh torch optimizer over the model's parameters, so that claimed weights train as latents.

    `param_groups` are those of the model's parameters, because schedulers, gradient scalers and clipping look there;
    what schedulers change in them (learning rates, momenta) is handed on to the base at every step. Latents that their
    method calls auxiliary are stepped by `auxiliary`, an Adam whose rates follow the schedule of the first group.
    `state_dict` holds both optimizers' state, the latents and the step of the random draws, so that a resumed run
    continues bit for bit.

    Raises ConfigError: `base` has already stepped.
    """

    def __init__(self, base: Optimizer, compressor: Compressor) -> None:
        if base.state:
            raise ConfigError("the optimizer has already stepped; compression needs a fresh one")
        outer = [dict(group) for group in base.param_groups]
        self.base = base
        self.compressor = compressor
        self._outer_of = _move_to_latents(base, compressor)
        own: dict[float, list[Tensor]] = {}
        for latent, rate in compressor.auxiliary():
            own.setdefault(rate, []).append(latent)
        groups = [{"params": latents, "lr": rate, "initial_lr": rate} for rate, latents in own.items()]
        self.auxiliary = Adam(groups) if groups else None
        super().__init__(outer, base.defaults)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step: gradients of the weights → gradients of the latents → base step → weights decoded anew.

        Gradients of claimed weights are freed on the way; `on_pre_optimizer_step` is where a callback can read them.
        """
        loss = None if closure is None else closure()
        for group, outer in zip(self.base.param_groups, self._outer_of):
            kept = ("params", "weight_decay") if group["fixed_decay"] else ("params",)
            group.update({k: v for k, v in self.param_groups[outer].items() if k not in kept})
        self.compressor.pull_back()
        self.base.step()
        if self.auxiliary is not None:
            first = self.param_groups[0]
            start = first.get("max_lr", first.get("initial_lr"))  # OneCycleLR's initial_lr is a 25th of what was given
            for group in self.auxiliary.param_groups:
                group["lr"] = group["initial_lr"] * (first["lr"] / start if start else 1.0)
            self.auxiliary.step()
            self.auxiliary.zero_grad()
        for _, latent, _ in self.compressor.trained():
            latent.grad = None
        self.compressor.write()
        return loss

    def train(self) -> None:
        """Put the weights of a training step into the model (those of a noisy method differ)."""
        if self.compressor.noisy:
            self.compressor.write(hard=False)

    def eval(self) -> None:
        """Put the weights that a file would give into the model."""
        if self.compressor.noisy:
            self.compressor.write(hard=True)

    def state_dict(self) -> dict[str, Any]:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]
        return {
            "state": {},
            "param_groups": groups,
            "base": self.base.state_dict(),
            "auxiliary": None if self.auxiliary is None else self.auxiliary.state_dict(),
            "compressor": self.compressor.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ConfigError: the state is of other slots, or of an optimizer without compression."""
        if "compressor" not in state_dict:
            raise ConfigError("the optimizer's state was saved without compression and cannot be resumed with it")
        self.compressor.load_state_dict(state_dict["compressor"])
        self.base.load_state_dict(state_dict["base"])
        if self.auxiliary is not None:
            self.auxiliary.load_state_dict(state_dict["auxiliary"])
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            group.update(saved)


def _move_to_latents(base: Optimizer, compressor: Compressor) -> list[int]:
    """Replace claimed parameters in the base's groups by their latents; which outer group each group follows."""
    latents: dict[int, list[tuple[Tensor, bool]]] = {}
    for parameter, latent, decayed in compressor.trained():
        latents.setdefault(id(parameter), []).append((latent, decayed))
    claimed = {id(entry.parameter) for entry in compressor.entries.values()}
    follows = list(range(len(base.param_groups)))
    for position in follows.copy():
        group = base.param_groups[position]
        mine = [pair for parameter in group["params"] for pair in latents.get(id(parameter), ())]
        group["fixed_decay"] = False
        group["params"] = [p for p in group["params"] if id(p) not in claimed] + [z for z, decayed in mine if decayed]
        undecayed = [z for z, decayed in mine if not decayed]
        if undecayed:
            rest = {k: v for k, v in group.items() if k != "params"}
            base.add_param_group({**rest, "params": undecayed, "weight_decay": 0.0, "fixed_decay": True})
            follows.append(position)
    return follows
