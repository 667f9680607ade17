"""Damaged, foreign and hostile files: no wrong weight is accepted, no error is another than ours, nothing hangs.

HFCOMPRESS_FAULTS=10 makes ten times as many random faults (for a nightly run).
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compress, make_model
from safetensors.torch import save as save_safetensors
from torch import nn

from hfcompress.checkpoint import FILE_NAME, read, save, sizes, to_bytes
from hfcompress.coding.bits import BitWriter
from hfcompress.coding.symbols import CONTEXTS, PLAIN, Form
from hfcompress.coding.tables import TOTAL, Table, write
from hfcompress.compressor import Compressor
from hfcompress.container import Reader
from hfcompress.errors import FormatError, IntegrityError
from hfcompress.index import Cursor, Index, Part, SlotRecord, put
from hfcompress.methods import Dense, Uniform
from hfcompress.packing import squeeze, unsqueeze
from hfcompress.schema import Rule
from hfcompress.sealed import MAX_HEADER, seal, unseal

Edit = Callable[[Index], Index]
TIMES = int(os.environ.get("HFCOMPRESS_FAULTS", "1"))
"""How many times the usual number of random faults there are."""


GOLDEN = {p.name.split(".")[0]: p.read_bytes() for p in (Path(__file__).parent / "golden").glob("*.safetensors")}
"""Small files of every method."""


@cache
def small() -> bytes:
    """A file of some 500 bytes in which every kind of array occurs."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(12, 6), "b": nn.BatchNorm1d(6), "c": nn.Linear(3, 2)})
    rules = [Rule(method=Uniform(bits=3, bucket=8), pattern="a.*"), Rule(method=Dense(), pattern="c.weight")]
    return to_bytes(model, Compressor(model, rules))


@cache
def large() -> bytes:
    model = make_model("cifar_resnet20")
    return to_bytes(model, compress(model))


def accepted(data: bytes) -> bool:
    """Whether the file is read to its last weight; any error that is not ours passes through."""
    try:
        reader = Reader(data)
        for _ in reader.tensors():
            pass
        sizes(reader)
    except FormatError:
        return False
    return True


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_the_files_themselves_are_good() -> None:
    assert accepted(small()) and accepted(large())


# ---------------------------------------------------------------------------------------------- accidents


def test_truncation_at_every_length() -> None:
    for data in (small(), *GOLDEN.values()):
        assert [n for n in range(len(data)) if accepted(data[:n])] == []


def test_a_truncated_file_says_how_much_is_there() -> None:
    data, header = small(), 8 + int.from_bytes(small()[:8], "little")
    for n in range(len(data)):
        promised = f"header promises {len(data):,}" if n >= header else f"header alone promises {header}"
        told = promised if n >= 8 else "fewer than any file has"
        with pytest.raises(FormatError, match=f"^truncated.*: {n:,} bytes were found, .*{told}"):
            Reader(data[:n])
    with pytest.raises(IntegrityError, match=f"added to it: {len(data) + 3:,} bytes were found, .* {len(data):,}:"):
        Reader(data + b"abc")


def test_every_single_bit_of_a_small_file() -> None:
    data = small()
    assert [bit for bit in range(8 * len(data)) if accepted(flipped(data, bit))] == []


def test_random_bits_of_a_large_file() -> None:
    data, generator = large(), random.Random(0)
    bits = (generator.randrange(8 * len(data)) for _ in range(2000 * TIMES))
    assert [bit for bit in bits if accepted(flipped(data, bit))] == []


def test_several_bits_at_once() -> None:
    """With those of the other tests more than 20,000 flips."""
    generator = random.Random(6)
    for data in GOLDEN.values():
        for _ in range(1500 * TIMES):
            changed = bytearray(data)
            for bit in generator.sample(range(8 * len(data)), generator.choice((1, 1, 2, 3, 8))):
                changed[bit // 8] ^= 1 << bit % 8
            assert not accepted(bytes(changed))


def test_a_flipped_weight_is_told_from_a_foreign_file() -> None:
    with pytest.raises(IntegrityError, match="download it again"):
        Reader(flipped(small(), 8 * len(small()) - 3))


def test_other_accidents() -> None:
    data, generator = small(), random.Random(1)
    for _ in range(500 * TIMES):
        start, end = sorted(generator.sample(range(len(data)), 2))
        for changed in (
            data[:start] + data[end:],  # a run lost
            data[:end] + data[start:],  # a run twice
            data[:start] + bytes(end - start) + data[end:],  # a run of zeros
            data[:start] + generator.randbytes(end - start) + data[end:],
        ):
            assert changed == data or not accepted(changed)


@pytest.mark.parametrize("extra", [b"\0", b" ", b"\n" * 8, bytes(4096)], ids=len)
def test_appended_bytes(extra: bytes) -> None:
    assert not accepted(small() + extra) and not accepted(extra + small())


def test_a_zip_polyglot() -> None:
    buffer = io.BytesIO(small())
    buffer.seek(0, io.SEEK_END)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("payload", "other content")
    assert zipfile.is_zipfile(buffer) and buffer.getvalue().startswith(small())
    assert not accepted(buffer.getvalue())


# -------------------------------------------------------------------------------------------- foreign files


@pytest.mark.parametrize("length", [0, 7, len(small()) - 7, MAX_HEADER + 1, 2**31, 2**63, 2**64 - 1])
def test_header_lengths(length: int) -> None:
    start = time.monotonic()
    assert not accepted(length.to_bytes(8, "little") + small()[8:])
    assert time.monotonic() - start < 1


def test_foreign_safetensors(tmp_path: Path) -> None:
    weights = {"weight": torch.zeros(3)}
    for metadata in (None, {}, {"format": "pt"}, {"format": "hfcompress"}):
        (tmp_path / FILE_NAME).write_bytes(save_safetensors(weights, metadata=metadata))
        with pytest.raises(FormatError, match=FILE_NAME):
            read(tmp_path)
    many = {str(i): torch.zeros(0) for i in range(20_000)}
    with pytest.raises(FormatError, match="not a compressed file"):
        Reader(save_safetensors(many))


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"PK\3\4" * 50, b"\x80\x04." * 99, b"{}", bytes(range(256))], ids=len)
def test_other_files(data: bytes) -> None:
    assert not accepted(data)


def test_a_folder_without_the_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="expected a folder"):
        read(tmp_path)


def test_a_future_version_says_upgrade() -> None:
    data = small().replace(b'"hfcompress-1"', b'"hfcompress-2"')
    with pytest.raises(FormatError, match=r"version 2, this package reads version 1: upgrade"):
        Reader(data)


# ----------------------------------------------------------- hostile files: well sealed, but wrong in themselves


def opened(data: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """The sections of a file: index (unpacked), tables, plain bytes, stream."""
    cursor = Cursor(bytes(unseal(data)))
    lengths = [cursor.number() for _ in range(3)]
    index, tables, rest = (cursor.take(length) for length in lengths)
    return unsqueeze(index), tables, rest, bytes(unseal(data))[cursor.at :]


def closed(index: bytes, tables: bytes, rest: bytes, stream: bytes, *, packed: bytes | None = None) -> bytes:
    """A well sealed file of these sections."""
    head, packed = bytearray(), squeeze(index) if packed is None else packed
    for section in (packed, tables, rest):
        put(head, len(section))
    return seal(bytes(head) + packed + tables + rest + stream)


def resealed(edit: Edit) -> bytes:
    """The small file with its index edited and every digest made anew."""
    index, *others = opened(small())
    return closed(edit(Index.from_bytes(index)).to_bytes(), *others)


def slot(**changes: Any) -> Edit:
    """The first slot changed."""
    return lambda i: replace(i, slots=(replace(i.slots[0], **changes), *i.slots[1:]))


def raw(**changes: Any) -> Edit:
    return lambda i: replace(i, raw=(replace(i.raw[0], **changes), *i.raw[1:]))


def part(number: int, **changes: Any) -> Edit:
    return lambda i: replace(i, parts=(*i.parts[:number], replace(i.parts[number], **changes), *i.parts[number + 1 :]))


def method(**changes: Any) -> Edit:
    """A field of the first method changed."""
    return lambda i: replace(i, methods=({"uniform": {**i.methods[0]["uniform"], **changes}}, *i.methods[1:]))


INDEX_EDITS: dict[str, Edit] = {
    "unknown method": lambda i: replace(i, methods=({"wavelet": {}}, *i.methods[1:])),
    "two methods in one": lambda i: replace(i, methods=({**i.methods[0], "dense": {}}, *i.methods[1:])),
    "no method": lambda i: replace(i, methods=({}, *i.methods[1:])),
    "a method that is a list": lambda i: replace(i, methods=([], *i.methods[1:])),
    "unknown field": method(depth=1),
    "bits 9": method(bits=9),
    "bits 3.0": method(bits=3.0),
    "fewer bits than codes": method(bits=2),
    "another bucket": method(bucket=4),
    "other scales": method(scales="float32"),
    "a scale that is a list": method(scales=[]),
    "method beyond": slot(method=2),
    "wrong method": slot(method=1),
    "unknown kind": slot(kind="gate"),
    "kind that is a number": slot(kind=4),
    "integer weights": slot(dtype="int8"),
    "overflowing size": slot(shape=(2**32, 2**32)),
    "nine axes": slot(shape=(1,) * 8 + (72,)),
    "larger shape": slot(shape=(6, 13)),
    "larger raw shape": raw(shape=(7,)),
    "more symbols": part(0, count=73),
    "fewer symbols": part(0, count=71),
    "2^40 symbols": part(0, count=2**40),
    "no symbols": part(0, count=0),
    "a table beyond": part(0, forms=(Form(9),)),
    "no table": part(0, forms=(Form(PLAIN),)),
    "contexts without classes": part(0, forms=(Form(CONTEXTS),)),
    "a shift": part(0, forms=(Form(0, shift=3),)),
    "a long shift": part(0, forms=(Form(0, shift=40),)),
    "planes of contexts": part(1, forms=(Form(CONTEXTS),) * 2),
    "planes of a table": part(1, forms=(Form(0),) * 2),
    "a longer array": part(1, count=10),
    "a much longer array": part(1, count=2**40),
    "a name twice": lambda i: replace(i, raw=(replace(i.raw[0], name=i.raw[1].name), *i.raw[1:])),
    "a long name": raw(name="a" * 1025),
    "a description of another name": slot(parts=(("code", 0), ("low", 1), ("step", 2))),
    "a description of a number": slot(parts=((7, 0), ("low", 1), ("step", 2))),
    "more states": lambda i: replace(i, states=1 << 14),
    "absurdly many states": lambda i: replace(i, states=1 << 60),
}


@pytest.mark.parametrize("case", INDEX_EDITS)
def test_an_index_that_contradicts_itself(case: str) -> None:
    data = resealed(INDEX_EDITS[case])
    with pytest.raises(FormatError):
        dict(Reader(data).tensors())


SECTIONS: dict[str, Callable[[bytes, bytes, bytes, bytes], bytes]] = {
    "no index": lambda i, t, r, s: closed(b"", t, r, s),
    "no packed index": lambda i, t, r, s: closed(i, t, r, s, packed=b""),
    "an index packed otherwise": lambda i, t, r, s: closed(i, t, r, s, packed=b"\3" + i),
    "an index that is not deflated": lambda i, t, r, s: closed(i, t, r, s, packed=b"\1" + bytes(range(99))),
    "an index that is not LZMA": lambda i, t, r, s: closed(i, t, r, s, packed=b"\2" + bytes(range(99))),
    "an index that bursts": lambda i, t, r, s: closed(bytes(10**8), t, r, s),
    "an index and more": lambda i, t, r, s: closed(i, t, r, s, packed=squeeze(i) + b"\0"),
    "an index with more in it": lambda i, t, r, s: closed(i + b"\0", t, r, s),
    "half an index": lambda i, t, r, s: closed(i[: len(i) // 2], t, r, s),
    "half a word of stream": lambda i, t, r, s: closed(i, t, r, s[:-1]),
    "a shorter stream": lambda i, t, r, s: closed(i, t, r, s[:-2]),
    "a longer stream": lambda i, t, r, s: closed(i, t, r, s + b"\1\2"),
    "a stream of zeros": lambda i, t, r, s: closed(i, t, r, bytes(len(s))),
    "no stream": lambda i, t, r, s: closed(i, t, r, b""),
    "no tables": lambda i, t, r, s: closed(i, b"", r, s),
    "tables and more": lambda i, t, r, s: closed(i, t + b"\0", r, s),
    "fewer plain bytes": lambda i, t, r, s: closed(i, t, r[:-1], s),
    "more plain bytes": lambda i, t, r, s: closed(i, t, r + b"\0", s),
    "numbers that are not finite": lambda i, t, r, s: closed(i, t, b"\xff" * len(r), s),
    "sections beyond the file": lambda i, t, r, s: seal(b"\xff\xff\x01\0\0" + i),
    "nothing": lambda i, t, r, s: seal(b""),
}


@pytest.mark.parametrize("case", SECTIONS)
def test_sections_that_do_not_fit(case: str) -> None:
    data = SECTIONS[case](*opened(small()))
    with pytest.raises(FormatError):
        dict(Reader(data).tensors())


def test_headers_of_another_form() -> None:
    """The same content, written otherwise: there is one form only, so that nothing can hide in a second."""
    data = small()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].decode()
    header = json.loads(text)
    variants: list[str] = [
        json.dumps(header),
        json.dumps({"__metadata__": {"more": "text"}, **header}, separators=(",", ":")),
        text + " " * 8,
        text.replace('{"hf', '{"more":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"hf', 1),
        text.replace("U8", "I8"),
        text.replace('"shape":[', '"shape":[1,'),
    ]
    for variant in variants:
        changed = variant.encode() + b" " * (-len(variant) % 8)
        assert not accepted(len(changed).to_bytes(8, "little") + changed + data[8 + length :])


def test_random_bytes_of_the_index() -> None:
    """Whatever an index says, it is read or refused with our own error."""
    generator, (index, *others) = random.Random(2), opened(small())
    for _ in range(1500 * TIMES):
        changed = bytearray(index)
        for _ in range(generator.choice((1, 1, 2, 5))):
            at = generator.randrange(len(changed))
            if generator.random() < 0.3:
                changed[at : at + 1] = generator.randbytes(generator.randrange(3))
            else:
                changed[at] = generator.choice((0, 1, 2, 3, 127, 128, 255, generator.randrange(256)))
        accepted(closed(bytes(changed), *others))


def test_damaged_streams_with_good_digests() -> None:
    """Symbols stay inside their alphabet and shapes inside the index, whatever the coder is fed."""
    generator, shapes = random.Random(3), Reader(small()).shapes()
    for changed in damaged(small(), 1500 * TIMES, generator):
        try:
            for tensor_name, tensor in Reader(changed).tensors():
                assert tensor.shape == shapes[tensor_name]
                assert tensor_name not in ("a.weight", "c.weight") or tensor.isfinite().all()
        except FormatError:
            pass


@pytest.mark.parametrize("name", ["zero_points", "levels", "penalized", "penalized_dft", "thresholds", "hashes"])
def test_damaged_streams_of_every_method(name: str) -> None:
    generator, shapes = random.Random(7), Reader(GOLDEN[name]).shapes()
    for changed in damaged(GOLDEN[name], 40 * TIMES, generator):
        with contextlib.suppress(FormatError):
            assert {n: tuple(tensor.shape) for n, tensor in Reader(changed).tensors()} == shapes


def damaged(data: bytes, count: int, generator: random.Random) -> Iterator[bytes]:
    """Files whose digests are good and in which a bit of tables, plain bytes or stream is another."""
    index, *sections = opened(data)
    packed = squeeze(index)
    for _ in range(count):
        changed, which = list(sections), generator.randrange(3)
        if changed[which]:
            changed[which] = flipped(changed[which], generator.randrange(8 * len(changed[which])))
        yield closed(index, *changed, packed=packed)


def bomb(shape: tuple[int, ...], table: Table, stream: bytes) -> bytes:
    """A kilobyte that claims a weight of `shape` whose symbols are all of one table."""
    out = BitWriter()
    out.golomb(1)
    out.append(write(table.first, [1] * len(table.frequencies), 0))
    out.fixed(0, 2)
    methods = ({"uniform": {**asdict(Uniform(bucket=None))}},)
    parts = (Part("symbols", prod(shape), (Form(0),)), Part("float16", 1, (Form(PLAIN),) * 2))
    place = SlotRecord("w", shape, "other", 0, prod(shape), "float32", 0, (("codes", 0), ("low", 1), ("step", 1)))
    return closed(Index("bomb", methods, parts, (place,), (), 1).to_bytes(), out.to_bytes(), b"", stream)


def test_a_bomb_is_measured_before_it_is_loaded() -> None:
    """Its index is read and its sizes told without decoding it; what no stream of its size can hold is refused."""
    stream = b"\1\0\0\x3c"
    constant, two = Table(0, (TOTAL,)), Table(0, (TOTAL // 2,) * 2)
    assert sizes(Reader(bomb((2**39,), constant, stream))).weights == 2**39
    with pytest.raises(FormatError, match="more than"):
        Reader(bomb((2**41,), constant, stream))
    with pytest.raises(FormatError, match="more symbols than the stream can hold"):
        Reader(bomb((2**39,), two, stream))


# ------------------------------------------------------------------------------------------ killed while saving


def _save_for_ever(folder: Path, ready: Any) -> None:
    torch.set_num_threads(1)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 10))
        models.append((model, Compressor(model, [Rule(method=Uniform())])))
    save(models[0][0], folder, models[0][1])
    ready.set()
    for model, compressor in itertools.cycle(models):
        save(model, folder, compressor)


def test_killed_while_saving(tmp_path: Path) -> None:
    context, generator, found = multiprocessing.get_context("fork"), random.Random(4), set()
    for _ in range(12):
        ready = context.Event()
        child = context.Process(target=_save_for_ever, args=(tmp_path, ready))
        child.start()
        assert ready.wait(60)
        time.sleep(generator.uniform(0, 0.1))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert accepted((tmp_path / FILE_NAME).read_bytes())
        found.add((tmp_path / FILE_NAME).read_bytes())
    assert len(found) <= 2  # the old file or the new one
