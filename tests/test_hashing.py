"""`methods/hashing.py` against the paper's loops, its sums in any order, and what only this method promises."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import multi_hash
from torch import Tensor, nn
from toys import Toy, compress, loss_of

from hfcompress import checkpoint
from hfcompress.coding import Symbols
from hfcompress.compressor import Compressor
from hfcompress.container import Reader
from hfcompress.errors import ConfigError, FormatError
from hfcompress.methods import Dense, MultiHash
from hfcompress.methods.hashing import _side
from hfcompress.optimizer import CompressedOptimizer
from hfcompress.reparameterization import Description, Kind, Latents, Slot
from hfcompress.schema import Rule

SHAPES = st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=6)
METHODS = st.builds(MultiHash, fraction=st.floats(0.05, 1), bits=st.integers(2, 16), seed=st.integers(0, 5))


def group(shapes: list[tuple[int, ...]]) -> list[Slot]:
    """Slots side by side."""
    total, offset, slots = sum(math.prod(shape) for shape in shapes), 0, []
    for i, shape in enumerate(shapes):
        slots.append(Slot(str(i), shape, offset=offset, total=total))
        offset += math.prod(shape)
    return slots


def latents_of(method: MultiHash, slots: list[Slot], seed: int = 0) -> list[Latents]:
    """What the compressor makes of a group: shared factors, moved a little from where they began."""
    generator = torch.Generator().manual_seed(seed)
    members = [method.init(torch.randn(slot.shape, generator=generator), slot) for slot in slots]
    for name in method.shared:
        members[0][name].add_(0.1 * torch.randn(members[0][name].shape, generator=generator)).requires_grad_()
        for latents in members:
            latents[name] = members[0][name]
    for latents in members:
        latents["gain"].add_(0.1 * torch.randn((), generator=generator)).requires_grad_()
    return members


def rounded(method: MultiHash, latents: Latents) -> tuple[Tensor, Tensor]:
    """The factors a file holds, in float64, straight through to the latents."""
    top = 2 ** (method.bits - 1) - 1
    factors = []
    for name, dim in (("left", 1), ("right", 0)):
        factor = latents[name].double()
        amplitude = factor.detach().abs().amax(dim, keepdim=True).half().double()
        codes = (latents[name].detach() * (top / amplitude.float())).double().round().clamp(-top, top)
        factors.append(codes * amplitude / top + factor - factor.detach())
    return factors[0], factors[1]


# ------------------------------------------------------------------------------------------------- the paper


@given(METHODS, SHAPES, st.integers(0, 99))
def test_equals_the_papers_loops(method: MultiHash, shapes: list[tuple[int, ...]], seed: int) -> None:
    slots = group(shapes)
    members = latents_of(method, slots, seed)
    left, right = rounded(method, members[0])
    assert left.shape == (_side(slots[0].total), method.rank(slots[0].total)) == right.shape[::-1]
    scales = [(latents["gain"] * latents["deviation"]).item() for latents in members]
    wanted = multi_hash(left.tolist(), right.tolist(), [slot.numel for slot in slots], scales)
    for latents, slot, weights in zip(members, slots, wanted, strict=True):
        found = method.decode(latents, slot, hard=False)
        assert found.shape == slot.shape
        assert torch.allclose(found.flatten().double(), torch.tensor(weights).double(), rtol=1e-5, atol=1e-6)


@given(METHODS, SHAPES, st.integers(0, 99))
def test_gradients_are_those_of_the_rounded_product(method, shapes, seed) -> None:
    slots = group(shapes)
    members, plain = latents_of(method, slots, seed), latents_of(method, slots, seed)
    left, right = rounded(method, plain[0])
    pool = (left @ right).flatten()
    generator = torch.Generator().manual_seed(seed)
    for latents, other, slot in zip(members, plain, slots, strict=True):
        gradient = torch.randn(slot.shape, generator=generator)
        method.decode(latents, slot, hard=False).backward(gradient)
        cut = pool[slot.offset : slot.offset + slot.numel].reshape(slot.shape) * other["gain"] * other["deviation"]
        cut.backward(gradient.double(), retain_graph=True)
        assert torch.allclose(latents["gain"].grad, other["gain"].grad, rtol=1e-4, atol=1e-5)
    for name in method.shared:
        assert torch.allclose(members[0][name].grad, plain[0][name].grad, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(("weights", "fraction", "side", "rank"), [(461_882, 0.1, 680, 34), (461_882, 0.25, 680, 85)])
def test_the_papers_sizes(weights: int, fraction: float, side: int, rank: int) -> None:
    """ResNet-32 of CIFAR-10 without its norms."""
    assert (_side(weights), MultiHash(fraction).rank(weights)) == (side, rank)


@given(st.integers(0, 10**9))
def test_the_side_is_the_least_that_holds_all(total: int) -> None:
    side = _side(total)
    assert side**2 >= total and (side == 0 or (side - 1) ** 2 < total)


@pytest.mark.parametrize("rank", [1, 4, 60])
def test_weights_start_at_the_size_of_those_they_replace(rank: int) -> None:
    weight, slot = 0.02 * torch.randn(300, 300), Slot("w", (300, 300), total=90_000)
    method = MultiHash(fraction=2 * rank * 300 / 90_000 - 1e-6)
    decoded = method.decode(method.init(weight, slot), slot, hard=True)
    assert method.rank(90_000) == rank
    assert 0.8 < decoded.std() / weight.std() < 1.2 and decoded.mean().abs() < 0.02 * decoded.std() * 10


def test_draws_depend_on_seed_and_size_alone() -> None:
    slot, state = Slot("w", (50,), total=100), torch.get_rng_state()
    first = MultiHash(0.2).init(torch.zeros(50), slot)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    for other, same in (
        (MultiHash(0.2).init(torch.ones(50), replace(slot, name="v", offset=50, draw=3)), True),
        (MultiHash(0.2, seed=1).init(torch.zeros(50), slot), False),
        (MultiHash(0.2).init(torch.zeros(50), replace(slot, total=99)), False),
    ):
        assert torch.equal(first["left"], other["left"]) == torch.equal(first["right"], other["right"]) == same


def test_tensors_of_zeros_and_of_one_element() -> None:
    for weight in (torch.zeros(7), torch.tensor(0.0), torch.tensor([-3.0]), torch.full((4,), 0.5)):
        slot = Slot("w", tuple(weight.shape), total=weight.numel())
        latents = MultiHash(0.5).init(weight, slot)
        assert latents["deviation"] == (weight.abs().max() if weight.any() else torch.tensor(0.01))
        assert MultiHash(0.5).decode(latents, slot, hard=True).any()


# ------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("bits", [2, 8, 9, 10, 16])
@pytest.mark.parametrize("rank", [3, 700])
def test_sums_in_any_order_give_the_same_bits(bits: int, rank: int) -> None:
    n = 150
    method, slot = (
        MultiHash(bytes=math.ceil(2 * n * (rank * bits + 16) / 8), bits=bits),
        Slot("w", (n, n), total=n * n),
    )
    latents = method.init(torch.randn(n, n), slot)
    assert method.rank(n * n) == rank
    order = torch.randperm(rank)
    shuffled = {**latents, "left": latents["left"][:, order], "right": latents["right"][order]}
    first = method.decode(latents, slot, hard=True)
    assert torch.equal(first, method.decode(shuffled, slot, hard=True))
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(first, method.decode(latents, slot, hard=True))
    finally:
        torch.set_float32_matmul_precision(precision)


def test_the_largest_codes_everywhere_are_exact() -> None:
    n = 40
    for bits in (8, 9, 16):
        method, slot = MultiHash(1.0, bits=bits), Slot("w", (n, n), total=n * n)
        latents = method.init(torch.ones(n, n), slot)
        rank = method.rank(n * n)
        latents |= {"left": torch.ones(n, rank), "right": torch.ones(rank, n)}
        assert torch.equal(method.decode(latents, slot, hard=True), torch.full((n, n), float(rank)))


def test_a_slot_is_the_same_rows_of_the_whole() -> None:
    """Decoding only the rows and columns that a slot touches gives the bits of the whole matrix."""
    shapes = [(3, 5), (4,), (31,), (2, 2), (), (17, 3), (1,)]
    slots = group(shapes)
    total = slots[0].total
    method = MultiHash(0.4, bits=5)
    whole = Slot("all", (total,), total=total)
    latents = method.init(torch.ones(total), whole)
    pool = method.decode(latents, whole, hard=True)
    for slot in slots:
        own = {**latents, "deviation": torch.ones(())}
        assert torch.equal(method.decode(own, slot, hard=True).flatten(), pool[slot.offset : slot.offset + slot.numel])


# ------------------------------------------------------------------------------------------- sizes and files


@given(st.integers(1, 5000), st.integers(1, 100_000), st.integers(2, 16))
def test_bytes_are_kept_and_used(total: int, budget: int, bits: int) -> None:
    method, slot = MultiHash(bytes=budget, bits=bits), Slot("w", (total,), total=total)
    n = _side(total)

    def cost(rank: int) -> int:
        return math.ceil(2 * n * (rank * bits + 16) / 8)

    if budget < cost(1):
        with pytest.raises(ConfigError, match=f"too few for {total} weights: at least {cost(1)}"):
            method.init(torch.zeros(total), slot)
        return
    rank = method.rank(total)
    assert cost(rank) <= budget < cost(rank + 1)
    if total < 300:
        latents = method.init(torch.ones(total), slot)
        numbers = {name: getattr(part, "values", part).size for name, part in method.describe(latents, slot).items()}
        sizes = {"left": n * rank, "right": n * rank, "left_amplitude": n, "right_amplitude": n, "scale": 1}
        assert numbers == sizes
        assert cost(rank) == math.ceil((method.rate(latents, slot).item() - 32) / 8)


@given(METHODS, SHAPES)
def test_the_groups_rate_counts_the_factors_once(method: MultiHash, shapes: list[tuple[int, ...]]) -> None:
    members = list(zip(latents_of(method, group(shapes)), group(shapes), strict=True))
    apart = torch.stack([method.rate(latents, slot) for latents, slot in members]).sum()
    assert torch.allclose(method.rate_of_group(members), apart)


def test_a_file_holds_the_factors_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 300), nn.BatchNorm1d(300), nn.Linear(300, 200, bias=False))
    method = MultiHash(bytes=12_000, bits=4)
    compressor = Compressor(model, [Rule(method=method, kinds=(Kind.LINEAR,)), Rule(method=Dense())])
    data = checkpoint.to_bytes(model, compressor)
    factors = compressor.rate().item() / 8 - 2 * (300 + 300 + 300)
    assert 11_700 < factors <= 12_000 + 2 * 4
    found = dict(Reader(data).tensors())
    assert all(torch.equal(found[name], p) for name, p in model.named_parameters())
    sizes = [t for t in checkpoint.sizes(Reader(data)).tensors if t.method == "multihash"]
    assert len(sizes) == 2
    assert 0.8 * factors < sum(t.codes / 8 + t.arrays for t in sizes) < factors  # 4 bits before they are coded


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("bits", [3, 8, 16])
def test_it_learns(bits: int) -> None:
    model = Toy()
    compressor = Compressor(
        model, [Rule(method=MultiHash(0.5, bits=bits), kinds=(Kind.LINEAR, Kind.CONV, Kind.EMBEDDING))]
    )
    assert sum(1 for _ in compressor.trained()) == 2 + len(compressor.entries)
    assert not any(decayed for _, _, decayed in compressor.trained())
    optimizer = CompressedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), compressor)
    losses = []
    for _ in range(80):
        losses.append(loss_of(model, 0).item())
        loss_of(model, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


def test_neighbours_share_rows_and_everyone_shares_columns() -> None:
    slots = group([(10,), (10,), (80,)])
    method = MultiHash(0.3)
    members = latents_of(method, slots)
    before = [method.decode(latents, slot, hard=True) for latents, slot in zip(members, slots)]
    with torch.no_grad():
        members[0]["left"][1] *= -1  # the second row of ten: all of the second tensor, nothing of the others
    after = [method.decode(latents, slot, hard=True) for latents, slot in zip(members, slots)]
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [True, False, True]


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either fraction or bytes"),
        ({"fraction": 0.1, "bytes": 100}, "either fraction or bytes"),
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.5}, "fraction"),
        ({"fraction": float("nan")}, "fraction"),
        ({"bytes": 0}, "bytes"),
        ({"fraction": 0.1, "bits": 1}, "bits"),
        ({"fraction": 0.1, "bits": 17}, "bits"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MultiHash(**fields)


def test_too_few_bytes_for_the_model_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"100 bytes are too few for 744 weights: at least"):
        compress(Toy(), MultiHash(bytes=100), "*weight")


def test_foreign_descriptions_are_refused() -> None:
    method, slot = MultiHash(0.5, bits=3), Slot("w", (10,), offset=5, total=16)
    good = method.describe(method.init(torch.randn(10), slot), slot)
    method.restore(good, slot)
    changed: list[tuple[str, Description]] = []
    for name, part in good.items():
        changed.append((name, {key: other for key, other in good.items() if key != name}))
        if isinstance(part, Symbols):
            for values in (part.values[1:], part.values + 6, part.values - 6):
                changed.append((name, {**good, name: Symbols(values)}))
            continue
        for array in (part[:-1], np.append(part, part[:1]), part.astype(np.float64), part * np.nan):
            changed.append((name, {**good, name: array}))
    changed.append(("left", {**good, "left": np.zeros(8, dtype=np.uint8)}))
    changed.append(("scale", {**good, "scale": np.array([np.inf], dtype=np.float32)}))
    for name, description in changed:
        with pytest.raises(FormatError, match=name):
            method.restore(description, slot)


@pytest.mark.parametrize("place", [{"offset": 7}, {"total": 14}, {"total": 0}, {"total": 2**60}])
def test_foreign_places_are_refused(place: dict[str, int]) -> None:
    method, slot = MultiHash(0.5), Slot("w", (10,), offset=5, total=16)
    good = method.describe(method.init(torch.randn(10), slot), slot)
    with pytest.raises(FormatError):
        method.restore(good, replace(slot, **place))
    few = MultiHash(bytes=40)
    with pytest.raises(FormatError, match="too few"):
        few.restore(good, replace(slot, total=2**40))
