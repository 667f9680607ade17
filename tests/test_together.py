"""Slots decoded together: the same weights to the last bit, the same gradients, far fewer operations."""

from collections import Counter
from math import prod

import pytest
import torch
from methods import TABLE, name_of
from operations import Counting
from test_contract import DTYPES, same_bits
from torch import Tensor, nn

from hfcompress import Compressor, Rule, together
from hfcompress.methods import SoftThreshold
from hfcompress.reparameterization import Kind, Latents, Reparameterization, Slot

SHAPES = [(1,), (5,), (37, 11), (8, 4, 3, 3), (), (16, 8, 1, 1), (64, 16), (4, 8, 3, 3), (181, 190), (6, 2, 5, 5)]
every_method = pytest.mark.parametrize("method", TABLE, ids=name_of)


def members_of(method: Reparameterization, dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES):
    """Latents some way from where they began, of a rule that claims weights of these shapes."""
    generator = torch.Generator().manual_seed(3)
    total, offset, shared = sum(prod(shape) for shape in shapes), 0, {}
    members: list[tuple[Latents, Slot]] = []
    for number, shape in enumerate(shapes):
        slot = Slot(f"slot-{number}", shape, Kind.CONV, offset, total, draw=number)
        offset += slot.numel
        scale = 0.0 if number == 2 else 10.0 ** -(number % 3)
        latents = {**method.init((torch.randn(shape, generator=generator) * scale).to(dtype), slot), **shared}
        for name, latent in latents.items():
            if latent.is_floating_point() and name not in method.frozen and not latent.requires_grad:
                latent.mul_(1 - 0.2 * torch.rand(latent.shape, generator=generator).to(latent.dtype))
                latent.requires_grad_()
            if name in method.shared:
                shared[name] = latent
        members.append((latents, slot))
    return members


def gradients_of(members: list[tuple[Latents, Slot]]) -> list[Tensor]:
    """And takes them away."""
    found = []
    for latents, _ in members:
        for latent in latents.values():
            if latent.grad is not None:
                found.append(latent.grad.clone())
    for latents, _ in members:
        for latent in latents.values():
            latent.grad = None
    return found


def close(a: Tensor, b: Tensor) -> bool:
    """But for the last digits of a sum in another order."""
    few = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}[a.dtype]
    return a.dtype == b.dtype and bool((a.float() - b.float()).abs().max() <= few * (1e-6 + b.float().abs().max()))


@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hard", [True, False])
def test_a_group_decodes_as_its_slots_do(method: Reparameterization, dtype: torch.dtype, hard: bool) -> None:
    members = members_of(method, dtype)
    generator = torch.Generator().manual_seed(4)
    upstream = [torch.randn(slot.shape, generator=generator).to(dtype) for _, slot in members]
    singly = [method.decode(latents, slot, hard=hard) for latents, slot in members]
    torch.autograd.backward(singly, upstream)
    wanted = gradients_of(members)
    common = method.common(members[0][0])
    found = method.decode_group([({**latents, **common}, slot) for latents, slot in members], hard=hard)
    assert len(found) == len(singly) and all(same_bits(a, b) for a, b in zip(found, singly))
    torch.autograd.backward(found, upstream)
    gradients = gradients_of(members)
    assert len(gradients) == len(wanted) > 0 and all(close(a, b) for a, b in zip(gradients, wanted))


@every_method
def test_the_rate_of_a_group_is_the_same_in_batches(
    method: Reparameterization, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = members_of(method, torch.float32)
    found = []
    for at_once in (1, 1500, 1 << 24):
        monkeypatch.setitem(together.AT_ONCE, "cpu", at_once)
        rate = method.rate_of_group(members)
        if rate.requires_grad:
            rate.backward()
        found.append((rate.item(), gradients_of(members)))
    for rate, gradients in found[1:]:
        assert rate == pytest.approx(found[0][0], rel=1e-6)
        assert len(gradients) == len(found[0][1]) and all(close(a, b) for a, b in zip(gradients, found[0][1]))


def step_of(method: Reparameterization, tensors: int) -> tuple[Counter[str], list[Tensor]]:
    """The operations of a step's write and pull-back in a model of so many weights; the latents' gradients."""
    torch.manual_seed(0)
    model = nn.ParameterDict({f"w{i}": torch.randn(8, 8 + i % 3, 3, 3) for i in range(tensors)})
    priced = method.rate_of_group(members_of(method, torch.float32)).requires_grad
    compressor = Compressor(model, [Rule(method=method)], rate_weight=0.1 if priced else 0.0)
    for number, parameter in enumerate(model.values()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    with Counting() as count:
        compressor.write(hard=False)
        compressor.pull_back()
    return count.found, [latent.grad for _, latent, _ in compressor.trained()]


@every_method
def test_operations_of_a_step(method: Reparameterization, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most five for one more weight, eight where each has a grid of its own; one by one they are up to sixty."""
    _, wanted = step_of(method, 12)
    monkeypatch.setitem(together.AT_ONCE, "cpu", 1 << 24)
    few, found = step_of(method, 12)
    many, _ = step_of(method, 62)
    assert all(close(a, b) for a, b in zip(found, wanted, strict=True))
    assert many.total() - few.total() <= 50 * (8 if isinstance(method, SoftThreshold) else 5), many - few


@every_method
def test_weights_without_a_gradient_keep_their_latents(
    method: Reparameterization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen or unused ones, among others that are decoded together with them; and weights written without a graph."""
    found = []
    for at_once in (1, 1 << 24):
        monkeypatch.setitem(together.AT_ONCE, "cpu", at_once)
        torch.manual_seed(0)
        model = nn.ParameterDict({f"w{i}": torch.randn(8, 9) for i in range(5)})
        compressor = Compressor(model, [Rule(method=method)])
        for used in (["w1", "w4"], list(model)):
            for number, name in enumerate(used):
                gradient = torch.randn(8, 9, generator=torch.Generator().manual_seed(number))
                model[name].grad = gradient
            compressor.write(hard=used != ["w1", "w4"])
            compressor.pull_back()
            assert all(parameter.grad is None for parameter in model.values())
            for entry in compressor.entries.values():
                own = [z for key, z in entry.latents.items() if z.requires_grad and key not in method.shared]
                assert all((z.grad is not None) == (entry.slot.name in used) for z in own)
            found += gradients_of([(entry.latents, entry.slot) for entry in compressor.entries.values()])
    half = len(found) // 2
    assert half and all(close(a, b) for a, b in zip(found[:half], found[half:], strict=True))
