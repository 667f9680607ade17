"""Files of format 1 that must decode for ever, to the same weights, by the package and by the reference decoder.

`python tests/test_golden.py` writes those that are missing; one that is there is never written again.
"""

import hashlib
import json
from collections.abc import Callable
from math import isqrt, prod
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import reference_decoder
import torch

from hfcompress.coding import Symbols, rans
from hfcompress.coding.symbols import CONTEXTS, PLAIN
from hfcompress.coding.trellis import join
from hfcompress.container import Reader, Writer
from hfcompress.methods import Dense, EntropyPenalized, Levels, Magnitude, MultiHash, SoftThreshold, Uniform
from hfcompress.packing import COMMON
from hfcompress.reparameterization import Description, Kind, Reparameterization, Slot

FOLDER = Path(__file__).parent / "golden"
RECORD = FOLDER / "sha256.json"


def add(writer: Writer, name: str, shape: tuple[int, ...], codes: np.ndarray, method: Uniform) -> None:
    """A uniform weight of these codes; its scales are simple numbers."""
    buckets = -(-prod(shape) // (method.bucket or max(prod(shape), 1)))
    numbers = {part: (np.arange(buckets) % 7 - 3 * (part == "low")) / 8 for part in ("low", "step")}
    scales = {part: values.astype(method.scales) for part, values in numbers.items()}
    slot = Slot(name, shape, Kind.CONV if len(shape) == 4 else Kind.LINEAR, 0, prod(shape))
    writer.add_slot(slot, torch.float32, method, {"codes": Symbols(codes.astype(np.int32).reshape(-1)), **scales})


def filters(writer: Writer, bits: int, shapes: list[tuple[int, ...]]) -> None:
    """Codes with rows, channels and neighbours that differ, so that contexts pay."""
    generator, top = np.random.default_rng(bits), 2**bits - 1
    for number, shape in enumerate(shapes):
        drawn = generator.integers(-64, 65, shape) * generator.integers(-64, 65, shape)
        if len(shape) > 2:
            drawn[..., 1:] += drawn[..., :-1] // 2
        drawn *= generator.integers(1, 9, (shape[0], *[1] * (len(shape) - 1))) ** 2
        drawn *= generator.integers(1, 9, (1, shape[1], *[1] * (len(shape) - 2))) ** 2
        codes = np.clip(drawn // (int(np.abs(drawn).mean()) * 6 // 2**bits + 1) + top // 2, 0, top)
        add(writer, f"layer.{number}.weight", shape, codes, Uniform(bits=bits, bucket=None))


def tables(writer: Writer) -> None:
    """Shared tables, constants, an empty weight, and alphabets of which low bits are split off."""
    generator = np.random.default_rng(0)
    for number, (n, bits) in enumerate([(900, 2), (700, 2), (64, 4), (0, 4), (300, 1), (2000, 8)]):
        codes = np.minimum(generator.integers(0, 2**bits, n), generator.integers(0, 2**bits, n))
        add(writer, f"w{number}", (n,), codes, Uniform(bits=bits, bucket=100, scales="float32"))
    add(writer, "constant", (40, 3), np.full(120, 5), Uniform(bits=3, bucket=16))


def numbers(writer: Writer) -> None:
    """Every type of array, one of them shared, and stored weights."""
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16):
        writer.add_raw(f"buffer.{str(dtype).removeprefix('torch.')}", "buffer", (torch.arange(300) % 97 - 8).to(dtype))
    for dtype in (torch.int8, torch.uint8, torch.bool):
        writer.add_raw(f"buffer.{str(dtype).removeprefix('torch.')}", "buffer", (torch.arange(6) % 3).to(dtype))
    writer.add_raw("scalar", "buffer", torch.tensor(-0.0))
    writer.add_raw("twice", "norm", (torch.arange(300) % 97 - 8).float())
    weight = (np.arange(60).reshape(6, 10) - 30) / 16
    for dtype in ("float16", "float32"):
        slot = Slot(f"dense.{dtype}", (6, 10), Kind.LINEAR, 0, 60)
        writer.add_slot(slot, torch.float32, Dense(dtype), {"weight": weight.astype(dtype)})


def peaked(generator: np.random.Generator, n: int, top: int) -> np.ndarray:
    """Integers −top … top, the smaller the more frequent. [n]"""
    sizes = np.minimum(generator.integers(0, top + 1, n), generator.integers(0, top + 1, n))
    return sizes * generator.choice((-1, 1), n)


def symbols(values: np.ndarray) -> Symbols:
    return Symbols(values.astype(np.int32))


Slots = list[tuple[Reparameterization, tuple[int, ...], Description]]


def fill(writer: Writer, slots: Slots) -> None:
    """These weights, each method's own ones after each other: one group."""
    totals: dict[str, int] = {}
    for _ in range(2):
        places = dict.fromkeys(totals, 0)
        for number, (method, shape, description) in enumerate(slots):
            key = repr(method)
            if key in places:
                kind = Kind.CONV if len(shape) == 4 else Kind.LINEAR
                slot = Slot(f"layers.{number // 2}.w{number % 2}", shape, kind, places[key], totals[key])
                writer.add_slot(slot, torch.float32, method, description)
                places[key] += prod(shape)
            else:
                totals[key] = totals.get(key, 0) + prod(shape)


def zero_points(writer: Writer) -> None:
    generator = np.random.default_rng(11)
    slots: Slots = []
    for bits, bucket, shape in ((4, 32, (24, 40)), (4, 32, (16, 8, 3, 3)), (2, None, (30, 30)), (8, 64, (20, 32))):
        buckets, top = -(-prod(shape) // (bucket or prod(shape))), 2**bits - 1
        description: Description = {
            "codes": symbols(np.clip(peaked(generator, prod(shape), top) + top // 2, 0, top)),
            "zero": generator.integers(0, top + 1, buckets).astype(np.uint8),
            "step": (generator.integers(1, 64, buckets) / 512).astype(np.float16),
        }
        slots.append((Uniform(bits=bits, bucket=bucket, zero_point=True), shape, description))
    fill(writer, slots)


def levels(writer: Writer) -> None:
    """The last one is so long that its stream has several states."""
    generator = np.random.default_rng(12)
    slots: Slots = []
    for method, shape in (
        (Levels(points=16, bucket=64), (24, 40)),
        (Levels(points=16, bucket=64), (8, 8, 3, 3)),
        (Levels(points=5, bucket=None, start="uniform"), (31, 7)),
        (Levels(points=256, bucket=250, scales="float32"), (100, 100)),
    ):
        buckets = -(-prod(shape) // (method.bucket or prod(shape)))
        arrays = {
            "points": np.sort(generator.permutation(1024)[: method.points]) / 1024,
            "low": generator.integers(-64, 1, buckets) / 64,
            "span": generator.integers(1, 65, buckets) / 32,
        }
        codes = symbols(generator.integers(0, method.points, prod(shape)))
        slots.append((method, shape, {"codes": codes, **{n: a.astype(method.scales) for n, a in arrays.items()}}))
    fill(writer, slots)


def penalized(writer: Writer, transform: str) -> None:
    """Steps are the upper halves of float32 numbers."""
    generator = np.random.default_rng(13)
    slots: Slots = []
    for shape, top in (((16, 8, 3, 3), 20), ((8, 16, 5, 5), 3), ((40, 40), 9), ((10, 16, 1, 1), 300)):
        places = prod(shape[2:]) if transform == "dft" else 1
        steps = (generator.integers(1, 128, places) / 256).astype(np.float32).view(np.uint32) >> 16
        description: Description = {
            "codes": symbols(peaked(generator, prod(shape), top)),
            "step": steps.astype(np.uint16).view(np.int16),
        }
        slots.append((EntropyPenalized(transform=transform, step=1 / 8), shape, description))  # type: ignore[arg-type]
    fill(writer, slots)


def dependent(writer: Writer) -> None:
    """Codes whose lowest bit a trellis tells: with tables, with contexts, with low bits of their own."""
    generator = np.random.default_rng(16)
    step = (np.ones(1, dtype=np.float32) / 64).view(np.uint32)[:1] >> 16
    slots: Slots = []
    for shape, top in (((40, 40), 3), ((16, 16, 3, 3), 40), ((24, 100), 3000), ((7, 3), 2)):
        high = peaked(generator, prod(shape), top).reshape(shape)
        if len(shape) == 4:
            high = high * generator.integers(1, 9, (shape[0], 1, 1, 1)) ** 2 // 40
        codes = join(high.astype(np.int32).reshape(-1))
        slots.append((EntropyPenalized(), shape, {"codes": symbols(codes), "step": step.astype(np.int16)}))
    fill(writer, slots)


def thresholds(writer: Writer) -> None:
    """Weights pruned by learned thresholds and by size, their survivors as numbers or in 3 and 6 bits."""
    generator = np.random.default_rng(14)
    slots: Slots = []
    for shape in ((24, 40), (16, 8, 3, 3), (5, 5)):
        alive = generator.random(prod(shape)) < 0.15
        survivors = (generator.integers(1, 999, int(alive.sum())) / 512).astype(np.float16)
        method = SoftThreshold() if len(shape) == 2 else Magnitude(sparsity=0.85)
        slots.append((method, shape, {"alive": symbols(alive), "survivors": survivors}))
    for bits in (3, 6):
        codes = peaked(generator, 1440, 2 ** (bits - 1) - 1) * (generator.random(1440) < 0.3)
        step = np.full(1, 3 / 64, dtype=np.float32)
        slots.append((SoftThreshold(survivors=bits), (36, 40), {"codes": symbols(codes), "step": step}))
    fill(writer, slots)


def hashes(writer: Writer) -> None:
    """Three weights cut from one product, and one whose codes need sums in double precision."""
    generator = np.random.default_rng(15)
    slots: Slots = []
    for method, shapes in (
        (MultiHash(fraction=0.2), ((30, 40), (8, 4, 3, 3), (7,))),
        (MultiHash(bytes=900, bits=12), ((20, 25),)),
    ):
        total = sum(map(prod, shapes))
        n, rank, top = isqrt(total - 1) + 1, method.rank(total), 2 ** (method.bits - 1) - 1
        factors: Description = {}
        for name in ("left", "right"):
            factors[name] = symbols(peaked(generator, n * rank, top))
            factors[f"{name}_amplitude"] = (generator.integers(1, 64, n) / 32).astype(np.float16)
        for number, shape in enumerate(shapes):
            slots.append((method, shape, {**factors, "scale": np.full(1, (number + 1) / 32, dtype=np.float32)}))
    fill(writer, slots)


FILES: dict[str, Callable[[Writer], None]] = {
    "kernels": lambda w: filters(w, 3, [(33, 16, 3, 3), (24, 1, 5, 5), (10, 8, 3)]),
    "matrices": lambda w: filters(w, 2, [(48, 20), (33, 16, 1, 1)]),
    "fine": lambda w: filters(w, 7, [(40, 16, 3, 3), (40, 30)]),
    "tables": tables,
    "numbers": numbers,
    "nothing": lambda w: None,
    "zero_points": zero_points,
    "levels": levels,
    "penalized": lambda w: penalized(w, "none"),
    "penalized_dft": lambda w: penalized(w, "dft"),
    "dependent": dependent,
    "thresholds": thresholds,
    "hashes": hashes,
}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of names, shapes and bits."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].contiguous()
        found.update(f"{name} {array.dtype} {tuple(array.shape)} ".encode())
        found.update(bits_of(array))
    return found.hexdigest()


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def load(name: str) -> bytes:
    return (FOLDER / f"{name}.hfcompress.safetensors").read_bytes()


@pytest.mark.parametrize("name", json.loads(RECORD.read_text()) if RECORD.exists() else [])
def test_a_golden_file_decodes_as_ever(name: str) -> None:
    assert digest(dict(Reader(load(name)).tensors())) == json.loads(RECORD.read_text())[name]


def test_every_file_is_recorded() -> None:
    assert {path.name.split(".")[0] for path in FOLDER.glob("*.safetensors")} == set(json.loads(RECORD.read_text()))


@pytest.mark.parametrize("name", FILES)
def test_the_reference_decoder_agrees(name: str) -> None:
    reader = Reader(load(name))
    index, values = reference_decoder.parts(load(name), COMMON)
    found = reader.values()
    assert len(found) == len(values)
    for ours, theirs in zip(found, values):
        ours = ours.values if isinstance(ours, Symbols) else ours
        assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
    decoded = dict(reader.tensors())
    reference = reference_decoder.tensors(load(name), COMMON)
    assert len(decoded) == len(index["slots"]) + len(index["raw"])
    assert reference.keys() == decoded.keys()
    for key, array in reference.items():
        assert tuple(decoded[key].shape) == array.shape and bits_of(decoded[key]) == array.tobytes(), key


def test_a_golden_file_of_every_method() -> None:
    found = {type(slot.method) for name in FILES for slot in Reader(load(name)).slots}
    assert found >= {Dense, Uniform, Levels, EntropyPenalized, SoftThreshold, Magnitude, MultiHash}


def test_the_specification_gives_the_dictionary() -> None:
    text = (FOLDER.parent.parent / "docs" / "format.md").read_text(encoding="utf-8").split("## Dictionary")[1]
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    assert "".join(lines).replace("\\0", "\0").replace("\\1", "\1").replace("\\2", "\2").encode() == COMMON


def test_every_form_occurs() -> None:
    forms = [(p.type, f) for name in FILES for p in Reader(load(name)).index.parts for f in p.forms]
    coded = [f for kind, f in forms if kind == "symbols"]
    assert any(f.table == CONTEXTS and f.shift for f in coded) and any(f.table >= 0 and f.shift for f in coded)
    joined = [f for f in coded if f.joined]
    assert {f.table == CONTEXTS for f in joined} == {f.shift > 0 for f in joined} == {True, False}
    assert any(f.table == PLAIN for f in coded)
    assert {f.table == PLAIN for kind, f in forms if kind != "symbols"} == {True, False}
    groups = [Reader(load(name)).tables.classes for name in ("kernels", "matrices")]
    assert groups[0][0] is not None and groups[1][1] is not None
    assert max(Reader(load(name)).index.states for name in FILES) > 1


@pytest.mark.parametrize("name", FILES)
def test_writing_is_certain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes with few states and many, compiled and not."""
    compiled: list[ModuleType | None] = [rans.fast, None]
    written = []
    for fast in compiled:
        for few in (1, 1 << 20):
            monkeypatch.setattr(rans, "fast", fast)
            monkeypatch.setattr(rans, "FEW", few)
            writer = Writer()
            FILES[name](writer)
            written.append(writer.to_bytes("golden"))
            assert digest(dict(Reader(written[-1]).tensors())) == json.loads(RECORD.read_text())[name]
    assert len(set(written)) == 1


def main() -> None:
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name, fill in FILES.items():
        if name not in record:
            writer = Writer()
            fill(writer)
            data = writer.to_bytes("golden")
            (FOLDER / f"{name}.hfcompress.safetensors").write_bytes(data)
            record[name] = digest(dict(Reader(data).tensors()))
            print(f"{name}: {len(data)} bytes")
    RECORD.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
