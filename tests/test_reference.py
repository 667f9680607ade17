"""Every method's weights, decoded by the package and from the page docs/format.md: the same bits in every dtype."""

import math

import numpy as np
import pytest
import reference_decoder
import reference_methods
import torch
from methods import TABLE, name_of

from hfcompress.coding import Symbols
from hfcompress.container import Reader, Writer
from hfcompress.fourier import real_dft
from hfcompress.methods import MultiHash
from hfcompress.packing import COMMON
from hfcompress.reparameterization import Description, Kind, Reparameterization, Slot

SHAPES = ((6, 5, 3, 3), (7, 11), (4, 3, 2, 4), (), (1, 2, 8, 8), (0, 3), (2, 1, 9, 8), (2, 3, 1, 1), (5, 2, 3))


def described(writer: Writer, method: Reparameterization, dtype: torch.dtype) -> None:
    """A group of random weights of all shapes, as the method has them at the start."""
    total, offset = sum(map(math.prod, SHAPES)), 0
    generator = torch.Generator().manual_seed(5)
    for number, shape in enumerate(SHAPES):
        slot = Slot(f"w{number}", shape, Kind.OTHER, offset, total)
        weight = torch.randn(shape, generator=generator).to(dtype)
        offset += slot.numel
        writer.add_slot(slot, dtype, method, method.describe(method.init(weight, slot), slot))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("method", TABLE, ids=name_of)
def test_the_page_gives_the_same_bits(method: Reparameterization, dtype: torch.dtype) -> None:
    writer = Writer()
    described(writer, method, dtype)
    data = writer.to_bytes("test")
    reference = reference_decoder.tensors(data, COMMON)
    found = dict(Reader(data).tensors())
    assert found.keys() == reference.keys() and len(found) == len(SHAPES)
    for name, weight in found.items():
        ours = weight.contiguous().view(torch.int16).numpy() if dtype == torch.bfloat16 else weight.numpy()
        assert ours.shape == reference[name].shape and ours.tobytes() == reference[name].tobytes(), name


@pytest.mark.parametrize("bits", [2, 8, 9, 16])
def test_products_whose_scale_is_negative(bits: int) -> None:
    """A sum of zero is 0, not −0; and the largest codes of 16 bits have squares that float32 has not."""
    method, top, generator = MultiHash(fraction=0.5, bits=bits), 2 ** (bits - 1) - 1, np.random.default_rng(bits)
    slot = Slot("w", (9, 11), Kind.LINEAR, 0, 99)
    factors: Description = {}
    for name in ("left", "right"):
        codes = generator.integers(-top, top + 1, (10, method.rank(99))) * (np.arange(10) % 3 > 0)[:, None]
        factors[name] = Symbols(codes.astype(np.int32).reshape(-1))
        factors[f"{name}_amplitude"] = generator.random(10).astype(np.float16)
    writer = Writer()
    writer.add_slot(slot, torch.float32, method, {**factors, "scale": np.full(1, -1 / 3, dtype=np.float32)})
    data = writer.to_bytes("test")
    found = dict(Reader(data).tensors())["w"].numpy()
    assert found.tobytes() == reference_decoder.tensors(data, COMMON)["w"].tobytes()
    assert (found == 0).any() and not np.signbit(found[found == 0]).any()


@pytest.mark.parametrize(
    ("value", "bits"),
    [(1.0, 0x3F80), (-1.00390625, 0xBF80), (1.01171875, 0x3F82), (3.4e38, 0x7F80), (1e-40, 0x0001), (-0.0, 0x8000)],
)
def test_bfloat16_rounds_to_even(value: float, bits: int) -> None:
    assert reference_methods.cast(np.array([value], dtype=np.float32), "bfloat16")[0] == bits
    assert torch.tensor([value]).bfloat16().view(torch.int16).item() % 65536 == bits


@pytest.mark.parametrize(("height", "width"), [(1, 2), (3, 3), (5, 5), (4, 2), (7, 7), (8, 8), (1, 64)])
def test_the_basis(height: int, width: int) -> None:
    ours = real_dft(height, width, torch.device("cpu")).numpy()
    assert np.array_equal(ours.view(np.uint32), reference_methods.basis(height, width).view(np.uint32))


def test_the_basis_is_that_of_any_good_sine() -> None:
    """Four units in the last place of a double never turn a number of the basis into another float32."""
    for size in range(2, 65):
        for norm in (math.sqrt(1 / size), math.sqrt(2 / size)):
            angles = [6.283185307179586 * (k / size) for k in range(size)]
            waves = np.array([wave(angle) for angle in angles for wave in (math.sin, math.cos)])
            for error in (-4, 4):
                assert np.array_equal(np.float32(norm * waves), np.float32(norm * (waves + error * np.spacing(waves))))
