"""`methods/entropy.py` against the paper's formulas in loops and drawn noise, and what only this method promises."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import fourier
from torch import Tensor, nn
from toys import Toy, compress, loss_of

from hfcompress.checkpoint import to_bytes
from hfcompress.coding import Symbols
from hfcompress.container import Writer
from hfcompress.density import bits
from hfcompress.errors import ConfigError, FormatError
from hfcompress.fourier import real_dft
from hfcompress.methods import EntropyPenalized
from hfcompress.methods.entropy import LIMIT
from hfcompress.optimizer import CompressedOptimizer
from hfcompress.reparameterization import Latents, Slot

CPU = torch.device("cpu")
DFT = EntropyPenalized(transform="dft")
KERNELS = [(h, w) for h in range(1, 9) for w in range(1, 9) if h * w > 1]


def slot_of(*shape: int) -> Slot:
    return Slot("w", shape, total=math.prod(shape))


def latents_of(method: EntropyPenalized, weight: Tensor) -> Latents:
    latents = method.init(weight, slot_of(*weight.shape))
    return {name: latent.requires_grad_() for name, latent in latents.items()}


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(step: float) -> float:
    return torch.tensor(step).to(torch.bfloat16).item()


# ------------------------------------------------------------------------------------------------- the weight


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=60), st.floats(-6, 2), st.integers(0, 99))
def test_equals_the_papers_loops(weights: Sequence[float], log_step: float, seed: int) -> None:
    gradients = torch.randn(len(weights), generator=torch.Generator().manual_seed(seed))
    latents = {"weight": torch.tensor(weights), "log_step": torch.tensor([log_step])}
    latents = {name: latent.requires_grad_() for name, latent in latents.items()}
    decoded = EntropyPenalized().decode(latents, slot_of(len(weights)), hard=False)
    decoded.backward(gradients)
    step = stored(torch.tensor(log_step).exp().item())
    of_step = 0.0
    for weight, found, gradient in zip(weights, decoded.tolist(), gradients.tolist(), strict=True):
        z = weight / step
        tie = abs(abs(z - math.floor(z)) - 0.5) < 1e-3
        assert abs(found - step * round(z)) <= 1e-6 + (step if tie else 0)
        of_step += gradient * (found / step - z)
    assert torch.equal(latents["weight"].grad, gradients)
    assert latents["log_step"].grad.item() == pytest.approx(step * of_step, abs=1e-3 * step * len(weights))


def test_every_frequency_has_its_step() -> None:
    weight, gradient = random_weight(3, 2, 3, 2), random_weight(3, 2, 3, 2, seed=1)
    slot, basis = slot_of(3, 2, 3, 2), real_dft(3, 2, CPU)
    latents = latents_of(DFT, weight)
    assert latents["log_step"].shape == (6,)
    with torch.no_grad():
        latents["log_step"] += torch.linspace(-1, 1, 6)
    decoded = DFT.decode(latents, slot, hard=False)
    decoded.backward(gradient)
    of_steps = torch.zeros(6)
    for o in range(3):
        for i in range(2):
            spectrum = torch.tensor(fourier(weight[o, i].tolist())).flatten()
            pulled = torch.tensor(fourier(gradient[o, i].tolist())).flatten()  # an orthonormal map's own transpose
            steps = torch.tensor([stored(s.exp().item()) for s in latents["log_step"]])
            codes = (spectrum / steps).round()
            assert torch.allclose(latents["weight"][o, i].flatten(), spectrum, atol=1e-6)
            assert torch.allclose(decoded[o, i].flatten(), (steps * codes) @ basis, atol=1e-6)
            assert torch.allclose(latents["weight"].grad[o, i].flatten(), pulled, atol=1e-6)
            of_steps += steps * pulled * (codes - spectrum / steps)
    assert torch.allclose(latents["log_step"].grad, of_steps, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), KERNELS)
def test_the_transform_is_orthonormal_real_and_fourier(height: int, width: int) -> None:
    basis = real_dft(height, width, CPU)
    size = height * width
    assert torch.allclose(basis @ basis.T, torch.eye(size), atol=1e-5)
    kernel = random_weight(height, width)
    power = torch.fft.fft2(kernel.double(), norm="ortho").abs().square()
    mine = (basis @ kernel.flatten()).view(height, width).double().square()
    flipped = [torch.roll(p.flip(0, 1), (1, 1), (0, 1)) for p in (power, mine)]
    assert torch.allclose(mine + flipped[1], power + flipped[0], atol=1e-6)  # each frequency with its conjugate


@pytest.mark.parametrize(("height", "width"), KERNELS)
def test_no_mathematical_library_can_round_the_basis_differently(height: int, width: int) -> None:
    """The last bits of a cosine in double precision differ between machines; those of float32 must not."""
    for x in real_dft(height, width, CPU).unique().tolist():
        gap = abs(np.spacing(np.float32(x)))
        neighbours = [other for other in exact_entries(height, width) if abs(other - x) <= gap]
        for entry in neighbours:
            assert np.float32(entry * (1 - 2**-49)) == np.float32(entry * (1 + 2**-49))


def exact_entries(height: int, width: int) -> set[float]:
    size = height * width
    waves = [wave(2 * math.pi * k / size) for k in range(size) for wave in (math.sin, math.cos)]
    return {norm * wave for norm in (math.sqrt(1 / size), math.sqrt(2 / size)) for wave in waves}


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 5), (4, 3, 1, 1), (2, 2, 16, 16), (2, 2, 3, 3, 3)])
def test_what_is_no_small_kernel_has_one_step(shape: tuple[int, ...]) -> None:
    latents, plain = (latents_of(m, random_weight(*shape)) for m in (DFT, EntropyPenalized()))
    assert latents["log_step"].shape == (1,)
    assert torch.equal(latents["weight"], plain["weight"])


@pytest.mark.parametrize("method", [EntropyPenalized(), DFT, EntropyPenalized(step=1 / 32), replace(DFT, step=1 / 2)])
def test_starts_near_the_weight(method: EntropyPenalized) -> None:
    weight = random_weight(32, 16, 3, 3)
    error = method.decode(latents_of(method, weight), slot_of(*weight.shape), hard=True) - weight
    power = (error.square().mean() / weight.square().mean()).item()
    assert power == pytest.approx(method.step**2 / 12, rel=0.05)
    if method.transform == "none":
        assert error.abs().max() <= 0.51 * method.step * weight.square().mean().sqrt()


@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0], [0.3], [-7.0, -7.0], [1e-30, 1e-30], [1e30], [1.0, 1e9]])
def test_starts_near_odd_weights(values: list[float]) -> None:
    weight, slot = torch.tensor(values), slot_of(len(values))
    latents = latents_of(EntropyPenalized(), weight)
    decoded = EntropyPenalized().decode(latents, slot, hard=True)
    assert ((decoded - weight).abs() <= weight.abs().max() / 16).all() if values else decoded.shape == (0,)
    Writer().add_slot(slot, torch.float32, EntropyPenalized(), EntropyPenalized().describe(latents, slot))


def test_one_large_weight_among_many_has_a_code() -> None:
    weight = random_weight(100_000)
    weight[7] = 1e6
    decoded = EntropyPenalized().decode(latents_of(EntropyPenalized(), weight), slot_of(100_000), hard=True)
    assert decoded[7].item() == pytest.approx(1e6, rel=1e-4)


def test_codes_are_clamped_to_the_coders_alphabet() -> None:
    slot = slot_of(3)
    latents = {"weight": torch.tensor([1e9, -1e9, 1.0]), "log_step": torch.zeros(1)}
    latents = {name: latent.requires_grad_() for name, latent in latents.items()}
    decoded = EntropyPenalized().decode(latents, slot, hard=False)
    decoded.sum().backward()
    assert decoded.tolist() == [LIMIT, -LIMIT, 1]
    assert latents["weight"].grad.tolist() == [1, 1, 1] and latents["log_step"].grad.item() == 0
    writer = Writer()
    writer.add_slot(slot, torch.float32, EntropyPenalized(), EntropyPenalized().describe(latents, slot))
    writer.to_bytes("test")


# --------------------------------------------------------------------------------------------------- the rate


def a_group(method: EntropyPenalized) -> list[tuple[Latents, Slot]]:
    """Slots of many shapes whose steps are far apart, one of them empty, with the first one's prior."""
    shapes = [(40, 30), (8, 4, 3, 3), (), (0, 3), (6, 4, 5, 5), (50,)]
    members = []
    for i, shape in enumerate(shapes):
        weight = 10.0 ** -(i % 3) * random_weight(*shape, seed=i)
        latents = latents_of(method, weight)
        with torch.no_grad():
            latents["log_step"] += torch.linspace(0, 0.3 * i, len(latents["log_step"]))
        latents["prior"] = members[0][0]["prior"] if members else latents["prior"]
        members.append((latents, slot_of(*shape)))
    return members


def gradients_of(value: Tensor, members: Sequence[tuple[Latents, Slot]]) -> list[Tensor]:
    names = ("weight", "log_step")
    return list(torch.autograd.grad(value, [z[n] for z, _ in members for n in names] + [members[0][0]["prior"]]))


@pytest.mark.parametrize("method", [DFT, EntropyPenalized(prior="laplace", step=1 / 32)])
def test_a_groups_rate_is_the_sum_of_its_slots(method: EntropyPenalized) -> None:
    members = a_group(method)
    together = method.rate_of_group(members)
    apart = torch.stack([method.rate(latents, slot) for latents, slot in members]).sum()
    assert together.item() == pytest.approx(apart.item(), rel=1e-5)
    for a, b in zip(gradients_of(together, members), gradients_of(apart, members), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * (b.abs().max().item() if b.numel() else 0))


@pytest.mark.parametrize("method", [EntropyPenalized(), replace(DFT, prior="logistic", step=1 / 2)])
def test_the_rates_gradient_is_that_of_the_papers_noise(method: EntropyPenalized) -> None:
    """Σ −log2 p(φ / Δ + u), u drawn from U(−½, ½), differentiated by autograd and averaged."""
    members, generator = a_group(method)[:2], torch.Generator().manual_seed(0)
    prior, drawn, rounded = members[0][0]["prior"], torch.zeros(()), torch.zeros(())
    prior.data += 0.3  # where it is wrong, and has a gradient
    draws = 500
    for latents, _ in members:
        step = latents["log_step"].exp()
        step = step + (step.to(torch.bfloat16).float() - step).detach()
        z = latents["weight"].view(-1, len(step)) / step
        noise = torch.rand(draws, *z.shape, generator=generator) - 0.5
        drawn = drawn + bits(method.prior, prior, (z + noise).flatten()).sum() / draws
        rounded = rounded + bits(method.prior, prior, z.round().flatten()).sum() + 16 * len(step)
    rate = method.rate_of_group(members)
    assert rate.item() == pytest.approx(rounded.item(), rel=1e-5)  # a coder rounds
    for found, wanted in zip(gradients_of(rate, members), gradients_of(drawn, members), strict=True):
        assert (found - wanted).square().mean().sqrt() < 0.03 * wanted.square().mean().sqrt()


def test_a_rate_may_be_differentiated_twice_over() -> None:
    members = a_group(DFT)
    rate = DFT.rate_of_group(members)
    inputs = [members[0][0]["weight"], members[1][0]["log_step"], members[0][0]["prior"]]
    first, second = (torch.autograd.grad(f * rate, inputs, retain_graph=True) for f in (3.0, 1.0))
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(a, 3 * b, rtol=1e-4, atol=1e-5 * a.abs().max().item())


def test_nothing_is_changed_and_nothing_drawn() -> None:
    members = a_group(DFT)
    before = [{name: latent.detach().clone() for name, latent in latents.items()} for latents, _ in members]
    state = torch.get_rng_state()
    first, second = (DFT.rate_of_group(members) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(old[n], z[n]) for old, (z, _) in zip(before, members, strict=True) for n in old)


def test_a_diverged_weight_makes_the_rate_nan() -> None:
    for value in (math.nan, math.inf, -math.inf):
        latents = latents_of(EntropyPenalized(), random_weight(10))
        latents["weight"].data[3] = value
        assert EntropyPenalized().rate(latents, slot_of(10)).isnan()


# ----------------------------------------------------------------------------------------------- in training


@pytest.mark.parametrize("method", [DFT, EntropyPenalized(prior="logistic", step=1 / 2)])
def test_after_training_the_file_is_as_small_as_the_rate_says(method: EntropyPenalized) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    pictures = torch.randn(256, 2, 8, 8)
    labels = pictures[:, :, 1:3, 2:4].sum((2, 3)).argmax(1) + 2 * (pictures[:, 0, 5, 5] > 0)
    compressor = compress(network, method, rate_weight=1.0)
    optimizer = CompressedOptimizer(torch.optim.Adam(network.parameters(), lr=5e-3), compressor)
    losses, rates = [], []
    for _ in range(120):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(pictures), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        rates.append(compressor.rate().item())
    assert losses[-1] < 0.5 * losses[0]  # not dead
    assert rates[-1] < 0.5 * rates[0]
    size = len(to_bytes(network, compressor))
    assert size <= 1.02 * rates[-1] / 8 + 1500


def test_tied_norm_and_bias_weights_may_all_be_claimed() -> None:
    network = Toy()
    compressor = compress(network, EntropyPenalized(), rate_weight=0.01)
    optimizer = CompressedOptimizer(torch.optim.AdamW(network.parameters(), lr=1e-3), compressor)
    prior = compressor.entries["embed.weight"].latents["prior"]
    assert all(entry.latents["prior"] is prior for entry in compressor.entries.values())
    before = prior.detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        loss_of(network, step).backward()
        optimizer.step()
    assert not torch.equal(before, prior)
    for entry in compressor.entries.values():
        assert torch.equal(entry.parameter, entry.method.decode(entry.latents, entry.slot, hard=True))


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("step", [0.0, -0.1, 2**-7, 1.1, math.nan])
def test_impossible_settings_are_refused(step: float) -> None:
    with pytest.raises(ConfigError, match="step"):
        EntropyPenalized(step=step)


def test_foreign_descriptions_are_refused() -> None:
    slot = slot_of(2, 2, 3, 3)
    good = DFT.describe(latents_of(DFT, random_weight(2, 2, 3, 3)), slot)
    DFT.restore(good, slot)
    step = good["step"]
    assert isinstance(step, np.ndarray)
    for name, part in {
        "codes": Symbols(np.full(36, LIMIT + 1, dtype=np.int32)),
        "codes ": Symbols(np.zeros(35, dtype=np.int32)),
        " codes": np.zeros(36, dtype=np.int32),
        "step": step[:8],
        "step ": step.astype(np.float32),
        " step": np.zeros(9, dtype=np.int16),
        " step ": -np.abs(step),
        "step  ": np.full(9, 0x7F80, dtype=np.int16),  # infinity
        "  step": np.full(9, 0x7FC0, dtype=np.int16),  # not a number
    }.items():
        with pytest.raises(FormatError, match=name.strip()):
            DFT.restore({**good, name.strip(): part}, slot)
    with pytest.raises(FormatError):
        DFT.restore({"codes": good["codes"]}, slot)
