"""`methods/uniform.py` against the paper's loops, and what only this method promises."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import uniform, zero_point

from hfcompress.coding import Symbols
from hfcompress.errors import ConfigError, FormatError
from hfcompress.methods import Uniform
from hfcompress.reparameterization import Slot
from hfcompress.rounding import to_buckets

STORED = {"float16": lambda x: float(np.float16(x)), "float32": lambda x: float(np.float32(x))}
methods = st.builds(
    Uniform,
    bits=st.integers(1, 8),
    bucket=st.none() | st.integers(1, 40),
    stochastic=st.booleans(),
    scales=st.sampled_from(("float16", "float32")),
)
near_one = st.floats(-4, 4, width=32)


@given(methods, st.lists(near_one, min_size=1, max_size=100), st.integers(0, 2**56))
def test_equals_the_papers_loops(method: Uniform, weights: list[float], seed: int) -> None:
    weight = torch.tensor(weights)
    slot = Slot("w", tuple(weight.shape), draw=seed)
    for hard in (True, False):
        draws = None
        if method.stochastic and not hard:
            rows = to_buckets(weight, method.bucket)
            draws = iter(torch.rand(rows.shape, generator=torch.Generator().manual_seed(seed)).flatten().tolist())
        fast = method.decode({"weight": weight}, slot, hard=hard).tolist()
        slow = uniform(weights, method.bits, method.bucket, STORED[method.scales], draws)
        for found, wanted in zip(fast, slow, strict=True):
            # where float32 cannot tell on which side of a tie a weight lies, either point is right
            slack = 1e-5 + (wanted.step if wanted.margin < 1e-3 or wanted.step < 1e-4 else 0)
            assert abs(found - wanted.value) <= slack


@given(st.integers(1, 8), st.none() | st.integers(2, 50), st.integers(1, 300))
def test_near_and_few(bits: int, bucket: int | None, n: int) -> None:
    weight = torch.randn(n, generator=torch.Generator().manual_seed(n))
    decoded = Uniform(bits=bits, bucket=bucket).decode({"weight": weight}, Slot("w", (n,)), hard=True)
    for w, q in zip(to_buckets(weight, bucket), to_buckets(decoded, bucket)):
        step = (w.max() - w.min()) / (2**bits - 1)
        assert len(q.unique()) <= 2**bits
        assert (w - q).abs().max() <= 0.5 * step + 2**-10 * (w.abs().max() + 2**bits * step)  # float16 scales


@given(
    st.integers(1, 8),
    st.none() | st.integers(1, 40),
    st.sampled_from(("float16", "float32")),
    st.lists(near_one, min_size=1, max_size=100),
)
def test_a_zero_point_equals_plain_loops(bits: int, bucket: int | None, scales: str, weights: list[float]) -> None:
    method = Uniform(bits=bits, bucket=bucket, scales=scales, zero_point=True)  # type: ignore[arg-type]
    found = method.decode({"weight": torch.tensor(weights)}, Slot("w", (len(weights),)), hard=True).tolist()
    for fast, slow in zip(found, zero_point(weights, bits, bucket, STORED[scales]), strict=True):
        slack = 1e-5 + (slow.step * 2**bits if slow.margin < 1e-3 or slow.step < 1e-4 else 0)
        assert abs(fast - slow.value) <= slack


@given(st.integers(1, 8), st.integers(2, 60), st.integers(1, 300), st.booleans())
def test_a_zero_point_is_whole_and_keeps_zero(bits: int, bucket: int, n: int, stochastic: bool) -> None:
    weight = torch.randn(n, generator=torch.Generator().manual_seed(n))
    weight[:: max(1, n // 7)] = 0.0
    method, slot = Uniform(bits=bits, bucket=bucket, stochastic=stochastic, zero_point=True), Slot("w", (n,), draw=n)
    described = method.describe({"weight": weight}, slot)
    zero, step = described["zero"], described["step"]
    assert isinstance(zero, np.ndarray) and zero.dtype == np.uint8 and zero.max() <= 2**bits - 1
    assert isinstance(step, np.ndarray) and len(step) == len(zero)
    for hard in (True, False):
        decoded = method.decode({"weight": weight}, slot, hard=hard)
        assert (decoded[weight == 0] == 0).all()
    codes = described["codes"].values  # type: ignore[union-attr]
    expected = [(int(c) - int(zero[i // bucket])) * float(step[i // bucket]) for i, c in enumerate(codes)]
    hard_weight = method.decode({"weight": weight}, slot, hard=True)
    assert hard_weight.tolist() == torch.tensor(expected).tolist()


def test_stochastic_rounding_is_unbiased() -> None:
    method, weight = Uniform(bits=2, stochastic=True, scales="float32"), torch.linspace(-1, 1, 64)
    draws = [method.decode({"weight": weight}, Slot("w", (64,), draw=i), hard=False) for i in range(2000)]
    step = 2 / 3
    assert (torch.stack(draws).mean(0) - weight).abs().max() < 5 * step / 2 / 2000**0.5


def test_gradient_passes_unchanged() -> None:
    weight, gradient = torch.randn(50, requires_grad=True), torch.randn(50)
    Uniform(bits=1, bucket=8).decode({"weight": weight}, Slot("w", (50,)), hard=False).backward(gradient)
    assert torch.equal(weight.grad, gradient)


@pytest.mark.parametrize("fields", [{"bits": 0}, {"bits": 9}, {"bucket": 0}, {"bucket": -1}])
def test_impossible_settings_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Uniform(**fields)


def test_foreign_descriptions_are_refused() -> None:
    method, slot = Uniform(bits=2, bucket=4), Slot("w", (10,))
    good = method.describe(method.init(torch.randn(10), slot), slot)
    half = np.zeros(3, dtype=np.float16)
    method.restore(good, slot)
    for name, part in {
        "codes": Symbols(np.full(10, 4, dtype=np.int32)),
        "codes ": Symbols(np.full(10, -1, dtype=np.int32)),
        " codes": Symbols(np.zeros(9, dtype=np.int32)),
        "codes  ": half,
        "low": half[:1],
        "low ": half.astype(np.float32),
        "step": half - 1,
        "step ": half + np.float16("inf"),
        " step": Symbols(np.zeros(3, dtype=np.int32)),
    }.items():
        with pytest.raises(FormatError, match=name.strip()):
            method.restore({**good, name.strip(): part}, slot)
    with pytest.raises(FormatError):
        method.restore({"codes": good["codes"]}, slot)


def test_foreign_zero_points_are_refused() -> None:
    method, slot = Uniform(bits=2, bucket=4, zero_point=True), Slot("w", (10,))
    good = method.describe(method.init(torch.randn(10), slot), slot)
    method.restore(good, slot)
    for zero in (np.full(3, 4, np.uint8), np.zeros(2, np.uint8), np.zeros(3, np.int8), Symbols(np.zeros(3, np.int32))):
        with pytest.raises(FormatError, match="zero"):
            method.restore({**good, "zero": zero}, slot)
