"""Damaged, foreign and hostile files: no wrong weight is accepted, no error is another than ours, nothing hangs."""

import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compress, make_model
from safetensors.torch import save as save_safetensors
from torch import nn

from hfcompress.checkpoint import FILE_NAME, read, save, sizes, to_bytes
from hfcompress.coding import Table, tables_to_bytes
from hfcompress.compressor import Compressor
from hfcompress.container import Reader
from hfcompress.errors import FormatError, IntegrityError
from hfcompress.methods import Dense, Uniform
from hfcompress.schema import Rule
from hfcompress.sealed import MAX_HEADER, seal, unseal

Edit = Callable[[dict[str, Any]], object]


@cache
def small() -> bytes:
    """A file of some 1.5 KB in which every kind of array occurs."""
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
    data = small()
    assert [n for n in range(len(data)) if accepted(data[:n])] == []


def test_every_single_bit_of_a_small_file() -> None:
    data = small()
    assert [bit for bit in range(8 * len(data)) if accepted(flipped(data, bit))] == []


def test_random_bits_of_a_large_file() -> None:
    data, generator = large(), random.Random(0)
    assert [
        bit for bit in (generator.randrange(8 * len(data)) for _ in range(2000)) if accepted(flipped(data, bit))
    ] == []


def test_a_flipped_weight_is_told_from_a_foreign_file() -> None:
    with pytest.raises(IntegrityError, match="download it again"):
        Reader(flipped(small(), 8 * len(small()) - 3))


def test_other_accidents() -> None:
    data, generator = small(), random.Random(1)
    for _ in range(500):
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
    for metadata in (None, {}, {"format": "pt"}, {"format": "hfcompress"}, {"format": "hfcompress", "version": "1"}):
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
    data = small().replace(b'"version":"1"', b'"version":"2"')
    with pytest.raises(FormatError, match=r"version 2, this package reads version 1: upgrade"):
        Reader(data)


# ----------------------------------------------------------- hostile files: well sealed, but wrong in themselves


def resealed(edit: Edit) -> bytes:
    """The small file with its index edited and every digest made anew."""
    arrays = unseal(small())
    index = json.loads(zlib.decompress(arrays["index"].tobytes()))
    edit(index)
    return seal({**arrays, "index": np.frombuffer(zlib.compress(json.dumps(index).encode()), dtype=np.uint8)})


def with_array(name: str, array: np.ndarray | None) -> bytes:
    """The small file with one array replaced or taken away."""
    arrays = {**unseal(small()), name: array}
    return seal({key: value for key, value in arrays.items() if value is not None})


INDEX_EDITS: dict[str, Edit] = {
    "unknown method": lambda i: i["methods"].__setitem__(0, {"wavelet": {}}),
    "two methods in one": lambda i: i["methods"][0].update(dense={}),
    "no method": lambda i: i["methods"][0].clear(),
    "unknown field": lambda i: i["methods"][0]["uniform"].update(zero_point=1),
    "bits 9": lambda i: i["methods"][0]["uniform"].update(bits=9),
    "bits 4.0": lambda i: i["methods"][0]["uniform"].update(bits=3.0),
    "fewer bits than codes": lambda i: i["methods"][0]["uniform"].update(bits=2),
    "another bucket": lambda i: i["methods"][0]["uniform"].update(bucket=4),
    "other scales": lambda i: i["methods"][0]["uniform"].update(scales="float32"),
    "a scale that is a list": lambda i: i["methods"][0]["uniform"].update(scales=[]),
    "method beyond": lambda i: i["slots"][0].__setitem__(6, 2),
    "method negative": lambda i: i["slots"][0].__setitem__(6, -1),
    "wrong method": lambda i: i["slots"][0].__setitem__(6, 1),
    "unknown kind": lambda i: i["slots"][0].__setitem__(2, "gate"),
    "unknown dtype": lambda i: i["slots"][0].__setitem__(5, "float8"),
    "negative size": lambda i: i["slots"][0].__setitem__(1, [-12, -6]),
    "true size": lambda i: i["slots"][0].__setitem__(1, [True, 72]),
    "float size": lambda i: i["slots"][0].__setitem__(1, [6.0, 12]),
    "infinite offset": lambda i: i["slots"][0].__setitem__(3, float("inf")),
    "overflowing size": lambda i: i["slots"][0].__setitem__(1, [2**32, 2**32]),
    "nine axes": lambda i: i["slots"][0].__setitem__(1, [1] * 8 + [72]),
    "larger shape": lambda i: i["slots"][0].__setitem__(1, [6, 13]),
    "larger raw shape": lambda i: i["raw"][0].__setitem__(1, [7]),
    "a part beyond": lambda i: i["raw"][0].__setitem__(3, 99),
    "a part that nothing uses": lambda i: i["parts"].append(["float32", 0, -1]),
    "raw symbols": lambda i: i["raw"][0].__setitem__(3, 0),
    "a part of another dtype": lambda i: i["parts"][1].__setitem__(0, "int16"),
    "a part of no dtype": lambda i: i["parts"][1].__setitem__(0, "complex64"),
    "symbols as an array": lambda i: i["parts"][0].__setitem__(0, "float16"),
    "an array as symbols": lambda i: i["parts"][1].__setitem__(0, "symbols"),
    "more symbols": lambda i: i["parts"][0].__setitem__(1, 73),
    "a table beyond": lambda i: i["parts"][0].__setitem__(2, 9),
    "a negative table": lambda i: i["parts"][0].__setitem__(2, -1),
    "swapped parts": lambda i: i["parts"].reverse(),
    "a name twice": lambda i: i["raw"][0].__setitem__(0, i["raw"][1][0]),
    "a slot lost": lambda i: i["slots"].pop(),
    "a raw tensor lost": lambda i: i["raw"].pop(),
    "a description lost": lambda i: i["slots"][0][7].popitem(),
    "a description more": lambda i: i["slots"][0][7].update(more=99),
    "a key lost": lambda i: i.pop("raw"),
    "a key more": lambda i: i.update(more=1),
    "no names": lambda i: i["raw"][0].__setitem__(0, None),
    "empty": lambda i: i.clear(),
}


@pytest.mark.parametrize("case", INDEX_EDITS)
def test_an_index_that_contradicts_itself(case: str) -> None:
    data = resealed(INDEX_EDITS[case])
    with pytest.raises(FormatError):
        dict(Reader(data).tensors())


FULL = 1 << 14
ARRAYS: dict[str, tuple[str, np.ndarray | None]] = {
    "no index": ("index", None),
    "an index that is not zlib": ("index", np.arange(99, dtype=np.uint8)),
    "an index that is not JSON": ("index", np.frombuffer(zlib.compress(b"[" * 10**6), dtype=np.uint8)),
    "an index that bursts": ("index", np.frombuffer(zlib.compress(bytes(10**8)), dtype=np.uint8)),
    "an index and more": ("index", np.append(unseal(small())["index"], np.uint8(0))),
    "half a word of stream": ("symbols", unseal(small())["symbols"][:-2]),
    "a longer stream": ("symbols", np.append(np.full(8, 7, dtype=np.uint8), unseal(small())["symbols"])),
    "a stream of zeros": ("symbols", np.zeros(40, dtype=np.uint8)),
    "no tables": ("tables", None),
    "a table more": (
        "tables",
        np.append(unseal(small())["tables"], np.frombuffer(Table(0, (FULL,)).to_bytes(), np.uint8)),
    ),
    "another array": ("float64", np.zeros(3)),
    "an array of no dtype": ("weights", np.zeros(3)),
    "a longer array": ("float16", np.append(unseal(small())["float16"], np.float16(0))),
    "an array of another dtype": ("float16", unseal(small())["float16"].astype(np.int16)),
    "scales that are not finite": ("float16", np.full_like(unseal(small())["float16"], np.nan)),
    "scales below zero": ("float16", np.full_like(unseal(small())["float16"], -1)),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_do_not_fit(case: str) -> None:
    data = with_array(*ARRAYS[case])
    with pytest.raises(FormatError):
        dict(Reader(data).tensors())


def test_headers_of_another_form() -> None:
    """The same content, written otherwise: there is one form only, so that nothing can hide in a second."""
    data = small()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    variants: list[str] = [
        json.dumps(header),
        json.dumps(header | {"__metadata__": header["__metadata__"] | {"more": "text"}}),
        json.dumps(dict(reversed(header.items())), separators=(",", ":")),
        data[8 : 8 + length].decode() + " " * 8,
        data[8 : 8 + length].decode().replace('{"__', '{"__metadata__":{"format":"pt"},"__', 1),
        data[8 : 8 + length].decode().replace("U8", "I8"),
    ]
    for variant in variants:
        text = variant.encode() + b" " * (-len(variant) % 8)
        assert not accepted(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_random_edits_of_the_index() -> None:
    """Whatever an index says, it is read or refused with our own error."""

    def leaves(node: Any) -> Iterator[tuple[Any, Any]]:
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            yield node, key
            if isinstance(value, (dict, list)):
                yield from leaves(value)

    values = [
        None,
        -1,
        0,
        1,
        2,
        7,
        72,
        2**31,
        2**40,
        2**63,
        2**200,
        1.5,
        float("nan"),
        True,
        "",
        "symbols",
        [],
        [2],
        {},
    ]
    generator = random.Random(2)
    for _ in range(1500):

        def edit(index: dict[str, Any]) -> None:
            for _ in range(generator.choice((1, 1, 2))):
                node, key = generator.choice(list(leaves(index)))
                node[key] = generator.choice(values)

        accepted(resealed(edit))


def test_damaged_streams_with_good_digests() -> None:
    """Symbols stay inside their alphabet and shapes inside the index, whatever the coder is fed."""
    generator, shapes = random.Random(3), Reader(small()).shapes()
    arrays = unseal(small())
    for _ in range(1500):
        name = generator.choice(("symbols", "tables", "float16"))
        damaged = np.frombuffer(flipped(arrays[name].tobytes(), generator.randrange(8 * arrays[name].nbytes)), np.uint8)
        data = seal({**arrays, name: damaged.view(arrays[name].dtype)})
        try:
            for tensor_name, tensor in Reader(data).tensors():
                assert tensor.shape == shapes[tensor_name]
                assert tensor_name not in ("a.weight", "c.weight") or tensor.isfinite().all()
        except FormatError:
            pass


def test_a_bomb_is_measured_before_it_is_loaded() -> None:
    """A kilobyte that claims 2^39 weights: its index is read and its sizes told without decoding them."""
    constant = np.frombuffer(tables_to_bytes([Table(0, (FULL,))]), dtype=np.uint8)
    index = {
        "tool": "bomb",
        "methods": [{"uniform": {"bucket": None}}],
        "parts": [["symbols", 2**39, 0], ["float16", 1, -1]],
        "slots": [["w", [2**39], "other", 0, 2**39, "float32", 0, {"codes": 0, "low": 1, "step": 1}]],
        "raw": [],
    }
    arrays = {"index": np.frombuffer(zlib.compress(json.dumps(index).encode()), dtype=np.uint8), "tables": constant}
    reader = Reader(seal({**arrays, "float16": np.ones(1, dtype=np.float16)}))
    assert sizes(reader).weights == 2**39
    index["slots"][0][1] = [2**41]
    with pytest.raises(FormatError, match="more than"):
        Reader(seal({**arrays, "index": np.frombuffer(zlib.compress(json.dumps(index).encode()), dtype=np.uint8)}))


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
