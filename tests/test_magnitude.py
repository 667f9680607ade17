"""Magnitude pruning against its plain form; what the laws over all methods do not say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import magnitude

from hfcompress.errors import ConfigError
from hfcompress.methods import Magnitude
from hfcompress.reparameterization import Kind, Slot

halves = st.floats(-1000, 1000, width=16)


@given(st.lists(halves, min_size=1, max_size=40), st.floats(0, 0.99))
def test_as_in_the_plain_form(weights: list[float], sparsity: float) -> None:
    method, slot = Magnitude(sparsity), Slot("w", (len(weights),), Kind.LINEAR)
    latents = method.init(torch.tensor(weights), slot)
    found = method.decode(latents, slot, hard=True)
    assert torch.equal(found, torch.tensor(magnitude(weights, sparsity)) + 0.0)


def test_weights_under_the_mask_keep_their_gradient_and_return() -> None:
    method, slot = Magnitude(0.5), Slot("w", (4,), Kind.LINEAR)
    latents = method.init(torch.tensor([4.0, 1.0, -3.0, 0.5]), slot)
    weight = latents["weight"].requires_grad_(True)
    decoded = method.decode(latents, slot, hard=False)
    assert decoded.tolist() == [4, 0, -3, 0]
    decoded.backward(torch.tensor([0.0, -1.0, 0.0, 2.0]))
    with torch.no_grad():
        weight -= 4 * weight.grad
    assert method.decode(latents, slot, hard=True).tolist() == [0, 5, 0, -7.5]


def test_the_rate_is_that_of_the_mask_and_of_sixteen_bits_a_survivor() -> None:
    method, slot = Magnitude(0.75), Slot("w", (8,), Kind.LINEAR)
    latents = method.init(torch.arange(1.0, 9.0), slot)
    mask = 8 * -(0.75 * torch.tensor(0.75).log2() + 0.25 * torch.tensor(0.25).log2())
    assert torch.isclose(method.rate(latents, slot), mask + 32)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_fraction_that_is_none(sparsity: float) -> None:
    with pytest.raises(ConfigError, match="at least 0 and less than 1"):
        Magnitude(sparsity)
