"""Rounding and its gradients; buckets and back."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfcompress.rounding import cast_through, from_buckets, replace_through, round_by, to_buckets, uniform_draw


def stochastic_round(x: torch.Tensor, seed: int) -> torch.Tensor:
    return round_by(x, uniform_draw(x.numel(), seed))


shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)


def test_replace_through() -> None:
    x, value, gradient = torch.randn(5, requires_grad=True), torch.randn(5), torch.randn(5)
    result = replace_through(x, value)
    result.backward(gradient)
    assert torch.equal(result, value) and torch.equal(x.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cast_through(dtype: torch.dtype) -> None:
    x = torch.randn(100, requires_grad=True)
    result = cast_through(x, dtype)
    result.sum().backward()
    assert result.dtype == x.dtype and torch.equal(result, x.detach().to(dtype).float())
    assert torch.equal(x.grad, torch.ones(100))


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50), st.integers(0, 2**56))
def test_stochastic_round_goes_to_a_neighbour(values: list[float], seed: int) -> None:
    x = torch.tensor(values)
    state = torch.get_rng_state()
    result = stochastic_round(x, seed)
    assert torch.equal(state, torch.get_rng_state())
    assert ((result == x.floor()) | (result == x.ceil())).all()
    torch.rand(1)
    assert torch.equal(result, stochastic_round(x, seed))


def test_stochastic_round_is_unbiased() -> None:
    x = torch.tensor([0.0, 0.1, 0.5, 0.9, -0.25, 3.0])
    mean = torch.stack([stochastic_round(x, seed) for seed in range(4000)]).mean(0)
    assert (mean - x).abs().max() < 5 * 0.5 / 4000**0.5
    assert mean[0] == 0 and mean[-1] == 3


@given(shapes, st.none() | st.integers(1, 50))
def test_buckets_and_back(shape: tuple[int, ...], size: int | None) -> None:
    n = math.prod(shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(n))
    rows = to_buckets(x, size)
    assert torch.equal(from_buckets(rows, shape), x)
    if n == 0:
        assert rows.shape == (0, 1)
    elif size is None or n <= size:
        assert rows.shape == (1, n)
    else:
        assert rows.shape == (math.ceil(n / size), size)
        assert (rows.flatten()[n:] == x.flatten()[-1]).all()
