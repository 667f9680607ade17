"""`methods/levels.py` against the paper's loops, and what only this method promises."""

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import levels
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Toy, compress, loss_of

from hfcompress.checkpoint import to_bytes
from hfcompress.coding import Symbols
from hfcompress.compressor import Compressor
from hfcompress.container import Reader
from hfcompress.errors import ConfigError, FormatError
from hfcompress.methods import Levels, Uniform
from hfcompress.methods.levels import nearest, redistribute
from hfcompress.optimizer import CompressedOptimizer
from hfcompress.reparameterization import Kind, Slot
from hfcompress.schema import Rule

STORED = {"float16": lambda x: float(np.float16(x)), "float32": lambda x: float(np.float32(x))}
near_one = st.floats(-4, 4, width=32)
coordinates = st.floats(-0.25, 1.25, width=32)


# ------------------------------------------------------------------------------------------------- the paper


@given(
    st.lists(near_one, min_size=1, max_size=80),
    st.lists(coordinates, min_size=2, max_size=12),
    st.none() | st.integers(1, 30),
    st.sampled_from(("float16", "float32")),
    st.integers(0, 99),
)
def test_equals_the_papers_loops(weights, points, bucket, scales, seed) -> None:
    method, slot = Levels(len(points), bucket, scales=scales), Slot("w", (len(weights),))
    latents = {"weight": torch.tensor(weights), "points": torch.tensor(points).mul(len(points) - 1).requires_grad_()}
    points = (latents["points"].detach() / (len(points) - 1)).tolist()
    gradient = torch.randn(len(weights), generator=torch.Generator().manual_seed(seed))
    fast = method.decode(latents, slot, hard=False)
    fast.backward(gradient)
    slow, of_points = levels(weights, points, bucket, STORED[scales], gradient.tolist())
    clear = all(margin > 1e-4 for _, margin in slow)  # on which side of a tie float32 falls is its own affair
    for found, (wanted, margin) in zip(fast.tolist(), slow, strict=True):
        assert abs(found - wanted) <= 1e-4 + (8 * 1.5 if margin <= 1e-4 else 0)
    if clear and len({STORED[scales](p) for p in points}) == len(points):
        assert torch.allclose(latents["points"].grad * (len(points) - 1), torch.tensor(of_points), atol=1e-3)


@pytest.mark.parametrize("n", [10, 5000, 300_000])
@pytest.mark.parametrize("spread", [1.0, 0.05, 1e-5, 0.0])
@pytest.mark.parametrize("points", [2, 3, 17, 256])
def test_nearest_is_the_nearest(n: int, spread: float, points: int) -> None:
    """The table of cells, however many middles share one, gives what a search among all middles gives."""
    generator = torch.Generator().manual_seed(points)
    x = torch.randn(n, generator=generator).mul_(0.3).add_(0.5)
    book = (0.5 + spread * (torch.rand(points, generator=generator) * 1.4 - 0.7)).sort().values
    codes = nearest(x, book)
    assert torch.equal(codes, torch.bucketize(x, (book[1:] + book[:-1]) / 2, out_int32=True))
    some = slice(0, 2000)
    away = (x[some, None] - book).abs()
    assert (away.gather(1, codes[some, None].long()).squeeze(1) <= away.min(1).values + 1e-6).all()


def test_the_order_of_the_points_does_not_matter() -> None:
    weight, slot = torch.randn(500), Slot("w", (500,))
    gradient, order = torch.randn(500), torch.tensor([3, 0, 4, 1, 2])
    points = torch.arange(5.0).requires_grad_()
    mixed = points.detach()[order].requires_grad_()
    decoded = [Levels(5).decode({"weight": weight, "points": p}, slot, hard=False) for p in (points, mixed)]
    assert torch.equal(*decoded)
    for one in decoded:
        one.backward(gradient)
    assert torch.equal(points.grad[order], mixed.grad) and points.grad.all()


def test_the_codebook_of_a_file_is_sorted() -> None:
    method, slot = Levels(4, 8), Slot("w", (20,))
    weight = torch.randn(20)
    found = method.describe({"weight": weight, "points": torch.tensor([2.7, 0.3, 3.3, 1.2])}, slot)
    assert found["points"].dtype == np.float16 and (np.diff(found["points"]) > 0).all()
    x, _, _ = method._scaled([weight])
    assert np.array_equal(found["codes"].values, nearest(x, torch.from_numpy(found["points"]).float()).flatten()[:20])


@pytest.mark.parametrize("bucket", [None, 64])
def test_points_start_at_the_quantiles(bucket: int | None) -> None:
    weight, slot = torch.randn(30, 21), Slot("w", (30, 21))
    rows = [row for row in weight.flatten().split(bucket or 630)]
    scaled = np.concatenate([((row - row.min()) / (row.max() - row.min())).numpy() for row in rows])
    found = Levels(9, bucket, "quantile", "float32").init(weight, slot)["points"] / 8
    assert np.allclose(found, np.percentile(scaled, np.linspace(0, 100, 9)), atol=1e-6)
    assert found[0] == 0 and found[-1] == 1


@pytest.mark.parametrize("n", [5, 3000, 400_000])
@pytest.mark.parametrize("points", [2, 4, 16])
def test_points_start_nearest_to_the_weights(n: int, points: int) -> None:
    """Every point is the mean of what took it, each weight by the square of its bucket's span, and no quantile does."""
    torch.manual_seed(0)
    weight, slot = torch.randn(n).pow(3), Slot("w", (n,))
    errors = {}
    for start in ("nearest", "quantile", "uniform"):
        method = Levels(points, 64, start, "float32")
        latents = method.init(weight, slot)
        decoded = method.decode(latents, slot, hard=True)
        errors[start] = (decoded - weight).square().sum().item()
        if start == "nearest" and n == 3000:
            decoded = method.decode({**latents, "points": latents["points"].requires_grad_()}, slot, hard=False)
            (decoded - weight).square().sum().backward()
            _, _, span = method._scaled([weight])
            assert latents["points"].grad.abs().max() < 1e-3 * 2 * 64 * span.square().sum() / (
                points - 1
            )  # 1e-3 from the least
            assert latents["points"].diff().min() > 0
    assert errors["nearest"] <= min(errors.values())


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_evenly_spaced_points_are_uniform_quantization(bits: int) -> None:
    weight, slot = torch.randn(700), Slot("w", (700,))
    method, other = Levels(2**bits, start="uniform", scales="float32"), Uniform(bits, scales="float32")
    found, wanted = (m.decode(m.init(weight, slot), slot, hard=True) for m in (method, other))
    assert ((found - wanted).abs() < 1e-5).float().mean() > 0.999  # but for ties


def test_equal_weights_can_be_learned_too() -> None:
    method, slot = Levels(4, 8), Slot("w", (20,))
    latents = method.init(torch.full((20,), 0.5), slot)
    latents["points"].requires_grad_()
    weight = method.decode(latents, slot, hard=False)
    weight.sum().backward()
    assert torch.equal(weight, torch.full((20,), 0.5)) and latents["points"].grad.sum() == pytest.approx(20 / 3)


# --------------------------------------------------------------------------------------------- in training


def test_only_points_are_trained() -> None:
    model = Toy()
    compressor = compress(model, Levels(4, 16))
    assert list(compressor.trained()) == []
    assert {rate for _, rate in compressor.auxiliary()} == set(Levels.auxiliary.values())
    before = copy.deepcopy(compressor.state_dict()["latents"])
    optimizer = CompressedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), compressor)
    losses = []
    for _ in range(60):
        losses.append(loss_of(model, 0))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.02
    for name, latents in compressor.state_dict()["latents"].items():
        assert torch.equal(latents["weight"], before[name]["weight"])
        used = not name.startswith(("frozen", "unused"))
        assert torch.equal(latents["points"], before[name]["points"]) != used


def test_batch_norm_statistics_follow_the_quantized_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    images = torch.randn(64, 3, 8, 8)
    for _ in range(60):
        model(images)
    compressor = Compressor(model, [Rule(method=Levels(3), kinds=(Kind.CONV,))])
    stale = model[1].running_mean.clone()
    for _ in range(60):
        model(images)
    wanted = model[0](images).mean((0, 2, 3))
    assert torch.allclose(model[1].running_mean, wanted, atol=1e-3) and not torch.allclose(stale, wanted, atol=1e-3)
    assert torch.equal(dict(Reader(to_bytes(model, compressor)).tensors())["1.running_mean"], model[1].running_mean)


def test_distils_from_its_own_full_precision_copy() -> None:
    """The paper's setting: no labels, no other teacher; the points come nearer to the network they began as."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
    teacher = copy.deepcopy(model)
    inputs = torch.randn(256, 20)
    compressor = Compressor(model, [Rule(method=Levels(4, None, "quantile"))])
    optimizer = CompressedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), compressor)

    def apart() -> Tensor:
        return F.kl_div(model(inputs).log_softmax(1), teacher(inputs).log_softmax(1), log_target=True, reduction="sum")

    first = apart().item()
    for _ in range(800):
        apart().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert apart() < 0.7 * first


# ------------------------------------------------------------------------------------------- redistribution


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(2, 256)), min_size=1, max_size=30))
def test_redistribution_keeps_the_sum(pairs: list[tuple[float, int]]) -> None:
    norms = {str(i): norm for i, (norm, _) in enumerate(pairs)}
    points = {str(i): count for i, (_, count) in enumerate(pairs)}
    found = redistribute(norms, points)
    assert found.keys() == points.keys() and sum(found.values()) == sum(points.values())
    assert all(2 <= count <= 256 for count in found.values())


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.integers(4, 40))
def test_redistribution_follows_the_norms(norms: list[float], count: int) -> None:
    """Among tensors that began alike, a larger norm never gets fewer points, but for the last few that even out."""
    names = {str(i): norm for i, norm in enumerate(norms)}
    found = redistribute(names, dict.fromkeys(names, count))
    assert all(found[i] >= count // 2 - 1 for i in names)
    for i, norm in names.items():
        for j, other in names.items():
            assert norm < other or found[i] >= found[j] - len(names)


def test_redistribution_as_the_paper_counts() -> None:
    # floor(m / 2) = 8, 8, 2 stay; the other 18 go 4.5 (rounded: 4), 9, 4.5 (4): one is lacking, the least gets it
    assert redistribute({"a": 1.0, "b": 2.0, "c": 1.0}, {"a": 16, "b": 16, "c": 4}) == {"a": 12, "b": 17, "c": 7}
    # 6 · ⅓ rounds to 2 everywhere, nothing is left over
    assert redistribute(dict.fromkeys("abc", 5.0), dict.fromkeys("abc", 4)) == dict.fromkeys("abc", 4)
    # 2 · ¼ = 0.5 rounds to 0, 1.5 to 2
    assert redistribute({"a": 1.0, "b": 3.0}, {"a": 3, "b": 3}) == {"a": 2, "b": 4}
    assert redistribute({"a": 0.0, "b": 0.0}, {"a": 5, "b": 9}) == {"a": 5, "b": 9}
    assert redistribute({"a": 1.0, "b": 0.0}, {"a": 200, "b": 200}) == {"a": 256, "b": 144}
    assert redistribute({}, {}) == {}


@pytest.mark.parametrize("norms", [{}, {"a": -1.0}, {"a": float("nan")}, {"a": float("inf")}])
def test_redistribution_needs_good_norms(norms: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="a needs a finite norm"):
        redistribute(norms, {"a": 4})


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("fields", [{"points": 1}, {"points": 257}, {"bucket": 0}, {"bucket": -1}])
def test_impossible_settings_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Levels(**fields)


def test_foreign_descriptions_are_refused() -> None:
    method, slot = Levels(points=3, bucket=4), Slot("w", (10,))
    good = method.describe(method.init(torch.randn(10), slot), slot)
    half = np.ones(3, dtype=np.float16)
    method.restore(good, slot)
    for name, part in {
        "codes": Symbols(np.full(10, 3, dtype=np.int32)),
        "codes ": Symbols(np.full(10, -1, dtype=np.int32)),
        " codes": Symbols(np.zeros(9, dtype=np.int32)),
        "codes  ": half,
        "points": half[:2],
        "points ": half + np.float16("nan"),
        "low": half[:1],
        "low ": half.astype(np.float32),
        "span": half - 1,
        "span ": half + np.float16("inf"),
        " span": Symbols(np.ones(3, dtype=np.int32)),
    }.items():
        with pytest.raises(FormatError, match=name.strip()):
            method.restore({**good, name.strip(): part}, slot)
    for name in good:
        with pytest.raises(FormatError, match=name):
            method.restore({key: part for key, part in good.items() if key != name}, slot)


def test_weights_beyond_float16_are_refused() -> None:
    model = Toy()
    model.conv.weight.data[0, 0, 0] = -1e6
    with pytest.raises(ConfigError, match=r"conv.weight: Levels.*wider"):
        compress(model, Levels())
    assert torch.isfinite(compress(model, Levels(scales="float32")).model.conv.weight).all()


def test_latents_resume_from_a_plain_state() -> None:
    model, other = Toy(), Toy(seed=1)
    saved, loaded = compress(model, Levels(5)), compress(other, Levels(5))
    with torch.no_grad():
        for points, _ in saved.auxiliary():
            points.add_(0.05)
    saved.write()
    buffer = io.BytesIO()
    torch.save(saved.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
