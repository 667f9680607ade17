"""Rules → slots and latents; decoded weights into the model, gradients back to the latents.

latents z ──decode──▶ w ──copy──▶ model.parameters()        write()      once per optimizer step
    ▲                                  │ forward / backward of an untouched model
    └──────── vjp of decode ◀──── param.grad                pull_back()  + gradient of rate_weight · bits / parameters

The weight of the rate is given, or a target is, for which controller.py finds it step by step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hfcompress.claims import RuleLike, claim, unsaved
from hfcompress.controller import Controller, Outcome, balance, check
from hfcompress.errors import ConfigError
from hfcompress.reparameterization import Latents, Reparameterization, Slot
from hfcompress.target import Target
from hfcompress.together import batches, joined


@dataclass
class Entry:
    """One claimed weight: its place, its method, the model's parameter and the latents beside it."""

    slot: Slot
    method: Reparameterization
    parameter: nn.Parameter
    latents: Latents
    edge: GradientEdge | None = None


class Compressor:
    """Holds the latents of every weight that a rule claims; the model's parameters stay plain leaf tensors.

    `rules`: in order of precedence, the first match wins; weights no rule claims stay as they are. `rate_weight`:
    weight in the loss of the rate, in bits per parameter of the model; or `target`: the size or sparsity for which to
    find it, given the length of the training by `plan`. `seed`: of training decodes that draw random numbers.

    Raises ConfigError: a rule that claims nothing, two rules that claim one tied weight, a weight that is not finite
    or beyond what its method can hold; a rate weight or a target (not both) that no method can be trained for.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Sequence[RuleLike],
        *,
        rate_weight: float = 0.0,
        target: Target | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.rate_weight = model, rate_weight
        self.seed, self.step = seed, 0
        self.entries: dict[str, Entry] = {}
        self._groups: list[list[Entry]] = []
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise ConfigError(f"{name}: the weight holds NaN or infinity; nothing can be compressed from it")
        claims = claim(model, rules)
        for position in range(len(rules)):
            mine = [c for c in claims if c[0] == position]
            total, offset = sum(parameter.numel() for _, _, _, parameter in mine), 0
            shared: Latents = {}
            for _, name, kind, parameter in mine:
                slot = Slot(name, tuple(parameter.shape), kind, offset, total)
                self.entries[name] = self._enter(slot, rules[position].method, parameter, shared)
                offset += parameter.numel()
            self._groups.append([self.entries[name] for _, name, _, _ in mine])
        self.parameters = sum(p.numel() for name, p in model.named_parameters() if name not in unsaved(model))
        self.controller = None if target is None else Controller(target, self.parameters)
        wanted = target is not None or rate_weight > 0
        rates = [self._rate_of(group) for group in self._groups] if wanted else []
        self._priced = [group for group, rate in zip(self._groups, rates) if rate.requires_grad]
        # the others' bits hardly move; a GPU would take longer to make numbers of them at every step
        self._settled = sum(rate.item() for rate in rates if not rate.requires_grad)
        check(rate_weight, self.controller, trainable=bool(self._priced))
        self.write()

    @staticmethod
    def _enter(slot: Slot, method: Reparameterization, parameter: nn.Parameter, shared: Latents) -> Entry:
        with torch.no_grad():
            latents = {**method.init(parameter.detach(), slot), **shared}
            if not method.decode(latents, slot, hard=True).isfinite().all():
                raise ConfigError(
                    f"{slot.name}: {type(method).__name__} cannot hold weights as large as "
                    f"{parameter.abs().max().item():.3g}: choose a wider format, or leave this weight to no rule"
                )
        for name, latent in latents.items():
            if latent.is_floating_point() and name not in method.frozen:
                latent.requires_grad_(True)
            if name in method.shared:
                shared[name] = latent
        return Entry(slot, method, parameter, latents)

    def write(self, *, hard: bool = True) -> None:
        """Decode every weight into its parameter, in place. `hard=False`: with the draws of this training step."""
        for group in self._groups:
            common = group[0].method.common(group[0].latents)
            for batch in _batches(group):
                noisy = group[0].method.noisy
                with torch.set_grad_enabled(not (hard and noisy)):
                    weights = self._decode(batch, common, hard=hard and noisy)
                for entry, weight in zip(batch, weights):
                    # the graph waits for the gradient; its value lives in the parameter and is not kept twice
                    entry.edge = get_gradient_edge(weight) if weight.requires_grad else None
                torch._foreach_copy_([entry.parameter.data for entry in batch], [weight.detach() for weight in weights])

    def pull_back(self) -> None:
        """Turn the parameters' gradients into the latents', and add the rate's. Advances the step of the draws.

        A parameter's gradient is freed as soon as its latents have theirs: both are never held for the whole model.
        """
        for batch in (batch for group in self._groups for batch in _batches(group)):
            used = [entry for entry in batch if entry.parameter.grad is not None]
            if len(used) == len(batch):
                self._pull_back(batch)
                continue
            for entry in batch:  # frozen or unused weights have no gradient: only the rate moves their latents
                entry.edge = None
            for entry in used:
                self._pull_back([entry])
        if self._priced:
            self._add_rate()
        self.step += 1

    def _pull_back(self, batch: list[Entry]) -> None:
        """Decodes anew what has no graph: it was written without one, or in one with others that have no gradient."""
        edges = [entry.edge for entry in batch if entry.edge is not None]
        if len(edges) < len(batch):
            with torch.enable_grad():
                weights = self._decode(batch, {}, hard=False)
            if not all(weight.requires_grad for weight in weights):
                return
            edges = [get_gradient_edge(weight) for weight in weights]
        torch.autograd.backward(edges, [entry.parameter.grad for entry in batch])
        for entry in batch:
            entry.parameter.grad = entry.edge = None

    def _add_rate(self) -> None:
        """The gradient of rate_weight · bits / parameters, added to the latents'."""
        bits = torch.stack([self._rate_of(group) for group in self._priced]).sum()
        latents = [latent for _, _, latent in self._trained()]
        # methods are told which way the rate goes: where weights have to grow, its weight is below zero
        sign = math.copysign(1.0, self.rate_weight)
        gradients = torch.autograd.grad(bits, latents, torch.full_like(bits, sign), allow_unused=True)
        pairs = [(z, g) for z, g in zip(latents, gradients) if g is not None]
        both = [(z.grad, g) for z, g in pairs if z.grad is not None]
        if self.controller is not None:
            equal = balance(both)
            per_weight = None if equal is None else equal * self.parameters
            self.rate_weight = self.controller.update(bits.item() + self._settled, self.sparsity(), per_weight)
        share = sign * self.rate_weight / self.parameters
        if both:
            torch._foreach_add_([of_loss for of_loss, _ in both], [of_rate for _, of_rate in both], alpha=share)
        for latent, gradient in pairs:
            if latent.grad is None:
                latent.grad = gradient * share

    def plan(self, steps: int, measure: Callable[[], int]) -> None:
        """With a target: a training of `steps` optimizer steps begins; `measure()` gives the file's bytes as of now."""
        if self.controller is not None:
            self.controller.plan(steps, measure)

    def outcome(self) -> Outcome | None:
        """How near the target, if there is one, the file comes now. Raises ConfigError: no training was planned."""
        return None if self.controller is None else self.controller.measured(self.sparsity())

    def sparsity(self) -> float:
        """The fraction of zeros among the weights whose rate can be trained, as they stand in the model."""
        zeros = [
            (joined([entry.parameter.data for entry in batch]) == 0).sum()
            for group in self._priced
            for batch in _batches(group)
        ]
        weights = sum(entry.slot.numel for group in self._priced for entry in group)
        return float(torch.stack(zeros).sum()) / max(weights, 1) if zeros else 0.0

    def rate(self) -> Tensor:
        """Bits of all slots: a scalar."""
        return torch.stack([self._rate_of(group) for group in self._groups] or [torch.zeros(())]).sum()

    def _rate_of(self, group: list[Entry]) -> Tensor:
        return group[0].method.rate_of_group([(e.latents, self._drawn(e)) for e in group])

    @property
    def noisy(self) -> bool:
        """Whether training steps see other weights than evaluations."""
        return any(e.method.noisy for e in self.entries.values())

    def trained(self) -> Iterator[tuple[nn.Parameter, Tensor, bool]]:
        """(parameter, latent, whether weight decay acts on it) for the user's optimizer, shared latents once."""
        for entry, name, latent in self._trained():
            if name not in entry.method.auxiliary:
                yield entry.parameter, latent, name in entry.method.decayed

    def auxiliary(self) -> Iterator[tuple[Tensor, float]]:
        """(latent, learning rate at the start) of those that an Adam beside the user's optimizer trains."""
        for entry, name, latent in self._trained():
            if name in entry.method.auxiliary:
                yield latent, entry.method.auxiliary[name]

    def _trained(self) -> Iterator[tuple[Entry, str, Tensor]]:
        seen: set[int] = set()
        for entry in self.entries.values():
            for name, latent in entry.latents.items():
                if latent.requires_grad and id(latent) not in seen:
                    seen.add(id(latent))
                    yield entry, name, latent

    def state_dict(self) -> dict[str, Any]:
        latents = {name: {k: z.detach() for k, z in e.latents.items()} for name, e in self.entries.items()}
        controller = None if self.controller is None else self.controller.state_dict()
        return {"step": self.step, "latents": latents, "controller": controller}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Latents and step as saved, and the weights they decode to. Raises ConfigError: other slots or shapes."""
        found, wanted = state["latents"], self.state_dict()["latents"]
        _check_same(found, wanted)
        with torch.no_grad():
            for name, entry in self.entries.items():
                entry.edge = None
                for key, latent in entry.latents.items():
                    latent.copy_(found[name][key])
        self.step = int(state["step"])
        if self.controller is not None and state["controller"] is not None:
            self.controller.load_state_dict(state["controller"])
            self.rate_weight = self.controller.rate_weight
        self.write()

    def _drawn(self, entry: Entry) -> Slot:
        key = f"{self.seed}/{self.step}/{entry.slot.name}".encode()
        return replace(entry.slot, draw=int.from_bytes(blake2b(key, digest_size=7).digest(), "big"))

    def _decode(self, batch: list[Entry], common: Latents, *, hard: bool) -> Sequence[Tensor]:
        method = batch[0].method
        return method.decode_group(
            [({**e.latents, **common}, self._drawn(e) if method.noisy else e.slot) for e in batch], hard=hard
        )


def _batches(group: Sequence[Entry]) -> Iterator[list[Entry]]:
    return batches(group, lambda entry: entry.parameter)


def _check_same(found: dict[str, Latents], wanted: dict[str, Latents]) -> None:
    shapes = [{f"{n}:{k}": tuple(z.shape) for n, zs in side.items() for k, z in zs.items()} for side in (found, wanted)]
    if shapes[0] != shapes[1]:
        differing = sorted(k for k in shapes[0].keys() | shapes[1].keys() if shapes[0].get(k) != shapes[1].get(k))
        raise ConfigError(
            f"the saved latents are not this model's: {len(differing)} differ, first {differing[0]} "
            f"(saved {shapes[0].get(differing[0])}, here {shapes[1].get(differing[0])}). Did rules or model change?"
        )
