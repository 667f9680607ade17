"""Targets: how they are written, and a controller that comes to them on plants of every kind and in real trainings."""

import io
import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods import Scaled
from pydantic import ValidationError
from small import WEIGHTS, digits, equal, image_trainer, resnet, weights
from toys import Toy, compress, loss_of

from hfcompress.checkpoint import FILE_NAME
from hfcompress.compressor import Compressor
from hfcompress.controller import Controller, Outcome, balance
from hfcompress.errors import ConfigError
from hfcompress.methods import Dense, SoftThreshold, Uniform
from hfcompress.reparameterization import Kind
from hfcompress.schema import Compression, Rule
from hfcompress.target import Target

# ------------------------------------------------------------------------------------------ how they are written


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("10MB", 10_000_000),
        ("8.5 KB", 8500),
        ("8.5 kB", 8500),
        ("0.5gb", 500_000_000),
        (" 300 B ", 300),
        ("1.0004 KB", 1000),
        (123, 123),
    ],
)
def test_sizes_may_have_decimal_units(written, size: int) -> None:
    assert Target(bytes=written).bytes == size


@given(st.integers(1, 10**15))
def test_sizes_are_read_as_they_are_shown(size: int) -> None:
    assert Target(bytes=str(size) + "B") == Target(bytes=size)


@pytest.mark.parametrize(
    "written", ["10 MiB", "10", "MB", "-3 KB", "1e3 B", "1,5 KB", "", "10 MB each", "0 B", "0.1 B"]
)
def test_other_sizes_are_refused(written: str) -> None:
    with pytest.raises(ValidationError, match=r"found .*, expected a whole number.* B, KB, MB, GB|greater than 0"):
        Target(bytes=written)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bytes": 10, "sparsity": 0.5},
        {"bits_per_weight": 2.0, "bytes": "1 KB"},
        {"sparsity": 1.0},
        {"sparsity": 0.0},
        {"sparsity": "0.9"},
        {"sparsity": math.nan},
        {"bits_per_weight": 0.0},
        {"bits_per_weight": math.inf},
        {"bits_per_weight": True},
        {"bytes": 0},
        {"bytes": -5},
        {"bytes": 1.5},
        {"bytes": True},
        {"size": 3},
    ],
)
def test_impossible_targets_are_refused(fields) -> None:
    with pytest.raises(ValidationError):
        Target(**fields)


def test_a_target_beside_a_rate_weight_is_refused() -> None:
    target = Target(sparsity=0.5)
    with pytest.raises(ValidationError, match="leave out 'target' or 'rate_weight'"):
        Compression(rules=(Rule(method=SoftThreshold()),), rate_weight=0.1, target=target)
    with pytest.raises(
        ConfigError, match=r"rate_weight is 0.1 and the target is sparsity 0.5, but .*leave one of them out"
    ):
        compress(Toy(), SoftThreshold(), rate_weight=0.1, target=target)


@pytest.mark.parametrize("target", [Target(sparsity=0.5), Target(bytes="1 MB"), Target(bits_per_weight=3.0)])
@pytest.mark.parametrize("method", [Uniform(), Dense()])
def test_a_target_that_no_method_can_be_trained_for_is_refused(target: Target, method) -> None:
    with pytest.raises(
        ConfigError, match=rf"the target is {target.kind} [\d.,]+, but no method .*such as softthreshold"
    ):
        compress(Toy(), method, target=target)
    rules = [Rule(method=SoftThreshold(), pattern="conv.*"), Rule(method=method)]
    Compressor(Toy(), rules, target=target)  # one is enough


# ---------------------------------------------------------------------------------------------------- plants


@dataclass
class Plant:
    """Something whose rate a weight moves: d log bits = −gain · (λ g − pull) / √((λ g − pull)² + noise²) per step.

    `g`: the rate's gradient in units of the loss's, unknown to the controller; `pull`: how much the loss resists;
    `lag`: steps of momentum; `bias`, `extra`: the file is bias · bits / 8 + extra bytes; `shrink`: falls by itself.
    """

    steps: int = 400
    gain: float = 0.05
    g: float = 1.0
    pull: float = 0.05
    noise: float = 0.3
    lag: float = 10.0
    bias: float = 1.0
    extra: float = 0.0
    shrink: float = 0.0
    jitter: float = 0.0
    schedule: Callable[[float], float] = lambda way: 0.5 * (1 + math.cos(math.pi * way))
    bits: float = 8e6
    speed: float = 0.0
    done: int = 0

    @property
    def file(self) -> int:
        return round(self.bias * self.bits / 8 + self.extra)

    @property
    def sparsity(self) -> float:
        return 1 - self.bits / 8e6

    def step(self, controller: Controller) -> None:
        seen = self.bits * math.exp(self.jitter * random.Random(self.done).gauss(0, 1))
        weight = controller.update(seen, self.sparsity, 1 / self.g)
        resistance = self.pull * (8e6 / self.bits) ** 0.3 if self.bits < 8e6 else 0.0
        force = weight * self.g - resistance
        self.speed += (force / math.hypot(force, self.noise) - self.speed) / self.lag
        rate = self.schedule(self.done / self.steps)
        self.bits = min(self.bits * math.exp(-rate * (self.gain * self.speed + self.shrink)), 8e6)
        self.done += 1

    def train(self, target: Target) -> Controller:
        controller = Controller(target, 1_000_000)
        controller.plan(self.steps, lambda: self.file)
        for _ in range(self.steps):
            self.step(controller)
        return controller


PLANTS = {
    "typical": Plant(),
    "short": Plant(steps=150, gain=0.1),
    "long": Plant(steps=5000, gain=0.01),
    "constant learning rate": Plant(schedule=lambda way: 1.0),
    "warm-up": Plant(schedule=lambda way: min(1, way / 0.1) * (1 - way)),
    "tiny gradient of the rate": Plant(g=1e-6),
    "huge gradient of the rate": Plant(g=1e6),
    "stiff": Plant(pull=0.5),
    "nothing pulls back": Plant(pull=0.0),
    "shrinks by itself": Plant(pull=0.0, shrink=0.002),
    "quick": Plant(gain=0.2),
    "hardly noisy": Plant(noise=0.05),
    "biased estimate": Plant(bias=1.3, extra=9000),
    "estimate with jitter": Plant(jitter=0.005),
}
every_plant = pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)


@every_plant
@pytest.mark.parametrize("target", [Target(sparsity=0.9), Target(bytes=150_000), Target(bits_per_weight=3.0)])
def test_plants_come_to_their_target(plant: Plant, target: Target) -> None:
    plant = replace(plant)
    controller = plant.train(target)
    assert controller.measured(plant.sparsity).reached, str(controller.measured(plant.sparsity))
    assert controller.arrived


@every_plant
def test_the_size_comes_down_smoothly(plant: Plant) -> None:
    """Never by more than a third below the end, and the last fifth is spent at the target."""
    plant = replace(plant)
    controller, seen = Controller(Target(bytes=100_000), 1_000_000), []
    controller.plan(plant.steps, lambda: plant.file)
    for _ in range(plant.steps):
        plant.step(controller)
        seen.append(plant.file)
    assert min(seen) > 66_000
    assert all(abs(size / 100_000 - 1) < 0.05 for size in seen[-plant.steps // 5 :])


def test_a_target_above_the_start_is_no_reason_to_shrink() -> None:
    plant = Plant()
    controller = plant.train(Target(bytes=3_000_000))
    assert plant.file == 1_000_000 and not controller.measured(0.0).reached
    assert str(controller.measured(0.0)) == "bytes 3,000,000 was asked for, 1,000,000 found (-66.7 %)"


def test_a_target_that_cannot_be_reached() -> None:
    """The weight of the rate stays finite, and what was found is said."""
    plant = Plant(extra=200_000)
    controller = plant.train(Target(bytes=100_000))
    assert not controller.measured(0.0).reached
    assert 0 < controller.log_line()["rate_weight"] <= 10
    assert f"{plant.file:,}" in str(controller.measured(0.0))


def test_the_file_is_measured_now_and_then() -> None:
    plant, calls = Plant(), []
    controller = Controller(Target(bytes=150_000), 1_000_000)
    controller.plan(plant.steps, lambda: calls.append(plant.done) or plant.file)
    for _ in range(plant.steps):
        plant.step(controller)
    assert calls == [0, 120, 200, 260, 320, 380]


def test_a_saved_controller_continues_bit_for_bit() -> None:
    whole, half = Plant(jitter=0.01, bias=1.2), Plant(jitter=0.01, bias=1.2)
    wanted = whole.train(Target(bytes=150_000)).log_line()
    controller = Controller(Target(bytes=150_000), 1_000_000)
    controller.plan(half.steps, lambda: half.file)
    for step in range(half.steps):
        if step in (0, 1, 100, 205, 399):
            buffer = io.BytesIO()
            torch.save(controller.state_dict(), buffer)
            buffer.seek(0)
            controller = Controller(Target(bytes=150_000), 1_000_000)
            controller.plan(half.steps, lambda: half.file)
            controller.load_state_dict(torch.load(buffer, weights_only=True))
        half.step(controller)
    assert half.bits == whole.bits and controller.log_line() == wanted


def test_a_second_training_starts_from_where_the_first_ended() -> None:
    plant = Plant()
    controller = plant.train(Target(bytes=150_000))
    controller.plan(plant.steps, lambda: plant.file)
    plant.done = 0
    for _ in range(plant.steps):
        plant.step(controller)
        assert abs(plant.file / 150_000 - 1) < 0.05


def test_without_a_plan_nothing_can_be_controlled() -> None:
    controller = Controller(Target(sparsity=0.5), 100)
    assert not controller.arrived
    for ask in (lambda: controller.update(1.0, 0.0, 1.0), lambda: controller.measured(0.0)):
        with pytest.raises(ConfigError, match=r"target \(sparsity\) .* call Compressor.plan\(steps, measure\)"):
            ask()


def test_the_balance_is_that_of_the_gradients() -> None:
    loss = [torch.tensor([3.0, 4.0]), torch.tensor([2.0]), torch.zeros(2), torch.ones(1)]
    rate = [torch.tensor([0.0, 10.0]), torch.tensor([1.0]), torch.ones(2), torch.zeros(1)]
    assert balance(list(zip(loss, rate))) == pytest.approx(math.sqrt(0.5 * 2))
    assert balance([]) is None and balance([(torch.zeros(3), torch.ones(3))]) is None


@pytest.mark.parametrize(
    ("outcome", "reached", "said"),
    [
        (Outcome("sparsity", 0.9, 0.9049), True, "sparsity 0.9 was asked for, 0.9049 found (+0.49 points)"),
        (Outcome("sparsity", 0.9, 0.894), False, "sparsity 0.9 was asked for, 0.894 found (-0.60 points)"),
        (Outcome("bytes", 8500, 8669), True, "bytes 8,500 was asked for, 8,669 found (+2.0 %)"),
        (Outcome("bytes", 8500, 9000), False, "bytes 8,500 was asked for, 9,000 found (+5.9 %)"),
        (Outcome("bits_per_weight", 3.0, 2.9), False, "bits_per_weight 3 was asked for, 2.9 found (-3.3 %)"),
    ],
)
def test_an_outcome_says_how_near_it_came(outcome: Outcome, reached: bool, said: str) -> None:
    assert outcome.reached == reached and str(outcome) == said


# --------------------------------------------------------------------------------------------- the compressor


def test_the_compressor_balances_the_rate_with_the_loss() -> None:
    """At the first step λ is a tenth of the weight at which both gradients are equal, less a seventh for λ₋."""
    model = Toy()
    compressor = compress(model, Scaled(), target=Target(bytes=1000))
    compressor.plan(100, lambda: 10_000)
    loss_of(model, 0).backward()
    plain = compress(Toy(), Scaled())
    plain.write()
    loss_of(plain.model, 0).backward()
    plain.pull_back()
    compressor.pull_back()
    latents = {id(z): z for e in plain.entries.values() for z in e.latents.values() if z.grad is not None}.values()
    rate = torch.autograd.grad(plain.rate(), [*latents], allow_unused=True)
    ratios = [(z.grad.norm() / g.norm()).log() for z, g in zip(latents, rate) if g is not None]
    mean = torch.stack([ratio for ratio in ratios if ratio.isfinite()]).mean()
    wanted = plain.parameters * mean.exp().item() * 0.1 * (1 - math.exp(-2))
    assert compressor.rate_weight == pytest.approx(wanted, rel=1e-5)


def test_zeros_are_counted_where_methods_make_them() -> None:
    model = Toy()
    model.norm.bias.data.zero_()
    rules = [Rule(method=SoftThreshold(), pattern="conv.*"), Rule(method=Dense())]
    compressor = Compressor(model, rules, target=Target(sparsity=0.5))
    claimed = [model.conv.weight, model.conv.bias]
    wanted = sum(int((p == 0).sum()) for p in claimed) / sum(p.numel() for p in claimed)
    assert compressor.sparsity() == wanted


def test_bits_per_weight_count_what_a_file_holds() -> None:
    model = Toy()
    compressor = compress(model, SoftThreshold(), "conv.*", target=Target(bits_per_weight=4.0))
    compressor.plan(10, lambda: 1000)
    assert compressor.outcome() == Outcome("bits_per_weight", 4.0, 8000 / sum(p.numel() for p in model.parameters()))
    assert compress(Toy(), SoftThreshold()).outcome() is None


# ------------------------------------------------------------------------------------------------- trainings


def trainer_of(folder, target: Target, method=None, **settings):
    """A ResNet of 8 layers on scikit-learn's digits, from scratch."""
    compression = Compression(rules=(Rule(method=method or SoftThreshold(), kinds=WEIGHTS),), target=target)
    given = {"compression": compression, "train_dataset": digits()[:512], "eval_dataset": digits()[512:544]}
    defaults = {"max_steps": 100, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "logging_steps": 10}
    return image_trainer(folder, resnet(model_args={"blocks": 1}), given=given, **{**defaults, **settings})


@pytest.mark.parametrize(
    ("target", "method"),
    [(Target(sparsity=0.9), SoftThreshold()), (Target(bytes="10 KB"), SoftThreshold(survivors=4))],
    ids=["sparsity", "bytes"],
)
def test_a_training_comes_to_its_target(tmp_path, caplog, target: Target, method) -> None:
    trainer = trainer_of(tmp_path, target, method)
    with caplog.at_level(logging.WARNING, "hfcompress"):
        trainer.train()
    assert not caplog.records
    size = trainer.save_compressed(tmp_path / "file").total
    assert size == (tmp_path / "file" / FILE_NAME).stat().st_size
    claimed = [e.parameter for e in trainer.compressor.entries.values()]
    sparsity = sum(int((p == 0).sum()) for p in claimed) / sum(p.numel() for p in claimed)
    found = {"sparsity": sparsity, "bytes": size}[target.kind]
    assert trainer.compressor.outcome() == Outcome(target.kind, target.wanted, found)
    assert trainer.compressor.outcome().reached
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 10 and all({"rate_weight", "bits_per_weight", "sparsity"} <= entry.keys() for entry in logged)
    assert logged[0]["bits_per_weight"] > 3 and logged[-1]["sparsity"] == pytest.approx(sparsity, abs=0.01)
    assert logged[-1]["loss"] < 2.0


def test_a_target_that_was_missed_is_said_to_be(tmp_path, caplog) -> None:
    trainer = trainer_of(tmp_path, Target(bytes=1000), max_steps=4)
    with caplog.at_level(logging.WARNING, "hfcompress"):
        trainer.train()
    (record,) = caplog.records
    size = trainer.save_compressed(tmp_path / "file").total
    found = f"bytes 1,000 was asked for, {size:,} found (+{size / 10 - 100:.1f} %)"
    assert record.getMessage().startswith(f"the target was not reached: {found} after 4 steps.")
    assert not trainer.compressor.outcome().reached


def test_a_matrix_that_came_to_nothing_is_named(tmp_path, caplog) -> None:
    trainer = trainer_of(tmp_path, Target(bytes=1000), max_steps=1)
    entry = next(e for e in trainer.compressor.entries.values() if e.slot.kind == Kind.CONV)
    entry.latents["threshold"].data.fill_(20.0)
    with caplog.at_level(logging.WARNING, "hfcompress"):
        trainer.train()
    (message,) = (record.getMessage() for record in caplog.records if "every weight is zero" in record.getMessage())
    assert message.startswith(f"{entry.slot.name}: every weight is zero")


def test_resuming_is_exact_with_a_target(tmp_path) -> None:
    def trainer():
        return trainer_of(tmp_path, Target(bytes=50_000), max_steps=9, save_strategy="steps", save_steps=4)

    whole = trainer()
    whole.train()
    for step in (4, 8):
        resumed = trainer()
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert equal(weights(resumed.model), weights(whole.model))
        ours, theirs = (t.compressor.state_dict()["controller"] for t in (resumed, whole))
        assert ours == theirs
    state = whole.compressor.state_dict()
    state["controller"]["rate_weight"] = -3.0  # methods are told on the next step that weights have to grow
    resumed.compressor.load_state_dict(state)
    assert resumed.compressor.rate_weight == -3.0


class Falling:
    """A metric that is best at the first evaluation."""

    value = 0

    def __call__(self, prediction) -> dict[str, float]:
        self.value -= 1
        return {"quality": self.value}


def test_the_best_model_is_one_that_came_to_the_target(tmp_path) -> None:
    """Scores are highest before anything is pruned; those checkpoints are not what was asked for."""
    evaluated = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 15, "save_steps": 15}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "quality", "greater_is_better": True}
    trainer = trainer_of(tmp_path, Target(sparsity=0.3), max_steps=150, **evaluated, **best)
    trainer.compute_metrics = Falling()
    trainer.train()
    assert 75 <= trainer.state.best_global_step < 150
    assert trainer.compressor.outcome().reached
