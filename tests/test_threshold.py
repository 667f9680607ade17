"""`methods/threshold.py` against the paper's loops, and what only this method promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import soft_count, soft_threshold
from toys import Toy, compress

from hfcompress.coding import Symbols
from hfcompress.errors import ConfigError, FormatError
from hfcompress.methods import SoftThreshold
from hfcompress.methods.threshold import _SHARPNESS
from hfcompress.reparameterization import Latents, Slot

near_one = st.floats(-2, 2, width=32)
weights_and_s = st.tuples(st.lists(near_one, min_size=1, max_size=60), st.floats(-8, 2, width=32))


def latents_of(weights: list[float], s: float) -> Latents:
    return {"weight": torch.tensor(weights).requires_grad_(), "threshold": torch.tensor(s).requires_grad_()}


def slot_of(weights: list[float]) -> Slot:
    return Slot("w", (len(weights),))


def trained(n: int, sparsity: float, seed: int = 0) -> torch.Tensor:
    """Normal weights of which that part lies below a threshold of ½ (s = 0)."""
    weight = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return weight * (0.5 / weight.abs().quantile(sparsity))


# -------------------------------------------------------------------------------------------- the paper


@given(weights_and_s, st.integers(0, 2**32))
def test_equals_the_papers_loops(given_: tuple[list[float], float], seed: int) -> None:
    weights, s = given_
    g = 1 / (1 + math.exp(-s))
    assume(all(abs(abs(w) - g) > 1e-6 and w for w in weights))  # where float32 cannot tell on which side a weight lies
    gradients = torch.randn(len(weights), generator=torch.Generator().manual_seed(seed)).tolist()
    latents, method = latents_of(weights, s), SoftThreshold()
    decoded = method.decode(latents, slot_of(weights), hard=False)
    decoded.backward(torch.tensor(gradients))
    values, of_weights, of_s = soft_threshold(weights, s, gradients)
    for found, wanted in zip(decoded.tolist(), values, strict=True):
        assert abs(found - wanted) <= 2**-11 * abs(wanted) + 2**-24  # float16
    assert latents["weight"].grad.tolist() == pytest.approx(of_weights)
    assert latents["threshold"].grad.item() == pytest.approx(of_s, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("survivors", [2, 3, 8])
def test_the_grid_changes_no_gradient(survivors: int) -> None:
    weight, gradient = trained(500, 0.6), torch.randn(500)
    found = []
    for method in (SoftThreshold(), SoftThreshold(survivors=survivors)):
        latents = latents_of(weight.tolist(), 0.0)
        method.decode(latents, Slot("w", (500,)), hard=False).backward(gradient)
        found.append([latents[name].grad for name in latents])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_tensor_that_starts_at_zero_can_leave_it() -> None:
    method, slot = SoftThreshold(), Slot("w", (4,))
    latents = method.init(torch.zeros(4), slot)
    latents["weight"].requires_grad_()
    method.decode(latents, slot, hard=False).backward(torch.ones(4))
    assert torch.equal(latents["weight"].grad, torch.ones(4))


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1.0, 40.0])
def test_the_first_threshold_is_small_and_alive(scale: float) -> None:
    weight, slot = scale * torch.randn(2000, generator=torch.Generator().manual_seed(0)), Slot("w", (2000,))
    method = SoftThreshold()
    latents = method.init(weight, slot)
    for latent in latents.values():
        latent.requires_grad_()
    decoded = method.decode(latents, slot, hard=False)
    assert (decoded == 0).float().mean() < 0.02
    assert (decoded - weight).norm() < 0.02 * weight.norm()
    method.rate(latents, slot).backward()
    assert latents["threshold"].grad < -50  # bits for an e-fold


def test_weights_above_the_highest_threshold_stay() -> None:
    method, slot = SoftThreshold(), Slot("w", (3,))
    latents = {"weight": torch.tensor([1000.0, -70.0, 1e-3]), "threshold": torch.tensor(50.0)}
    assert method.decode(latents, slot, hard=True).tolist() == [999, -69, 0]


# ----------------------------------------------------------------------------------------------- the grid


@given(st.integers(2, 8), st.integers(1, 400), st.floats(0.1, 0.98))
def test_survivors_lie_on_the_grid_and_near(bits: int, n: int, sparsity: float) -> None:
    weight = trained(n, sparsity, seed=n)
    latents, slot = {"weight": weight, "threshold": torch.tensor(0.0)}, Slot("w", (n,))
    exact, grid = (SoftThreshold(survivors=k).decode(latents, slot, hard=True) for k in ("float16", bits))
    assert torch.equal(exact == 0, grid == 0) and torch.equal(exact.sign(), grid.sign())
    assert len(grid.unique()) <= 2**bits - 1
    top = 2 ** (bits - 1) - 1
    description = SoftThreshold(survivors=bits).describe(latents, slot)
    step = float(description["step"][0])
    inside = exact.abs() <= top * step
    assert (
        not inside.any() or (exact - grid)[inside].abs().max() <= 0.5 * step * (1 + 2**-9) + 2**-11 * exact.abs().max()
    )


@pytest.mark.parametrize(("bits", "error"), [(2, 0.75), (3, 0.36), (4, 0.19), (5, 0.11), (8, 0.02)])
def test_the_step_suits_survivors_that_fall_off_exponentially(bits: int, error: float) -> None:
    """Relative error; the best that a grid can do for them is 0.707, 0.331, 0.176, 0.098 and 0.017."""
    uniform = torch.rand(50_000, generator=torch.Generator().manual_seed(0))
    weight = -0.02 * uniform.log() + 0.5
    latents, slot = {"weight": weight, "threshold": torch.tensor(0.0)}, Slot("w", (50_000,))
    exact, grid = (SoftThreshold(survivors=k).decode(latents, slot, hard=True) for k in ("float16", bits))
    assert (exact - grid).norm() < error * exact.norm()


def test_the_step_does_not_depend_on_the_order_of_the_sum() -> None:
    weight = trained(70_000, 0.9)
    found = {
        float(
            SoftThreshold(survivors=4).describe({"weight": w, "threshold": torch.tensor(0.0)}, Slot("w", (70_000,)))[
                "step"
            ][0]
        )
        for w in (weight, weight.flip(0), weight[torch.randperm(70_000)])
    }
    assert len(found) == 1


# ------------------------------------------------------------------------------------------------ the rate


@pytest.mark.parametrize("survivors", ["float16", 2, 4, 8])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.95])
def test_the_rate_is_what_the_coder_needs(survivors, sparsity: float) -> None:
    method, slot = SoftThreshold(survivors=survivors), Slot("w", (20_000,))
    latents = {"weight": trained(20_000, sparsity), "threshold": torch.tensor(0.0)}
    description = method.describe(latents, slot)
    arrays = sum(8 * part.nbytes for part in description.values() if isinstance(part, np.ndarray))
    coded = sum(part.entropy() for part in description.values() if isinstance(part, Symbols))
    assert method.rate(latents, slot).item() == pytest.approx(arrays + coded, rel=1e-6)


@given(weights_and_s)
def test_the_gradient_is_that_of_the_soft_count(given_: tuple[list[float], float]) -> None:
    weights, s = given_
    g = 1 / (1 + math.exp(-s))
    assume(all(1e-3 < abs(w) / g < 1e3 for w in weights))
    latents, method, h = latents_of(weights, s), SoftThreshold(), 1e-6
    method.rate(latents, slot_of(weights)).backward()
    alive = sum(abs(w) > g for w in weights)
    price = max(16 + math.log2((len(weights) - alive + 1) / (alive + 1)), 1) * (1 if alive else -1)

    def slope(at) -> float:
        return price * (at(h) - at(-h)) / (2 * h)

    by_s = slope(lambda d: soft_count(weights, s + d, _SHARPNESS))
    assert latents["threshold"].grad.item() == pytest.approx(by_s, rel=1e-3, abs=1e-4)
    for i, w in enumerate(weights):
        by_weight = slope(lambda d, w=w: soft_count([w * (1 + d)], s, _SHARPNESS)) / w
        assert latents["weight"].grad[i].item() == pytest.approx(by_weight, rel=1e-3, abs=1e-3 * abs(price) / abs(w))


@pytest.mark.parametrize("survivors", ["float16", 4])
def test_a_tensor_is_not_pruned_far_below_the_others(survivors) -> None:
    """Half alive; a tenth, which is a fifth of the density of all; none at all; and where all of them have to grow."""
    method = SoftThreshold(survivors=survivors)
    weights = [torch.linspace(0.01, 1, 1000).requires_grad_() for _ in range(3)]
    members = []
    for weight, threshold in zip(weights, (0.3, 0.95, 0.99999)):
        s = torch.tensor(math.log(threshold / (1 - threshold)), requires_grad=True)
        members.append(({"weight": weight, "threshold": s}, Slot("w", (1000,))))
    members[2][0]["weight"].data.mul_(0.9)
    slopes = []
    for way in (1.0, -1.0):
        thresholds = [latents["threshold"] for latents, _ in members]
        slopes.append([g.item() for g in torch.autograd.grad(way * method.rate_of_group(members), thresholds)])
    falling, growing = slopes
    assert falling[0] < 0 and falling[1] == pytest.approx(0, abs=0.3 * -falling[0]) and falling[2] > 0
    assert all(slope > 0 for slope in growing)


def test_pruning_never_has_a_reward_below_nothing() -> None:
    """Where ten million survive in two bits, one zero costs more than it saves, and yet there has to be a first."""
    assert SoftThreshold(survivors=2)._cost(np.array([0.0, 5e6, 5e6]))[1] == 1


def test_a_group_costs_what_its_slots_do() -> None:
    for survivors in ("float16", 3):
        compressor = compress(Toy(), SoftThreshold(survivors=survivors))
        members = [(e.latents, e.slot) for e in compressor.entries.values()]
        method = SoftThreshold(survivors=survivors)
        together = method.rate_of_group(members)
        apart = sum(method.rate(*member) for member in members)
        assert together.item() == pytest.approx(apart.item(), rel=1e-6)
        leaves = [latent for latents, _ in members for latent in latents.values()]
        for a, b in zip(torch.autograd.grad(together, leaves), torch.autograd.grad(apart, leaves)):
            assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("survivors", [1, 9, 0, -3, "float32", ""])
def test_impossible_settings_are_refused(survivors) -> None:
    with pytest.raises(ConfigError, match=r'survivors must be "float16" or 2 to 8 bits'):
        SoftThreshold(survivors=survivors)


def test_survivors_beyond_float16_are_refused() -> None:
    model = Toy()
    model.conv.weight.data[0, 0, 0] = -1e6
    with pytest.raises(ConfigError, match=r"conv.weight: .*1e\+06.*wider"):
        compress(model, SoftThreshold())
    compress(model, SoftThreshold(survivors=4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    model = Toy()
    model.conv.weight.data[0, 0, 0] = value
    with pytest.raises(ConfigError, match=r"conv.weight: .*NaN or infinity"):
        compress(model, SoftThreshold())


def test_foreign_descriptions_are_refused() -> None:
    slot = Slot("w", (10,))
    latents = {"weight": trained(10, 0.5), "threshold": torch.tensor(0.0)}
    sparse, grid = SoftThreshold(), SoftThreshold(survivors=3)
    ones = np.ones(10, dtype=np.int32)
    for method, name, part in (
        (sparse, "alive", Symbols(2 * ones)),
        (sparse, "alive", Symbols(-ones)),
        (sparse, "alive", Symbols(ones[:9])),
        (sparse, "alive", ones),
        (sparse, "survivors", np.zeros(3, dtype=np.float16)),
        (sparse, "survivors", np.zeros(5, dtype=np.float32)),
        (sparse, "survivors", np.full(5, np.inf, dtype=np.float16)),
        (grid, "codes", Symbols(4 * ones)),
        (grid, "codes", Symbols(-4 * ones)),
        (grid, "step", np.array([-1], dtype=np.float32)),
        (grid, "step", np.array([1, 1], dtype=np.float32)),
        (grid, "step", np.array([np.nan], dtype=np.float32)),
    ):
        good = method.describe(latents, slot)
        method.restore(good, slot)
        with pytest.raises(FormatError, match=name):
            method.restore({**good, name: part}, slot)
        with pytest.raises(FormatError, match=name):
            method.restore({k: v for k, v in good.items() if k != name}, slot)
