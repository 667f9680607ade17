"""The laws of `Reparameterization`, over every method of the table × shapes × values × dtypes."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
from methods import TABLE, largest, name_of
from torch import Tensor

from hfcompress.container import Reader, Writer
from hfcompress.errors import ConfigError
from hfcompress.methods import (
    BY_NAME,
    METHODS,
    Dense,
    EntropyPenalized,
    Levels,
    MultiHash,
    SoftThreshold,
    Uniform,
)
from hfcompress.reparameterization import Kind, Latents, Reparameterization, Slot

SHAPES = {
    "scalar": (),
    "one": (1,),
    "empty": (0, 3),
    "below-a-bucket": (5,),
    "no-multiple": (37, 11),
    "conv": (8, 4, 3, 3),
    "threaded": (181, 190),  # torch cuts elementwise work into pieces of 32,768
}
VALUES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "normal": lambda x, large: x,
    "constant": lambda x, large: torch.full_like(x, -0.3),
    "zero": lambda x, large: torch.zeros_like(x),
    "huge": lambda x, large: x.clamp(-1, 1) * large,
    "tiny": lambda x, large: x * 1e-7,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PER_FILE = 1000  # bytes: the header, the index and the tables of a file with one slot


@dataclass(frozen=True)
class Case:
    """One method on one weight. `draw` 5 is that of some training step."""

    method: Reparameterization
    shape: str
    values: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{name_of(self.method)}-{self.shape}-{self.values}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def slot(self) -> Slot:
        shape = SHAPES[self.shape]
        return Slot(str(self), shape, Kind.OTHER, offset=0, total=prod(shape), draw=5)

    @property
    def weight(self) -> Tensor:
        drawn = torch.randn(SHAPES[self.shape], generator=torch.Generator().manual_seed(1))
        return VALUES[self.values](drawn, largest(self.method, self.dtype)).to(self.dtype)

    def latents(self) -> Latents:
        latents = self.method.init(self.weight, self.slot)
        constants = self.method.frozen
        return {n: z.requires_grad_(z.is_floating_point() and n not in constants) for n, z in latents.items()}

    def trained(self) -> Latents:
        """Latents some way from where they began."""
        generator = torch.Generator().manual_seed(2)
        moved = self.latents()
        with torch.no_grad():
            for latent in moved.values():
                if latent.requires_grad:
                    latent.mul_(1 - 0.2 * torch.rand(latent.shape, generator=generator).to(latent.dtype))
        return moved


CASES = [Case(method, shape, "normal", dtype) for method in TABLE for shape in SHAPES for dtype in DTYPES]
CASES += [
    Case(method, "no-multiple", values, dtype)
    for method in TABLE
    for values in VALUES
    if values != "normal"
    for dtype in DTYPES
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit: −0 is not 0."""
    raw = [t.flatten().view(torch.uint8) for t in (a.detach(), b.detach())]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@cache
def one_file() -> tuple[bytes, dict[str, Tensor]]:
    """All cases' trained latents in one file, and what they decode to here."""
    writer, expected = Writer(), {}
    with torch.no_grad():
        for case in CASES:
            latents = case.trained()
            writer.add_slot(case.slot, case.dtype, case.method, case.method.describe(latents, case.slot))
            expected[str(case)] = case.method.decode(latents, case.slot, hard=True)
    return writer.to_bytes("test"), expected


def test_the_table_holds_every_method() -> None:
    assert {type(method) for method in TABLE} == set(METHODS) == set(BY_NAME.values())
    assert len({name_of(method) for method in TABLE}) == len(TABLE)


@every_case
@pytest.mark.parametrize("hard", [True, False])
def test_fill(case: Case, hard: bool) -> None:
    weight = case.method.decode(case.latents(), case.slot, hard=hard)
    assert (weight.shape, weight.dtype) == (case.weight.shape, case.dtype)
    assert weight.isfinite().all()


@pytest.mark.parametrize(
    "case", [case for case in CASES if type(case.method).common is not Reparameterization.common], ids=str
)
def test_what_is_common_to_a_group_changes_nothing(case: Case) -> None:
    found = []
    for has in (True, False):
        latents = case.trained()
        common = case.method.common(latents) if has else {}
        assert not any(constant.requires_grad for constant in common.values()) and bool(common) == has
        weight = case.method.decode({**latents, **common}, case.slot, hard=False)
        weight.backward(torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype).view(weight.shape))
        found.append([weight, *(z.grad for z in latents.values() if z.grad is not None)])
    assert len(found[0]) == len(found[1]) > 1
    assert all(same_bits(a, b) for a, b in zip(*found))


@every_case
def test_learn(case: Case) -> None:
    latents = case.latents()
    weight = case.method.decode(latents, case.slot, hard=False)
    rate = case.method.rate(latents, case.slot)
    assert rate.shape == () and rate.isfinite() and rate >= 0
    (weight.float().sum() + rate).backward()
    for name, latent in latents.items():
        if latent.requires_grad:
            assert latent.grad is not None and latent.grad.isfinite().all(), name
            # where every weight is zero, a step or a threshold may be at rest
            at_rest = case.values == "zero" and name in case.method.auxiliary
            assert 0 in (latent.numel(), case.slot.numel) or at_rest or latent.grad.any(), name


def test_exact() -> None:
    data, expected = one_file()
    found = dict(Reader(data).tensors())
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


def test_exact_in_another_process_on_other_threads(tmp_path: Path, run_python: Callable[..., str]) -> None:
    data, expected = one_file()
    (tmp_path / "file").write_bytes(data)
    torch.save(expected, tmp_path / "expected")
    code = """
import sys, torch
from test_contract import Reader, same_bits
torch.set_num_threads(3)
expected = torch.load(sys.argv[2])
found = dict(Reader(open(sys.argv[1], "rb").read()).tensors())
print(len(found), [name for name in expected if not same_bits(found[name], expected[name])])
"""
    assert run_python(code, tmp_path / "file", tmp_path / "expected") == f"{len(expected)} []\n"


@pytest.mark.parametrize("case", [case for case in CASES if case.shape in ("threaded", "empty", "one")], ids=str)
def test_honest(case: Case) -> None:
    latents, writer = case.trained(), Writer()
    with torch.no_grad():
        writer.add_slot(case.slot, case.dtype, case.method, case.method.describe(latents, case.slot))
        rate = case.method.rate(latents, case.slot).item()
    assert len(writer.to_bytes("test")) <= 1.02 * rate / 8 + PER_FILE


@every_case
def test_hard_is_certain(case: Case) -> None:
    latents = case.trained()
    before = {name: latent.detach().clone() for name, latent in latents.items()}
    state = torch.get_rng_state()
    first = case.method.decode(latents, case.slot, hard=True)
    torch.manual_seed(99)
    assert same_bits(first, case.method.decode(latents, replace(case.slot, draw=6), hard=True))
    torch.set_rng_state(state)
    soft = case.method.decode(latents, case.slot, hard=False)
    assert torch.equal(state, torch.get_rng_state())
    assert case.method.noisy or same_bits(first, soft)
    assert all(same_bits(before[name], latent.detach()) for name, latent in latents.items())
    restored = case.method.restore(case.method.describe(latents, case.slot), case.slot)
    again = [case.method.decode(restored, case.slot, hard=True).to(case.dtype) for _ in range(2)]
    assert all(same_bits(first, weight) for weight in again)


@pytest.mark.parametrize("method", TABLE, ids=name_of)
def test_own_config(method: Reparameterization) -> None:
    assert type(method)(**json.loads(json.dumps(asdict(method)))) == method


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        (Uniform, {"bits": 2.5}, r"uniform: bits must be a valid integer.*found 2\.5"),
        (Uniform, {"bits": "4"}, "uniform: bits must be a valid integer.*found '4'"),
        (Uniform, {"scales": "bfloat16"}, "uniform: scales must be 'float16' or 'float32', found 'bfloat16'"),
        (Levels, {"start": "median"}, "levels: start must be 'nearest', 'quantile' or 'uniform', found 'median'"),
        (EntropyPenalized, {"transform": "DCT"}, "entropypenalized: transform must be 'none' or 'dft', found 'DCT'"),
        (MultiHash, {"bytes": "20KB"}, "multihash: bytes must be .*found '20KB'"),
        (SoftThreshold, {"survivors": 4.5}, "softthreshold: survivors must be .*found 4.5"),
        (Dense, {"dtype": "int8"}, "dense: dtype must be 'float16' or 'float32', found 'int8'"),
    ],
)
def test_options_of_another_type_are_refused(method: type[Reparameterization], options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        method(**options)


@pytest.mark.parametrize("method", [m for m in TABLE if m.noisy], ids=name_of)
def test_noise_depends_on_the_draw_alone(method: Reparameterization) -> None:
    case = Case(method, "no-multiple", "normal", torch.float32)
    latents, slot = case.latents(), case.slot
    first = method.decode(latents, slot, hard=False)
    torch.rand(3)
    assert torch.equal(first, method.decode(latents, slot, hard=False))
    assert not torch.equal(first, method.decode(latents, replace(slot, draw=6), hard=False))
    assert not torch.equal(first, method.decode(latents, slot, hard=True))
