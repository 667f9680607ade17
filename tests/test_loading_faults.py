"""Loading and saving again: what is refused, what is written, and what a reader without the package is told."""

import copy
import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compress, make_inputs, make_model
from safetensors.torch import save as save_safetensors
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from hfcompress import dequantize, load, positions, quantizer
from hfcompress.checkpoint import FILE_NAME, read, save
from hfcompress.container import Writer
from hfcompress.errors import ConfigError, FormatError
from hfcompress.files import write_atomically
from hfcompress.folder import WITHOUT_US, save_config
from hfcompress.saving import holds

FORK = multiprocessing.get_context("fork")
DENSE = "model.safetensors"
NAMES = ("marian", "t5", "mt5", "test_resnet")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        model = make_model(name)
        save(model, root / name, compress(model))
        save_config(model, root / name)
    return root


@pytest.fixture
def folder(folders: Path, tmp_path: Path) -> Path:
    """A copy of Marian's folder, to spoil."""
    return shutil.copytree(folders / "marian", tmp_path / "marian")


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(t, states[1][n]) for n, t in states[0].items())


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def rewritten(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A well-formed file of these tensors."""
    writer = Writer()
    for name, tensor in tensors.items():
        writer.add_raw(name, "other", tensor)
    (folder / FILE_NAME).write_bytes(writer.to_bytes("test"))


# ---------------------------------------------------------------------------------- saving what was loaded


@pytest.mark.parametrize("name", NAMES)
def test_untouched_weights_are_saved_as_the_same_file(name: str, folders: Path, tmp_path: Path) -> None:
    model = load(folders / name)
    with torch.no_grad():
        model(**make_inputs(model))
    model.train().eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == (folders / name / FILE_NAME).read_bytes()
    assert files(tmp_path) == files(folders / name)
    again = load(tmp_path)
    assert same(model, again)
    again.save_pretrained(tmp_path)  # onto itself
    assert same(model, load(tmp_path)) and DENSE not in files(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_dense_when_asked(name: str, folders: Path, tmp_path: Path) -> None:
    model = load(folders / name)
    assert dequantize(model) is model and dequantize(model) is model
    model.save_pretrained(tmp_path / "dequantized")
    given = load(folders / name)
    given.save_pretrained(tmp_path / "given", state_dict=given.state_dict())
    for saved in (tmp_path / "dequantized", tmp_path / "given"):
        assert DENSE in files(saved) and FILE_NAME not in files(saved)
        assert (
            json.loads((saved / "config.json").read_text())
            .keys()
            .isdisjoint({"quantization_config", "transformers_weights"})
        )
        assert same(load(saved), model)


def _train(model: PreTrainedModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(**make_inputs(model)).logits.square().mean().backward()
    optimizer.step()


def _negate_last(model: PreTrainedModel) -> None:
    *_, last = model.parameters()
    last.data.view(-1)[-1] += 1e-6


CHANGES: dict[str, Callable[[PreTrainedModel], object]] = {
    "trained": _train,
    "one number": _negate_last,
    "a buffer": lambda m: m.final_logits_bias.add_(1),
    "another parameter": lambda m: setattr(m.model.shared, "weight", nn.Parameter(m.model.shared.weight.detach() + 1)),
    "untied": lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.detach() * 2)),
    "more tokens": lambda m: m.resize_token_embeddings(64),
    "fewer tokens": lambda m: m.resize_token_embeddings(50),
    "a layer more": lambda m: m.add_module("more", nn.Linear(2, 2)),
    "a layer less": lambda m: m.model.encoder.layers.pop(1),
    "not a number": lambda m: m.lm_head.weight.data.fill_(float("nan")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_saved_dense(change: str, folders: Path, tmp_path: Path) -> None:
    model = load(folders / "marian")
    CHANGES[change](model)
    model.save_pretrained(tmp_path)
    assert DENSE in files(tmp_path) and FILE_NAME not in files(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_dense_weights_saved_over_the_folder_are_the_models(folder: Path) -> None:
    model = load(folder)
    _train(model)
    model.save_pretrained(folder)
    assert same(AutoModelForSeq2SeqLM.from_pretrained(folder), model)
    assert FILE_NAME not in files(folder)


def test_a_part_of_the_model_is_had_from_the_whole(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"a MarianMTModel's, and a MarianModel was asked for.* as in model\.model"):
        AutoModel.from_pretrained(folder)


def test_loading_takes_what_from_pretrained_takes(folder: Path) -> None:
    assert load(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_trainers_checkpoint_is_dense(folders: Path, tmp_path: Path) -> None:
    """Whatever the weights: a trainer resumes from model.safetensors only."""
    model = load(folders / "marian")
    model.save_pretrained(tmp_path / "checkpoint-1")
    assert DENSE in files(tmp_path / "checkpoint-1")
    model.save_pretrained(tmp_path / "final")
    assert FILE_NAME in files(tmp_path / "final")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["marian", "t5"])
def test_in_half_precision_the_file_is_the_same(dtype: torch.dtype, name: str, folders: Path, tmp_path: Path) -> None:
    for turn, model in enumerate(
        (AutoModelForSeq2SeqLM.from_pretrained(folders / name, dtype=dtype), load(folders / name).to(dtype))
    ):
        model.save_pretrained(tmp_path / str(turn))
        assert (tmp_path / str(turn) / FILE_NAME).read_bytes() == (folders / name / FILE_NAME).read_bytes()
        assert load(tmp_path / str(turn)).dtype == dtype


def test_copies_remember_for_themselves(folders: Path, tmp_path: Path) -> None:
    model = load(folders / "marian")
    copies = {"deep": copy.deepcopy(model), "pickled": pickle.loads(pickle.dumps(model))}
    _train(model)
    for name, copied in copies.items():
        copied.save_pretrained(tmp_path / name)
        assert (tmp_path / name / FILE_NAME).read_bytes() == (folders / "marian" / FILE_NAME).read_bytes()
    model.save_pretrained(tmp_path / "trained")
    assert DENSE in files(tmp_path / "trained")


def test_a_lost_or_replaced_source_is_not_written_again(folder: Path, folders: Path, tmp_path: Path) -> None:
    model = load(folder)
    other = make_model("marian")
    with torch.no_grad():
        other.model.shared.weight.mul_(2)
    save(other, folder, compress(other))  # another network's weights, under the same names
    model.save_pretrained(tmp_path / "replaced")
    gone, whole = load(folder), load(folders / "marian")
    (folder / FILE_NAME).unlink()
    gone.save_pretrained(tmp_path / "gone")
    assert same(load(tmp_path / "replaced"), whole) and same(load(tmp_path / "gone"), gone)
    assert all(DENSE in files(tmp_path / name) for name in ("replaced", "gone"))


def test_a_file_holds_a_model_or_not(folders: Path) -> None:
    readers = {name: read(folders / name) for name in NAMES}
    found = [(a, b) for a, b in itertools.product(NAMES, NAMES) if holds(readers[a], load(folders / b))]
    assert found == [(name, name) for name in NAMES]


# ------------------------------------------------------------------------------- without `import hfcompress`


def test_without_the_package_every_error_names_it(
    folders: Path, tmp_path: Path, run_python: Callable[..., str]
) -> None:
    """Also where an earlier save's dense weights lie in the same folder: they are not taken for this model's."""
    stale = shutil.copytree(folders / "marian", tmp_path / "stale")
    dequantize(load(stale)).save_pretrained(tmp_path / "dense")
    shutil.copy(tmp_path / "dense" / DENSE, stale / DENSE)
    code = """
import sys
from transformers import AutoModelForImageClassification, AutoModelForSeq2SeqLM, pipeline
ways = [
    lambda: AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1] + "/marian"),
    lambda: AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1] + "/t5"),
    lambda: AutoModelForSeq2SeqLM.from_pretrained(sys.argv[2]),
    lambda: AutoModelForImageClassification.from_pretrained(sys.argv[1] + "/test_resnet"),
    lambda: pipeline("image-classification", model=sys.argv[1] + "/test_resnet"),
]
for way in ways:
    try:
        way()
    except Exception as error:
        assert "hfcompress" in str(error), error
        print(type(error).__name__, error)
    else:
        raise SystemExit("loaded")
assert not any(name.startswith("hfcompress") for name in sys.modules)
"""
    assert run_python(code, folders, stale).count(WITHOUT_US) >= 4


# --------------------------------------------------------------------------------------- names and folders


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"lm_head.weight": t["model.shared.weight"].clone()}),  # both names of a tie
        lambda t: t.update({"model.encoder.embed_positions.weight": torch.zeros(40, 16)}),  # what is computed
    ],
    ids=["a tie twice", "positions"],
)
def test_more_than_needed_is_only_taken_where_it_is_consistent(change: Any, folder: Path) -> None:
    before, tensors = load(folder), dict(read(folder).tensors())
    change(tensors)
    rewritten(folder, tensors)
    assert same(before, load(folder))


def test_a_tie_that_is_none_in_the_file_is_refused(folder: Path) -> None:
    tensors = dict(read(folder).tensors())
    tensors["lm_head.weight"] = tensors["model.shared.weight"] + 1
    rewritten(folder, tensors)
    with pytest.raises(FormatError, match=r"lm_head.weight and model.shared.weight are tied.*differ"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["../marian/x", "/etc/passwd", "a/../../b", "x\0y", "CON", "w" * 5000, "\u202egnp.exe"]
)
def test_names_are_names_and_never_paths(name: str, folder: Path) -> None:
    tensors = dict(read(folder).tensors())
    tensors[name] = tensors.pop("final_logits_bias")
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(FormatError, match=r"another model|at most"):
        rewritten(folder, tensors)
        load(folder)
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("weights", ["../secret.safetensors", "/tmp/x.safetensors", "model.bin", 7])
def test_a_config_cannot_point_elsewhere(weights: Any, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": weights}))
    assert same(load(folder), load(folder))  # our own file is read, whatever it says


def test_links_as_the_hubs_cache_has_them(folder: Path, tmp_path: Path) -> None:
    """snapshots/<commit>/… are links to blobs/<digest>, which are named after what is in them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    before = {path.name: path.read_bytes() for path in blobs.iterdir()}
    model = load(snapshot)
    assert same(model, load(folder))
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / FILE_NAME).is_symlink()
    model.save_pretrained(snapshot)  # replaces the links, and leaves what they pointed at
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == before


def test_dangling_and_circular_links(folder: Path) -> None:
    (folder / FILE_NAME).unlink()
    (folder / FILE_NAME).symlink_to("nothing")
    with pytest.raises((FormatError, OSError), match=FILE_NAME):
        load(folder)
    (folder / FILE_NAME).unlink()
    (folder / FILE_NAME).symlink_to(FILE_NAME)
    with pytest.raises((FormatError, OSError), match=FILE_NAME):
        load(folder)


def test_a_file_replaced_between_two_looks_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader opens the file once more: should it find another, nothing may stay random."""
    other = save_safetensors({name: torch.zeros(3) for name in ("another", "file")})
    monkeypatch.setattr(quantizer, "_check_ties", lambda *_: write_atomically(folder / FILE_NAME, other))
    with pytest.raises(FormatError, match="replaced while it was being loaded"):
        load(folder)


# ---------------------------------------------------------------------------------- several savers, kill -9


def _save_for_ever(folder: Path, sources: list[Path], ready: Any) -> None:
    torch.set_num_threads(1)
    models = [load(source) for source in sources]
    for model in itertools.cycle(models):
        model.save_pretrained(folder)
        ready.set()


def _savers(folder: Path, sources: list[Path], count: int) -> list[Any]:
    readies = [FORK.Event() for _ in range(count)]
    processes = [
        FORK.Process(target=_save_for_ever, args=(folder, sources[i:] + sources[:i], readies[i])) for i in range(count)
    ]
    for process in processes:
        process.start()
    assert all(ready.wait(120) for ready in readies)
    return processes


def _stop(processes: list[Any]) -> None:
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()


@pytest.fixture
def two(folder: Path, tmp_path: Path) -> list[Path]:
    """Two folders of one architecture, with other weights."""
    model = make_model("marian")
    with torch.no_grad():
        model.model.shared.weight.neg_()
    save(model, tmp_path / "other", compress(model))
    return [folder, tmp_path / "other"]


def test_two_savers_and_a_reader_at_once(two: list[Path], tmp_path: Path) -> None:
    wanted = [(source / FILE_NAME).read_bytes() for source in two]
    models = [load(source) for source in two]
    processes = _savers(tmp_path / "out", two, 2)
    try:
        found = []
        for _ in range(12):
            assert (tmp_path / "out" / FILE_NAME).read_bytes() in wanted
            try:
                loaded = load(tmp_path / "out")
            except RuntimeError as error:  # safetensors looks twice, and a shorter file came in between: nothing loads
                assert "smaller than the required mapping size" in str(error)
                continue
            found.append([same(loaded, model) for model in models])
    finally:
        _stop(processes)
    assert len(found) > 6 and all(sum(which) == 1 for which in found)


def test_killed_while_saving_again(two: list[Path], tmp_path: Path) -> None:
    models, generator, out = [load(source) for source in two], random.Random(5), tmp_path / "out"
    for _ in range(6):
        processes = _savers(out, two, 1)
        time.sleep(generator.uniform(0, 0.2))
        _stop(processes)
        loaded = load(out)
        assert sum(same(loaded, model) for model in models) == 1


# --------------------------------------------------------------------------------------- Marian's positions


@pytest.mark.parametrize(("count", "width"), [(1024, 512), (40, 16), (7, 15), (1, 1), (3, 2), (2, 768)])
def test_positions_are_those_of_transformers(count: int, width: int) -> None:
    assert torch.equal(
        positions.table_of(count, width), MarianSinusoidalPositionalEmbedding(count, width).create_weight()
    )


def test_positions_that_transformers_fills_otherwise_are_left_to_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load(folder)
    assert len(positions.tables(before)) == 2
    monkeypatch.setattr(positions, "table_of", lambda count, width: torch.zeros(count, width))
    assert positions.tables(before) == {}
    after = load(folder)
    assert same(before, after)
    assert after.model.encoder.embed_positions.weight.std() > 0
    assert not before.model.encoder.embed_positions.weight.requires_grad


def test_a_network_of_timm_itself(tmp_path: Path) -> None:
    """timm's own config.json beside the file: loaded by transformers, which holds timm's model inside."""
    inner = make_model("test_resnet").timm_model
    save(inner, tmp_path, compress(inner))
    save_config(inner, tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded.timm_model) is type(inner) and loaded.num_labels == 7
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.timm_model(pixels), inner(pixels)) and torch.equal(
            loaded(pixels).logits, inner(pixels)
        )
