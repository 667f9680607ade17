"""Codes whose lowest bit a trellis tells, and how weights are put on such a grid."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.coding import Symbols
from hfcompress.coding.decoder import Arrays, Place, Tables
from hfcompress.coding.plan import plan
from hfcompress.coding.trellis import LANE, join, split
from hfcompress.dependent import dependent_codes
from hfcompress.methods import EntropyPenalized
from hfcompress.reparameterization import Kind, Slot


def lowest(high: list[int]) -> list[int]:
    """The equation of the page, one after the other."""
    found: list[int] = []
    for t in range(len(high)):
        since = t % LANE
        two, three = (found[t - k] if since >= k else 0 for k in (2, 3))
        found.append(two ^ three ^ (high[t - 1] % 2 if since >= 1 else 0))
    return found


def entropy(values: np.ndarray) -> float:
    return Symbols(values.astype(np.int32)).entropy() / values.size


@pytest.mark.parametrize("n", [0, 1, 7, 55, 56, 57, LANE - 1, LANE, LANE + 1, 3 * LANE + 100])
def test_it_is_the_equation(n):
    high = np.random.default_rng(n).integers(-9, 9, n).astype(np.int32)
    assert join(high.copy()).tolist() == [2 * h + q for h, q in zip(high.tolist(), lowest(high.tolist()))]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-(2**30), 2**30 - 1), max_size=2 * LANE))
def test_splitting_is_the_inverse_of_joining(high):
    high = np.array(high, dtype=np.int32)
    found = split(join(high.copy()))
    assert np.array_equal(found, high) if found is not None else not any(lowest(high.tolist()))


def test_other_codes_are_left_alone():
    values = np.random.default_rng(0).integers(-9, 9, 5000).astype(np.int32)
    assert split(values) is None
    assert split(np.zeros(5000, dtype=np.int32)) is None, "nothing is gained by halving zeros"


def test_the_path_is_the_best_of_all():
    """Against all paths, for lanes short enough to try them."""
    x = np.random.default_rng(1).normal(0, 3, 5).astype(np.float32)
    best = np.inf
    for high in itertools.product(range(-4, 5), repeat=5):
        best = min(best, float(((join(np.array(high, dtype=np.int32)) - x) ** 2).sum()))
    codes = dependent_codes(x, 99, rate_weight=0.0)
    assert split(codes) is not None
    assert ((codes - x) ** 2).sum() == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("size", [1.5, 6.0, 40.0])
def test_it_takes_fewer_bits_than_a_plain_grid_of_the_same_error(size):
    """By 0.1 bit at least: granular gain of eight states is 1.1 dB, 0.18 bit."""
    x = np.random.default_rng(2).laplace(0, size, 100_000).astype(np.float32)
    codes = dependent_codes(x, 32767)
    error, bits = ((codes - x) ** 2).mean(), entropy(codes >> 1)
    plain = [(((np.rint(x / d) * d - x) ** 2).mean(), entropy(np.rint(x / d))) for d in np.arange(1.2, 3.5, 0.02)]
    errors, costs = np.array(plain).T
    assert bits < np.interp(error, errors, costs) - 0.1


@pytest.mark.parametrize("limit", [32767, 20])
def test_codes_keep_within_the_limit(limit):
    x = np.random.default_rng(3).normal(0, 30, 5000).astype(np.float32)
    codes = dependent_codes(x, limit)
    assert np.abs(codes).max() <= limit and split(codes) is not None


@pytest.mark.parametrize("n", [0, 1, 5, LANE, LANE + 1])
@pytest.mark.parametrize("value", [0.0, -3.7])
def test_few_or_equal_weights(n, value):
    codes = dependent_codes(np.full(n, value, dtype=np.float32), 32767)
    assert codes.shape == (n,) and (value or not codes.any())


@pytest.mark.parametrize("shape", [(64, 300), (32, 16, 3, 3), (5, 7), (40_000,)])
@pytest.mark.parametrize("size", [0.7, 5.0, 300.0, 7000.0])
def test_the_coder_leaves_the_lowest_bit_out(shape, size):
    x = np.random.default_rng(4).laplace(0, size, np.prod(shape)).astype(np.float32)
    codes = dependent_codes(x, 32767)
    other = np.random.default_rng(5).integers(-3, 4, 500).astype(np.int32)
    arrays = [Symbols(codes, shape), Symbols(other, (500,))]
    chosen = plan(arrays, [])
    assert [form.joined for form in chosen.forms] == [bool((codes & 1).any()), False]
    stream = chosen.stream(b"")
    places = [Place(a.values.size, form, a.shape) for a, form in zip(arrays, chosen.forms)]
    found = Arrays(places, [], Tables.read(chosen.tables), stream, chosen.states)
    for number, array in enumerate(arrays):
        assert np.array_equal(found.read(number)[0], array.values)
    found.finish()
    if codes.size > 10_000 and size == 5.0:  # enough codes are odd, and enough of each kind to tell the entropy
        whole = sum(a.entropy() for a in arrays)
        assert 8 * (stream.nbytes + len(chosen.tables)) < whole - 0.9 * codes.size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_on_a_dependent_grid_is_what_its_description_says(dtype):
    method, slot = EntropyPenalized(), Slot("w", (64, 50), Kind.LINEAR, 0, 3200)
    weight = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)).to(dtype) / 10
    latents = method.on_dependent_grid(method.init(weight, slot), 0.5)
    decoded = method.decode(latents, slot, hard=True)
    again = method.decode(method.restore(method.describe(latents, slot), slot), slot, hard=True)
    assert torch.equal(decoded.float(), again.float())
    codes = method.describe(latents, slot)["codes"]
    assert isinstance(codes, Symbols) and split(codes.values) is not None
    assert (decoded.float() - weight.float()).norm() < 0.15 * weight.float().norm()
