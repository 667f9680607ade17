"""`density.py` against Ballé's formulas in loops, drawn noise and exact integrals."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import factorized
from torch import Tensor

from hfcompress import density
from hfcompress.density import CELLS, Family, Table, bits, code_length, slopes_, start, tabulate

FAMILIES: tuple[Family, ...] = get_args(Family)
every_family = pytest.mark.parametrize("family", FAMILIES)
spreads = st.floats(0.05, 50)


def some_parameters(family: Family, spread: float, seed: int = 0) -> Tensor:
    """Somewhere away from the start."""
    drawn = torch.randn(start(family, 1).shape, generator=torch.Generator().manual_seed(seed))
    return start(family, spread) + 0.3 * drawn


def some_latents(n: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(n, generator=torch.Generator().manual_seed(n))


def exact(family: Family, parameters: Tensor, z: float, cells: int = 4000) -> float:
    """B(z): the mean of b over a unit, on a grid far finer than the table's."""
    points = torch.linspace(z - 0.5, z + 0.5, cells + 1, dtype=torch.float64)
    b = bits(family, parameters.double(), points)
    return torch.trapezoid(b, points).item()


@given(spreads, st.integers(0, 99), st.floats(-30, 30))
def test_equals_the_papers_formula(spread: float, seed: int, x: float) -> None:
    parameters = some_parameters("factorized", spread, seed).double()
    wanted = factorized(parameters.tolist(), x)
    found = bits("factorized", parameters, torch.tensor([x], dtype=torch.float64)).item()
    if wanted > 1e-9:  # the formula itself, a difference, has no digits left further out
        assert found == pytest.approx(-math.log2(wanted), abs=1e-4)


@every_family
@given(spread=spreads, seed=st.integers(0, 99))
def test_integers_have_probability_one(family: Family, spread: float, seed: int) -> None:
    n = torch.arange(-5000, 5001, dtype=torch.float64)
    lengths = bits(family, some_parameters(family, spread, seed).double(), n)
    assert torch.exp2(-lengths).sum().item() == pytest.approx(1, abs=1e-3)
    assert lengths.min() >= 0


@every_family
def test_starts_at_the_spread(family: Family) -> None:
    n = torch.arange(-1000, 1001, dtype=torch.float64)
    for spread in (1.0, 8.0, 64.0):
        p = torch.exp2(-bits(family, start(family, spread).double(), n))
        assert (p * n**2).sum().sqrt().item() == pytest.approx(spread, rel=0.15)
        assert (p * n).sum().item() == pytest.approx(0, abs=1e-6)


@every_family
def test_far_out_lengths_are_finite_and_rise(family: Family) -> None:
    parameters = some_parameters(family, 0.3).requires_grad_()
    lengths = bits(family, parameters, torch.tensor([10.0, 100.0, 1000.0, 1e4]))
    assert lengths.isfinite().all() and (lengths.diff() > 0).all()
    (gradient,) = torch.autograd.grad(lengths[-1], parameters)
    assert gradient.isfinite().all() and gradient.any()


@every_family
def test_the_table_holds_the_expectation(family: Family) -> None:
    parameters = some_parameters(family, 2.0)
    table = tabulate(family, parameters, 8)
    centres = (torch.arange(len(table.expected), dtype=torch.float64) + 0.5) / CELLS - table.reach - 0.5
    for i in range(0, len(centres), 7):
        assert table.expected[i].item() == pytest.approx(exact(family, parameters, centres[i].item()), abs=2e-3)
    step = centres[1] - centres[0]
    slopes = (table.expected[2:] - table.expected[:-2]).double() / (2 * step)
    assert (table.slopes[1:-1] - slopes).abs().max() < 0.02
    assert torch.equal(table.whole, bits(family, parameters, torch.arange(-8.0, 9.0)))


def drawn(family: Family, parameters: Tensor, z: Tensor, draws: int) -> tuple[Tensor, float]:
    """The paper's rate, Σ −log2 p(z + u) averaged over many draws of u, and its standard error."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(draws, len(z), generator=generator) - 0.5
    rates = bits(family, parameters, (z + noise).flatten()).view(draws, -1).sum(1)
    return rates.mean(), (rates.std() / draws**0.5).item()


@every_family
def test_equals_drawn_noise(family: Family) -> None:
    parameters = some_parameters(family, 2.0).requires_grad_()
    z = some_latents(500)
    plain = z.clone().requires_grad_()
    wanted, error = drawn(family, parameters, plain, 2000)
    of_z, of_parameters = torch.autograd.grad(wanted, (plain, parameters))
    table = tabulate(family, parameters, z.abs().max().item())
    noisy, rounded = code_length(z.clone(), table)
    assert abs(noisy - wanted) < 4 * error + 1e-3 * wanted
    assert rounded.item() == pytest.approx(bits(family, parameters, z.round()).sum().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(noisy, parameters)
    assert (gradient - of_parameters).abs().max() < 0.02 * of_parameters.abs().max()
    slopes_(z, table)
    assert (z - of_z).abs().max() < 0.1 and (z - of_z).abs().mean() < 0.02


@every_family
def test_beyond_the_table_lengths_are_straight_lines(family: Family) -> None:
    parameters = some_parameters(family, 20.0)
    table = tabulate(family, parameters, 1e6)
    assert table.reach == 256 and not table.covers
    for far in (255.0, 256.4, 300.0, 1e5, -280.0):
        z = torch.tensor([far])
        noisy, rounded = code_length(z.clone(), table)
        assert noisy.item() == pytest.approx(bits(family, parameters, z).item(), rel=0.01)
        assert rounded.item() == pytest.approx(noisy.item(), rel=0.01)
        slopes_(z, table)
        assert z.item() == pytest.approx(math.copysign(abs(table.slopes[-1 if far > 0 else 0].item()), far), rel=0.01)


@given(st.floats(0, 1000))
def test_the_table_reaches_every_latent_it_can(furthest: float) -> None:
    table = tabulate("logistic", start("logistic", 1.0), furthest)
    assert table.covers == (furthest <= table.reach) and (table.covers or table.reach == 256)
    noisy, rounded = code_length(torch.tensor([furthest, -furthest, 0.0]), table)
    assert noisy.isfinite() and rounded.isfinite()


@pytest.mark.parametrize("furthest", [20.0, 1000.0])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, furthest: float) -> None:
    z, table = some_latents(1000, spread=furthest / 4), tabulate("factorized", start("factorized", 2.0), furthest)

    def both() -> tuple[Tensor, Tensor, Tensor]:
        slopes = z.clone()
        slopes_(slopes, table)
        return (*code_length(z.clone(), table), slopes)

    whole = both()
    monkeypatch.setattr(density, "CHUNK", 7)
    for a, b in zip(whole, both(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


def test_no_latents_cost_nothing() -> None:
    table = tabulate("factorized", start("factorized", 1.0), 0.0)
    empty = torch.zeros(0)
    assert [bits.item() for bits in code_length(empty, table)] == [0, 0]
    slopes_(empty, table)


def fitted(family: Family, integers: Tensor) -> float:
    """Bits an integer, of a density fitted to them by Adam at the method's own rate."""
    parameters = start(family, 8.0).requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=0.03)
    for _ in range(300):
        optimizer.zero_grad()
        table: Table = tabulate(family, parameters, 20.0)
        rate = code_length(integers.clone(), table)[1] / len(integers)
        rate.backward()
        optimizer.step()
    return rate.item()


def test_the_factorized_density_learns_a_shape_that_the_others_have_not() -> None:
    """Nearly all weights are zero, the others far out: what training leaves."""
    generator = torch.Generator().manual_seed(0)
    wide = 2 * torch.randn(5000, generator=generator)
    integers = (wide * (torch.rand(5000, generator=generator) < 0.03)).round()
    share = integers.unique(return_counts=True)[1] / len(integers)
    entropy = -(share * share.log2()).sum().item()
    found = {family: fitted(family, integers) for family in FAMILIES}
    assert entropy <= found["factorized"] < 1.25 * entropy
    assert min(found["laplace"], found["logistic"]) > 1.3 * found["factorized"]
