"""Any torch optimizer on latents: the same steps as on plain weights, schedulers, decay, state."""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from methods import TABLE, Scaled, name_of
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from toys import Toy, compress, loss_of

from hfcompress.compressor import Compressor
from hfcompress.errors import ConfigError
from hfcompress.methods import Dense, Uniform
from hfcompress.optimizer import CompressedOptimizer
from hfcompress.reparameterization import Description, Latents, Reparameterization, Slot

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
}
SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "none": lambda o: LambdaLR(o, lambda step: 1.0),
    "warm-up": lambda o: LambdaLR(o, lambda step: min(1.0, (step + 1) / 4) * 0.9**step),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=6),
    "one-cycle": lambda o: OneCycleLR(o, max_lr=0.05, total_steps=12),  # moves momentum too
}
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """As the Trainer makes them: norms and biases without decay."""
    decayed = [p for name, p in model.named_parameters() if "bias" not in name and "norm" not in name]
    rest = [p for name, p in model.named_parameters() if "bias" in name or "norm" in name]
    return [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int], schedule: Any = None) -> None:
    for step in steps:
        if isinstance(optimizer, CompressedOptimizer):
            optimizer.train()
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    if isinstance(optimizer, CompressedOptimizer):
        optimizer.eval()


def compressed(
    model: nn.Module, optimizer: str, method: Reparameterization, pattern: str = "*"
) -> tuple[CompressedOptimizer, Compressor]:
    compressor = compress(model, method, pattern)
    return CompressedOptimizer(OPTIMIZERS[optimizer](groups_of(model)), compressor), compressor


@optimizers
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pattern", ["*", "*weight", "norm.*"])
def test_the_same_trajectory_as_the_plain_optimizer(optimizer: str, schedule: str, pattern: str) -> None:
    plain, ours = Toy(), Toy()
    base = OPTIMIZERS[optimizer](groups_of(plain))
    train(plain, base, range(8), SCHEDULES[schedule](base))
    outer, _ = compressed(ours, optimizer, Dense("float32"), pattern)
    train(ours, outer, range(8), SCHEDULES[schedule](outer))
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name
    assert not torch.equal(ours.conv.weight, Toy().conv.weight)
    assert torch.equal(ours.frozen.weight, Toy().frozen.weight) and torch.equal(ours.unused.weight, Toy().unused.weight)


def test_the_outer_optimizer_shows_the_models_parameters() -> None:
    model = Toy()
    outer, compressor = compressed(model, "adamw", Uniform())
    shown = {id(p) for group in outer.param_groups for p in group["params"]}
    stepped = {id(p) for group in outer.base.param_groups for p in group["params"]}
    assert shown == {id(p) for p in model.parameters()}
    assert stepped == {id(latent) for _, latent, _ in compressor.trained()}


def test_schedulers_act_on_the_base() -> None:
    outer, _ = compressed(Toy(), "sgd", Scaled())
    schedule = OneCycleLR(outer, max_lr=0.05, total_steps=12)
    train(Toy(), outer, range(3), schedule)
    outer.step()
    for name in ("lr", "momentum"):
        assert {group[name] for group in outer.base.param_groups} == {group[name] for group in outer.param_groups}


@optimizers
def test_decay_acts_on_decayed_latents_alone(optimizer: str) -> None:
    model = Toy()
    outer, compressor = compressed(model, optimizer, Scaled(), "*weight")
    before = {id(latent): latent.detach().clone() for _, latent, _ in compressor.trained()}
    for _, latent, _ in compressor.trained():
        latent.grad = torch.zeros_like(latent)  # nothing but decay can move them
    outer.base.step()
    without_decay = {id(model.norm.weight)}
    for parameter, latent, decayed in compressor.trained():
        moved = not torch.equal(before[id(latent)], latent)
        assert moved == (decayed and id(parameter) not in without_decay)
    outer.step()
    decays = {group["weight_decay"] for group in outer.base.param_groups if group["fixed_decay"]}
    assert decays == {0.0}


@optimizers
@pytest.mark.parametrize("method", [*TABLE, Scaled()], ids=name_of)
def test_a_resumed_run_continues_bit_for_bit(optimizer: str, method: Reparameterization) -> None:
    whole, first, second = Toy(), Toy(), Toy(seed=5)
    outer, _ = compressed(whole, optimizer, method)
    schedule = SCHEDULES["warm-up"](outer)
    train(whole, outer, range(6), schedule)

    outer, _ = compressed(first, optimizer, method)
    schedule = SCHEDULES["warm-up"](outer)
    train(first, outer, range(3), schedule)
    buffer = io.BytesIO()
    torch.save([first.state_dict(), outer.state_dict(), schedule.state_dict()], buffer)
    buffer.seek(0)
    weights, state, clock = torch.load(buffer, weights_only=True)

    second.load_state_dict(weights)
    outer, _ = compressed(second, optimizer, method)
    schedule = SCHEDULES["warm-up"](outer)
    outer.load_state_dict(state)
    schedule.load_state_dict(clock)
    train(second, outer, range(3, 6), schedule)
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


@dataclass(frozen=True)
class Anchored(Reparameterization):
    """weight = (anchor + offset) · exp(log_scale): a constant, a latent for the user's optimizer and one for Adam."""

    rate_of_scale: float = 0.01
    frozen: ClassVar[frozenset[str]] = frozenset({"anchor"})

    @property
    def auxiliary(self) -> dict[str, float]:
        return {"log_scale": self.rate_of_scale}

    def init(self, weight: Tensor, slot: Slot) -> Latents:
        return {"anchor": weight.clone(), "offset": torch.zeros_like(weight), "log_scale": weight.new_zeros(())}

    def decode(self, latents: Latents, slot: Slot, *, hard: bool) -> Tensor:
        return (latents["anchor"] + latents["offset"]) * latents["log_scale"].exp()

    def rate(self, latents: Latents, slot: Slot) -> Tensor:
        return latents["offset"].abs().sum() + latents["log_scale"]

    def describe(self, latents: Latents, slot: Slot) -> Description:
        raise NotImplementedError

    def restore(self, description: Description, slot: Slot) -> Latents:
        raise NotImplementedError


def scales(compressor: Compressor) -> list[Tensor]:
    return [entry.latents["log_scale"] for entry in compressor.entries.values()]


def test_frozen_latents_are_constants_in_the_state() -> None:
    model = Toy()
    outer, compressor = compressed(model, "adamw", Anchored())
    train(model, outer, range(3))
    for name, entry in compressor.entries.items():
        anchor = entry.latents["anchor"]
        assert not anchor.requires_grad and anchor.grad is None
        assert torch.equal(anchor, Toy().get_parameter(name))
    other, loaded = compressed(Toy(seed=3), "adamw", Anchored())
    other.load_state_dict(outer.state_dict())
    anchors = [c.entries["conv.weight"].latents["anchor"] for c in (compressor, loaded)]
    assert torch.equal(*anchors) and not torch.equal(anchors[0], Toy(seed=3).conv.weight)


def test_auxiliary_latents_have_an_adam_of_their_own() -> None:
    model = Toy()
    outer, compressor = compressed(model, "sgd", Anchored())
    stepped = {id(p) for group in outer.base.param_groups for p in group["params"]}
    own = {id(p) for group in outer.auxiliary.param_groups for p in group["params"]}
    assert own == {id(scale) for scale in scales(compressor)} and not own & stepped
    assert {id(latent) for latent, _ in compressor.auxiliary()} == own

    copies = [scale.detach().clone().requires_grad_() for scale in scales(compressor)]
    adam = torch.optim.Adam(copies, lr=0.01)
    for step in range(4):
        loss_of(model, step).backward()
        edges = [(e.parameter, e.parameter.grad) for e in compressor.entries.values()]
        for copy, (weight, gradient) in zip(copies, edges):
            copy.grad = None if gradient is None else (weight * gradient).sum().detach()
        adam.step()
        outer.step()
        outer.zero_grad()
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(scales(compressor), copies))
        assert all(scale.grad is None for scale in scales(compressor))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_own_adam_follows_the_schedule(schedule: str) -> None:
    """In proportion to the user's learning rate, at most the rate that the method names."""
    model = Toy()
    outer, _ = compressed(model, "sgd", Anchored(rate_of_scale=0.3))
    clock = SCHEDULES[schedule](outer)
    highest = 0.05 if schedule == "one-cycle" else 0.1
    for step in range(6):
        wanted = 0.3 * outer.param_groups[0]["lr"] / highest
        train(model, outer, [step], clock)
        assert [group["lr"] for group in outer.auxiliary.param_groups] == [pytest.approx(wanted)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_own_adam_resumes_bit_for_bit(schedule: str) -> None:
    def begun(model: nn.Module) -> tuple[CompressedOptimizer, Compressor, Any]:
        outer, compressor = compressed(model, "adamw", Anchored())
        return outer, compressor, SCHEDULES[schedule](outer)

    whole, first, second = Toy(), Toy(), Toy(seed=5)
    outer, wanted, clock = begun(whole)
    train(whole, outer, range(6), clock)
    outer, _, clock = begun(first)
    train(first, outer, range(3), clock)
    buffer = io.BytesIO()
    torch.save([outer.state_dict(), clock.state_dict()], buffer)
    buffer.seek(0)
    state, time = torch.load(buffer, weights_only=True)
    outer, found, clock = begun(second)
    outer.load_state_dict(state)
    clock.load_state_dict(time)
    train(second, outer, range(3, 6), clock)
    assert all(torch.equal(a, b) for a, b in zip(scales(found), scales(wanted)))
    assert any(scale != 0 for scale in scales(found))


def test_noise_in_steps_hard_weights_between() -> None:
    model, method = Toy(), Uniform(bits=2, stochastic=True)
    outer, compressor = compressed(model, "sgd", method)
    entry = compressor.entries["conv.weight"]

    def hard() -> Tensor:
        return method.decode(entry.latents, entry.slot, hard=True)

    for step in range(3):
        assert torch.equal(model.conv.weight, hard())
        outer.train()
        assert not torch.equal(model.conv.weight, hard())
        loss_of(model, step).backward()
        outer.eval()
        assert torch.equal(model.conv.weight, hard())
        outer.step()


def test_gradients_of_claimed_weights_are_freed_and_others_left_to_zero_grad() -> None:
    model = Toy()
    outer, compressor = compressed(model, "sgd", Uniform(), "conv.*")
    loss_of(model, 0).backward()
    outer.step()
    assert model.conv.weight.grad is None and model.norm.weight.grad is not None
    assert all(latent.grad is None for _, latent, _ in compressor.trained())


def test_closures_are_called() -> None:
    model = Toy()
    outer, _ = compressed(model, "sgd", Uniform())

    def closure() -> Tensor:
        outer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    assert outer.step(closure) > outer.step(closure)


def test_an_optimizer_that_has_stepped_is_refused() -> None:
    model = Toy()
    base = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, base, range(1))
    with pytest.raises(ConfigError, match="already stepped"):
        CompressedOptimizer(base, compress(model, Uniform()))


def test_foreign_states_are_refused() -> None:
    model = Toy()
    outer, _ = compressed(model, "sgd", Uniform())
    with pytest.raises(ConfigError, match="without compression"):
        outer.load_state_dict(OPTIMIZERS["sgd"](groups_of(model)).state_dict())
    other, _ = compressed(Toy(), "sgd", Uniform(), "conv.*")
    with pytest.raises(ConfigError, match="not this model's"):
        outer.load_state_dict(other.state_dict())
