"""Folders: saved here, loaded by plain transformers calls in a fresh process, and refused when they are wrong."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSIFIERS, MODELS, TRANSLATORS, compress, make_inputs, make_model
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from hfcompress import load
from hfcompress.checkpoint import FILE_NAME, check_names, read, save, sizes, to_bytes
from hfcompress.coding import Symbols
from hfcompress.compressor import Compressor
from hfcompress.container import Reader, Writer
from hfcompress.errors import FormatError
from hfcompress.methods import Dense, Uniform
from hfcompress.reparameterization import Slot
from hfcompress.schema import Rule

Edit = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One compressed folder for each model, with what the model was and said beside it."""
    root = tmp_path_factory.mktemp("models")
    for name in MODELS:
        model = make_model(name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        compressor = compress(model)
        save(model, root / name, compressor)
        inputs = make_inputs(model)
        with torch.no_grad():
            said = {"inputs": inputs, "logits": model(**inputs).logits}
            if name in TRANSLATORS:
                said["generated"] = model.generate(inputs["input_ids"], num_beams=2)
        claimed = set(compressor.entries)
        torch.save({"before": before, "state": model.state_dict(), "claimed": claimed, **said}, root / f"{name}.pt")
    return root


@pytest.fixture(scope="session")
def reloaded(folders: Path, run_python: Callable[..., str]) -> dict[str, dict[str, Any]]:
    """What a fresh process finds in the folders; it knows them by transformers' own classes alone."""
    code = """
import json, sys, hashlib, torch
from pathlib import Path
import hfcompress
from transformers import AutoModelForImageClassification, AutoModelForSeq2SeqLM
root, found, threads = Path(sys.argv[1]), {}, torch.get_num_threads()
for path in sorted(root.glob("*.pt")):
    said, folder = torch.load(path), path.with_suffix("")
    auto = AutoModelForSeq2SeqLM if "generated" in said else AutoModelForImageClassification
    torch.set_num_threads(threads)  # on any number of threads weights are the same
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    torch.set_num_threads(1)  # as many as the other process has: the sums of a convolution may depend on it
    state = model.state_dict()
    with torch.no_grad():
        logits = model(**said["inputs"]).logits
    found[path.stem] = {
        "class": type(model).__name__,
        "training": model.training,
        "same_names": list(state) == list(said["state"]),
        "differ": [n for n, t in said["state"].items() if not torch.equal(t, state[n]) or t.dtype != state[n].dtype],
        "logits": torch.equal(logits, said["logits"]) and logits.std().item() > 0,
        "info": sorted(name for kind in info.values() for name in kind),
        "config": [key for key in ("quantization_config", "transformers_weights") if hasattr(model.config, key)],
        "ties": len({id(p) for p in model.parameters()}),
    }
    if "generated" in said:
        generated = model.generate(said["inputs"]["input_ids"], num_beams=2)
        found[path.stem]["generated"] = torch.equal(generated, said["generated"])
    hfcompress.dequantize(model).save_pretrained(folder / "dense")
    again = auto.from_pretrained(folder / "dense").state_dict()
    found[path.stem]["saves_dense"] = all(torch.equal(again[n], t) for n, t in state.items())

from conftest import compress, make_model
from hfcompress.checkpoint import to_bytes
for name, facts in found.items():
    model = make_model(name)
    facts["sha256"] = hashlib.sha256(to_bytes(model, compress(model))).hexdigest()
print(json.dumps(found))
"""
    return json.loads(run_python(code, folders, PYTHONHASHSEED="5"))


@pytest.fixture
def marian(folders: Path, tmp_path: Path) -> Path:
    """A copy of Marian's folder, to spoil."""
    return shutil.copytree(folders / "marian", tmp_path / "marian")


def rewrite(folder: Path, edit: Edit) -> None:
    """Put a well-formed file there whose tensors were edited."""
    tensors = dict(read(folder).tensors())
    edit(tensors)
    writer = Writer()
    for name, tensor in tensors.items():
        writer.add_raw(name, "other", tensor)
    (folder / FILE_NAME).write_bytes(writer.to_bytes("test"))


# ----------------------------------------------------------------------------------------- a fresh process


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_process_loads_the_same_model(name: str, reloaded: dict[str, dict[str, Any]]) -> None:
    found = reloaded[name]
    assert found["differ"] == [] and found["same_names"]
    assert found["logits"] and found.get("generated", True)
    assert found["info"] == [] and found["config"] == [] and not found["training"]
    model = make_model(name)
    assert (found["class"], found["ties"]) == (type(model).__name__, len(list(model.parameters())))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_loaded_saves_as_an_ordinary_model(name: str, reloaded: dict[str, dict[str, Any]]) -> None:
    assert reloaded[name]["saves_dense"]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_model_gives_the_same_bytes(name: str, reloaded: dict[str, dict[str, Any]], folders: Path) -> None:
    data = (folders / name / FILE_NAME).read_bytes()
    assert reloaded[name]["sha256"] == hashlib.sha256(data).hexdigest()


def test_without_the_package_nothing_loads(folders: Path, run_python: Callable[..., str]) -> None:
    code = """
import sys
from transformers import AutoModelForSeq2SeqLM
assert not any(name.startswith("hfcompress") for name in sys.modules)
for name in sys.argv[2:]:
    try:
        AutoModelForSeq2SeqLM.from_pretrained(f"{sys.argv[1]}/{name}")
    except OSError as error:
        assert "import-hfcompress" in str(error), error
    else:
        raise SystemExit(f"{name} was loaded with random weights")
import hfcompress
print(type(AutoModelForSeq2SeqLM.from_pretrained(f"{sys.argv[1]}/{name}")).__name__)
"""
    assert run_python(code, folders, *TRANSLATORS) == "MT5ForConditionalGeneration\n"


# ------------------------------------------------------------------------------------------ in the file


@pytest.mark.parametrize("name", MODELS)
def test_unclaimed_weights_and_statistics_are_exact(name: str, folders: Path) -> None:
    said, found = torch.load(folders / f"{name}.pt"), load(folders / name).state_dict()
    claimed = {said["state"][n].data_ptr() for n in said["claimed"]}  # by any of their names
    exact = {n for n, value in said["state"].items() if value.data_ptr() not in claimed}
    assert exact and all(torch.equal(said["before"][n], found[n]) for n in exact)
    assert any(not torch.equal(said["before"][n], found[n]) for n in said["claimed"])
    if name in CLASSIFIERS and name != "test_vit":
        assert any(n.endswith("running_var") for n in exact)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_add_up_to_the_file(name: str, folders: Path) -> None:
    path = folders / name / FILE_NAME
    reader = read(path)
    found = sizes(reader)
    data = path.read_bytes()
    assert found.total == len(data) == reader.size
    lengths = found.header - (8 + int.from_bytes(data[:8], "little")) - 32  # behind the header and a digest
    assert 3 <= lengths <= 9
    parts = sum(tensor.arrays for tensor in found.tensors)
    assert found.header + found.index + found.tables + found.stream + parts == found.total
    codes = sum(tensor.codes for tensor in found.tensors)
    assert codes - 1 <= 8 * found.stream <= 1.001 * codes + 20 * reader.index.states + 32
    assert found.weights == sum(value.numel() for value in dict(reader.tensors()).values())
    assert found.bits_per_weight == 8 * found.total / found.weights


def test_four_bits_cost_their_entropy_and_scales() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 700, bias=False), nn.Linear(700, 512, bias=False))
    compressor = Compressor(model, [Rule(method=Uniform(bits=4, bucket=256))])
    ideal = 0.0
    for entry in compressor.entries.values():
        for part in entry.method.describe(entry.latents, entry.slot).values():
            ideal += part.entropy() / 8 if isinstance(part, Symbols) else part.nbytes
    assert len(to_bytes(model, compressor)) <= 1.001 * ideal + 4096


def test_tied_weights_are_stored_once(folders: Path) -> None:
    names = read(folders / "marian").shapes().keys()
    state = torch.load(folders / "marian.pt")["state"]
    tied = {name for name, value in state.items() if value.shape == (60, 16)}
    assert len(tied) > 2 and len(tied & names) == 1


def test_identical_arrays_are_stored_once() -> None:
    def size(layers: list[nn.Module]) -> int:
        model = nn.ModuleList(layers)
        rules = [Rule(method=Uniform(), pattern="*weight"), Rule(method=Dense(), pattern="*bias")]
        return len(to_bytes(model, Compressor(model, rules)))

    one, other = nn.Linear(256, 256), nn.Linear(256, 256)
    twin = nn.Linear(256, 256)
    twin.load_state_dict(one.state_dict())
    assert size([one, twin]) - size([one]) < 100 < 20_000 < size([one, other]) - size([one])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_of_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model("marian").to(dtype)
    save(model, tmp_path, compress(model))
    found = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert found.dtype == dtype
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["marian", "cifar_resnet20"])
def test_loading_in_bfloat16(name: str, folders: Path) -> None:
    model = load(folders / name)
    found = type(model).from_pretrained(folders / name, dtype=torch.bfloat16)
    for key, value in model.state_dict().items():
        loaded = found.state_dict()[key]
        assert loaded.dtype == (torch.bfloat16 if value.is_floating_point() else value.dtype)
        assert torch.equal(loaded, value.to(loaded.dtype)), key


def test_a_model_without_rules_is_stored_as_it_is(tmp_path: Path) -> None:
    model = make_model("t5")
    save(model, tmp_path)
    found = load(tmp_path).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


def test_noisy_methods_save_what_is_evaluated(tmp_path: Path) -> None:
    model = make_model("t5")
    compressor = Compressor(model, [Rule(method=Uniform(bits=2, stochastic=True))])
    hard = {name: value.clone() for name, value in model.state_dict().items()}
    compressor.write(hard=False)
    save(model, tmp_path, compressor)
    found = load(tmp_path).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in hard.items())


def test_every_dtype_of_buffers_is_exact() -> None:
    model = nn.Module()
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int16, torch.uint8, torch.bool):
        model.register_buffer(str(dtype).replace(".", "_"), torch.tensor([[0, 1, 1]]).to(dtype))
    model.register_buffer("scalar", torch.tensor(-0.0))
    model.register_buffer("empty", torch.zeros(0, 3))
    model.register_buffer("mask", torch.tensor([float("-inf"), 0.0]))
    model.register_buffer("passing", torch.zeros(2), persistent=False)
    found = dict(Reader(to_bytes(model, None)).tensors())
    assert found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape) and torch.equal(found[name], value)


# --------------------------------------------------------------------------------------------- refusals


def _rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


NORM = "model.encoder.layers.0.final_layer_norm.weight"
WRONG: dict[str, tuple[Edit, str]] = {
    "missing": (lambda t: t.pop(NORM), f"lacks {NORM}"),
    "missing tied": (lambda t: t.pop("model.shared.weight"), "lacks .*model.shared.weight"),
    "missing buffer": (lambda t: t.pop("final_logits_bias"), "lacks final_logits_bias"),
    "extra": (lambda t: t.update(more=torch.zeros(2)), "has unknown more"),
    "renamed": (lambda t: _rename(t, NORM, NORM + "_orig"), f"lacks {NORM}; it has unknown {NORM}_orig"),
    "reshaped": (lambda t: t.update({NORM: torch.ones(17)}), rf"{NORM} \(17,\) instead of \(16,\)"),
    "transposed": (
        lambda t: t.update({"model.shared.weight": torch.ones(16, 60)}),
        r"\(16, 60\) instead of \(60, 16\)",
    ),
    "flattened": (lambda t: t.update({"model.shared.weight": torch.ones(960)}), r"\(960,\) instead of \(60, 16\)"),
    "empty": (lambda t: t.clear(), "lacks .*…"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_of_other_tensors_is_refused(case: str, marian: Path) -> None:
    edit, message = WRONG[case]
    rewrite(marian, edit)
    with pytest.raises(FormatError, match=rf"another model: it .*{message}"):
        AutoModelForSeq2SeqLM.from_pretrained(marian)


def test_a_rewritten_file_is_still_good(marian: Path) -> None:
    before = load(marian).state_dict()
    rewrite(marian, lambda t: _rename(t, "model.shared.weight", "lm_head.weight"))  # any name of a tie will do
    assert all(torch.equal(value, before[name]) for name, value in load(marian).state_dict().items())


@pytest.mark.parametrize(
    "change",
    [{"d_model": 24}, {"encoder_layers": 1}, {"decoder_layers": 3}, {"vocab_size": 61}, {"tie_word_embeddings": False}],
    ids=str,
)
def test_another_config_is_refused(change: dict[str, Any], marian: Path) -> None:
    config = json.loads((marian / "config.json").read_text())
    (marian / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(FormatError, match="another model"):
        AutoModelForSeq2SeqLM.from_pretrained(marian)


def test_another_models_file_is_refused(marian: Path, folders: Path) -> None:
    for other in set(MODELS) - {"marian"}:
        shutil.copy(folders / other / FILE_NAME, marian / FILE_NAME)
        with pytest.raises(FormatError, match="another model"):
            load(marian)


def test_damage_is_found_by_from_pretrained(marian: Path) -> None:
    path = marian / FILE_NAME
    data = path.read_bytes()
    for spoiled in (data[:-1], data + b"\0", bytes(200), b"", data[:-3] + bytes([data[-3] ^ 4]) + data[-2:]):
        path.write_bytes(spoiled)
        with pytest.raises(FormatError, match=FILE_NAME):
            load(marian)


def test_a_file_that_is_not_there(marian: Path) -> None:
    (marian / FILE_NAME).unlink()
    for reading in (load, read):
        with pytest.raises(FormatError, match=f"expected a folder with {FILE_NAME}"):
            reading(marian)


def test_a_config_of_a_later_format_is_refused(marian: Path) -> None:
    config = json.loads((marian / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (marian / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="format version 2"):
        load(marian)


def test_check_names_names_them_all() -> None:
    writer = Writer()
    writer.add_raw("a", "other", torch.zeros(2))
    writer.add_raw("b", "other", torch.zeros(2))
    reader = Reader(writer.to_bytes("test"))
    check_names(reader, {"a": (2,), "b": (2,), "c": (1,)}, {"c"})
    with pytest.raises(
        FormatError, match=r"it lacks c; it has unknown b; it has other shapes: a \(2,\) instead of \(3,\)"
    ):
        check_names(reader, {"a": (3,), "c": (1,)}, set())


def test_what_cannot_be_stored_is_refused() -> None:
    writer, slot = Writer(), Slot("w", (1,))
    with pytest.raises(FormatError, match="complex64 cannot be stored"):
        writer.add_raw("w", "buffer", torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(FormatError, match="float8_e4m3fn cannot be stored"):
        writer.add_slot(slot, torch.float8_e4m3fn, Dense(), {"weight": torch.zeros(1).numpy()})
    with pytest.raises(FormatError, match=r"w: values beyond float16.*wider"):
        writer.add_slot(slot, torch.float32, Dense(), {"weight": torch.tensor([1e9]).half().numpy()})


def test_a_network_of_timm_itself_has_timms_config(tmp_path: Path) -> None:
    model: PreTrainedModel = make_model("cifar_resnet20")
    inner = model.timm_model
    save(inner, tmp_path, compress(inner))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", FILE_NAME]
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "cifar_resnet20"
    assert dict(read(tmp_path).tensors()).keys() == inner.state_dict().keys()
