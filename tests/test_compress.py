"""`hfcompress compress`, `verify` and `inspect`: any model, no data, a target that is met, a folder that is good."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from commands import hfcompress
from conftest import MODELS, make_inputs, make_model
from huggingface_hub import ModelCard
from safetensors.numpy import save_file
from torch import Tensor

from hfcompress import load
from hfcompress.checkpoint import FILE_NAME, read, sizes
from hfcompress.cli_files import bytes_of
from hfcompress.compress import GRID, Outcome, _between, compress
from hfcompress.compress_rules import default_rules, rules_in
from hfcompress.errors import ConfigError, DataError, FormatError
from hfcompress.hub import check_card
from hfcompress.methods import Dense, Uniform
from hfcompress.originals import load_original, saved_tensors
from hfcompress.plain_card import write_plain_card
from hfcompress.reparameterization import Kind
from hfcompress.verify import verify

EVERY = ("digests", "decoding", "tables", "network")


def dense(name: str, folder: Path) -> Path:
    """A dense folder with a file that a tokenizer would have left there, and one that it would not."""
    make_model(name).save_pretrained(folder)
    (folder / "vocab.json").write_text("{}", encoding="utf-8")
    (folder / "training_args.bin").write_bytes(b"not to be taken over")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    return dense("test_vit", tmp_path_factory.mktemp("vit") / "dense")


# ------------------------------------------------------------------------------------------ the whole way


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_compressed_and_loads(name: str, tmp_path: Path) -> None:
    original = load_original(str(dense(name, tmp_path / "dense")))
    outcome = compress(original, tmp_path / "small", bits=3.0)
    write_plain_card(tmp_path / "small", original, outcome, "hfcompress compress x --output small")
    lines = list(verify(tmp_path / "small"))
    assert [line.partition(":")[0] for line in lines] == list(EVERY)
    check_card(tmp_path / "small" / "README.md")
    assert (tmp_path / "small" / "vocab.json").is_file() and not (tmp_path / "small" / "training_args.bin").exists()
    found = load(tmp_path / "small")
    expected = dict(saved_tensors(original.model))  # what was decoded into the model in memory
    assert all(torch.equal(tensor, expected[key]) for key, tensor in saved_tensors(found))
    with torch.inference_mode():
        inputs = make_inputs(found)
        assert torch.equal(found(**inputs).logits, original.model(**inputs).logits)


@pytest.mark.parametrize("bits", [1.5, 2.0, 4.0, 6.0])
def test_bits_are_met(bits: float, vit: Path, tmp_path: Path) -> None:
    outcome = compress(load_original(str(vit)), tmp_path / "small", bits=bits)
    coded = [t for t in outcome.sizes.tensors if t.method == GRID]
    weights = sum(t.weights for t in coded)
    assert sum(t.codes + 8 * t.arrays for t in coded) / weights == pytest.approx(bits, rel=0.02)
    assert {t.kind for t in coded} == {"linear", "conv"}
    assert {t.method for t in outcome.sizes.tensors if t not in coded} <= {"dense", "as it is"}


@pytest.mark.parametrize("target", [110_000, 150_000, 250_000])
def test_a_target_in_bytes_is_met(target: int, vit: Path, tmp_path: Path) -> None:
    compress(load_original(str(vit)), tmp_path / "small", target_bytes=target)
    assert 0.98 * target <= (tmp_path / "small" / FILE_NAME).stat().st_size <= target


def test_a_target_that_cannot_be_met_says_how_near_it_got(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"10,000 cannot be reached: the least is [\d,]+ bytes"):
        compress(load_original(str(vit)), tmp_path / "small", target_bytes=10_000)
    with pytest.raises(ConfigError, match=r"--bits 0\.01 cannot be reached: the nearest is"):
        compress(load_original(str(vit)), tmp_path / "small", bits=0.01)
    assert not (tmp_path / "small").exists()


def test_the_error_said_is_the_error_made(vit: Path, tmp_path: Path) -> None:
    before = {name: t.detach().clone() for name, t in saved_tensors(load_original(str(vit)).model)}
    original = load_original(str(vit))
    outcome = compress(original, tmp_path / "small", bits=3)
    kinds = {t.name: t.kind for t in outcome.sizes.tensors}
    prefix = "timm_model."
    after = dict(saved_tensors(original.model))

    def error(names: list[str]) -> float:
        def norm(tensors: list[Tensor]) -> float:
            return math.sqrt(sum(t.double().square().sum().item() for t in tensors))

        return norm([after[n] - before[n] for n in names]) / norm([before[n] for n in names])

    for group in outcome.groups:
        names = [name for name in before if kinds[name.removeprefix(prefix)] == group.name]
        if names:
            assert group.relative_error == pytest.approx(error(names), rel=1e-4, abs=1e-9)
            assert group.before == sum(before[n].nbytes for n in names)
    matrices = [name for name in before if kinds[name.removeprefix(prefix)] in ("linear", "conv")]
    assert outcome.relative_error == pytest.approx(error(matrices), rel=1e-4)
    assert sum(g.after for g in outcome.groups) == pytest.approx(outcome.sizes.total)


def test_the_grid_beats_buckets_at_the_same_error(tmp_path: Path) -> None:
    """On weights that have tails, as those of trained networks do."""
    model = make_model("marian")
    with torch.no_grad():
        for _, tensor in saved_tensors(model):
            if tensor.ndim == 2:
                tensor.copy_(torch.distributions.StudentT(5.0).sample(tensor.shape))
    model.save_pretrained(tmp_path / "dense")

    def made(folder: str, **asked) -> Outcome:
        original = load_original(str(tmp_path / "dense"))
        rules = default_rules(original.model, Uniform(bits=4, bucket=64)) if asked.pop("buckets", False) else None
        return compress(original, tmp_path / folder, rules=rules, **asked)

    def bits(outcome: Outcome) -> float:
        coded = [t for t in outcome.sizes.tensors if t.method in (GRID, "uniform")]
        return sum(t.codes + 8 * t.arrays for t in coded) / sum(t.weights for t in coded)

    buckets, grid = made("buckets", buckets=True), made("grid", bits=4)
    # a bit more halves a uniform grid's error
    saved = bits(buckets) - (bits(grid) + math.log2(grid.relative_error / buckets.relative_error))
    assert saved > 0.2


def test_the_same_model_gives_the_same_bytes(vit: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        compress(load_original(str(vit)), tmp_path / folder)
    assert (tmp_path / "a" / FILE_NAME).read_bytes() == (tmp_path / "b" / FILE_NAME).read_bytes()


# ------------------------------------------------------------------------------------------ what may be given


@pytest.mark.parametrize("spelled", ["{}", "local-dir:{}"])
def test_what_timm_saves(spelled: str, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=5).eval()
    timm.models.save_for_hf(model, tmp_path / "timm", safe_serialization=True)
    compress(load_original(spelled.format(tmp_path / "timm")), tmp_path / "small", bits=6)
    pixels = torch.randn(1, 3, 160, 160)
    with torch.inference_mode():
        found, wanted = load(tmp_path / "small")(pixel_values=pixels).logits, model(pixels)
    assert found.shape == (1, 5) and (found - wanted).norm() < 0.1 * wanted.norm()


def test_norms_and_biases_beyond_float16_are_kept_in_float32() -> None:
    model = make_model("test_resnet")
    name, large = next((n, p) for n, p in model.named_parameters() if n.endswith("bn1.weight"))
    with torch.no_grad():
        large.fill_(1e6)
    rules = default_rules(model, Uniform())
    (wide,) = [rule for rule in rules if rule.method == Dense("float32")]
    assert wide.pattern == name and wide.kinds == (Kind.NORM,)


@pytest.mark.parametrize("harm", ["nothing", "folder", "nan", "compressed", "causal"])
def test_what_cannot_be_compressed(harm: str, tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    error, told = DataError, "cannot load"
    if harm != "nothing":
        folder.mkdir()
    if harm == "nan":
        model = make_model("marian")
        with torch.no_grad():
            model.model.shared.weight[0, 0] = torch.nan
        model.save_pretrained(folder)
        error, told = ConfigError, "NaN"
    if harm == "compressed":
        compress(load_original(str(dense("test_vit", tmp_path / "vit"))), folder)
        error, told = ConfigError, "compressed already"
    if harm == "causal":
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(error, match=told):
        compress(load_original(str(folder)), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_rules_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text("rules:\n- {pattern: '*.bias', method: {dense: {}}}\n- {method: {uniform: {bits: 5}}}\n")
    first, second = rules_in(file)
    assert (first.pattern, second.method) == ("*.bias", Uniform(bits=5))
    for text, told in {
        "rules:\n- {method: {uniform: {bits: 0}}}\n": r"rules\.yaml:2.*bits",
        "rulse: []\n": r"rules\.yaml:1.*rules",
        "rules: []\n": r"rules\.yaml:1",
        "rules: [{method: {dense: {}}}]\n---\n{}\n": "2 documents",
        "rules:\n- {patern: x, method: {dense: {}}}\n": r"rules\.yaml:2.*pattern",
    }.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=told):
            rules_in(file)


def test_sizes_as_people_write_them() -> None:
    assert [bytes_of(text) for text in ("10MB", "1.5 MiB", "900k", "7", "2 gb")] == [
        10_000_000,
        1_572_864,
        900_000,
        7,
        2_000_000_000,
    ]
    for text in ("", "MB", "-1", "0", "ten", "1TBB", "nan"):
        with pytest.raises(ConfigError, match="expected a size"):
            bytes_of(text)


# ------------------------------------------------------------------------------------------ the commands


def test_the_commands_together(vit: Path, tmp_path: Path) -> None:
    small, rules = tmp_path / "small", tmp_path / "rules.yaml"
    rules.write_text("rules: [{method: {multihash: {fraction: 0.1}}, kinds: [conv, linear]}]", encoding="utf-8")
    done = hfcompress(tmp_path, "compress", vit, "--output", small, "--bits", 3)
    assert done.code == 0, done.err
    total = (small / FILE_NAME).stat().st_size
    assert re.search(rf"^file +[\d,]+ +[\d,]+ +{total:,} +[\d.]+ +[\d.]+ %", done.out, re.MULTILINE)
    assert "× smaller" in done.out
    assert "--bits 3" in (small / "README.md").read_text(encoding="utf-8")
    assert ModelCard.load(small / "README.md").data.library_name == "hfcompress"
    assert "is not empty" in hfcompress(tmp_path, "compress", vit, "--output", small).refusal
    again = hfcompress(tmp_path, "compress", vit, "--output", small, "--method", "Uniform", "--bits", 2, "--overwrite")
    assert again.code == 0 and {s.method for s in read(small).slots} == {Uniform(bits=2), Dense()}
    assert "little is left of what the model could do" not in done.out + again.out
    noise = hfcompress(tmp_path, "compress", vit, "--output", tmp_path / "noise", "--rules", rules)
    assert noise.code == 0 and "little is left of what the model could do" in noise.out
    checked = hfcompress(tmp_path, "verify", small)
    assert checked.code == 0 and checked.out.splitlines()[-1] == "the file is good"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--bits", 3, "--target-bytes", "1MB"], "contradict each other"),
        (["--rules", "x.yaml", "--method", "uniform"], "contradict each other"),
        (["--bits", 0], "above 0"),
        (["--target-bytes", "much"], "expected a size"),
        (["--method", "unifrom"], "no method 'unifrom'"),
        (["--method", "uniform", "--bits", 2.5], "whole bits"),
        (["--method", "dense", "--bits", 2], "no number of bits"),
    ],
)
def test_what_the_command_refuses(options: list[object], told: str, vit: Path, tmp_path: Path) -> None:
    assert told in hfcompress(tmp_path, "compress", vit, "--output", tmp_path / "small", *options).refusal
    assert not (tmp_path / "small").exists()


def test_a_folder_is_not_written_into_itself(vit: Path, tmp_path: Path) -> None:
    assert "the folder that is read" in hfcompress(tmp_path, "compress", vit, "--output", vit, "--overwrite").refusal


def test_inspect_shows_entropy_and_share(vit: Path, tmp_path: Path) -> None:
    compress(load_original(str(vit)), tmp_path / "small")
    found = json.loads(hfcompress(tmp_path, "inspect", tmp_path / "small", "--json").out)
    coded = [t for t in found["tensors"] if t["entropy"] is not None]
    assert coded and {t["method"] for t in coded} == {GRID}
    around = found["tables"] + found["index"] + found["header"]
    assert sum(t["share"] for t in found["tensors"]) + around / found["bytes"] == pytest.approx(1, abs=1e-3)
    shown = hfcompress(tmp_path, "inspect", tmp_path / "small").out
    assert all(re.search(rf"^{re.escape(t['name'])} .* {t['entropy']:.3f} ", shown, re.MULTILINE) for t in coded)


# ------------------------------------------------------------------------------------------ verify


@pytest.fixture(scope="module")
def good(vit: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "small"
    compress(load_original(str(vit)), folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("command", ["verify", "inspect", "push", "export"])
def test_no_compressed_file_is_the_users_mistake(command: str, folder: Path, tmp_path: Path) -> None:
    (folder / FILE_NAME).unlink()
    rest = {"push": ["me/it"], "export": ["--output", tmp_path / "made", "--to", "dense"]}.get(command, [])
    assert FILE_NAME in hfcompress(tmp_path, command, folder, *rest).refusal


def test_a_damaged_file(folder: Path, tmp_path: Path) -> None:
    data = (folder / FILE_NAME).read_bytes()
    for harmed in (data[:-1], data[:-50] + bytes([data[-50] ^ 8]) + data[-49:], data + b"\0"):
        (folder / FILE_NAME).write_bytes(harmed)
        with pytest.raises(FormatError, match=FILE_NAME):
            list(verify(folder))
    save_file({"a": torch.zeros(2).numpy()}, folder / FILE_NAME)
    done = hfcompress(tmp_path, "verify", folder)
    assert done.code == 3 and done.err.count("\n") == 1 and "the file is good" not in done.out


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"num_classes": 7', '"num_classes": 8', "of another model"),
        ('"architecture": "test_vit"', '"architecture": "test_vit2"', "of another model"),
        ('"architecture": "test_vit"', '"architecture": "no_such"', "no network that can be built"),
        ('"quant_method": "hfcompress"', '"quant_method": "other"', "does not say that the weights are compressed"),
    ],
)
def test_a_config_of_another_model(old: str, new: str, told: str, folder: Path) -> None:
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new))
    with pytest.raises(FormatError, match=told):
        list(verify(folder))


def test_a_file_alone_is_checked_as_far_as_it_goes(folder: Path) -> None:
    (folder / "config.json").unlink()
    *_, last = verify(folder / FILE_NAME)
    assert "compared with nothing" in last
    assert sizes(read(folder)).total == (folder / FILE_NAME).stat().st_size


def test_a_step_between_two_tries_is_between_them():
    assert _between([]) is None and _between([(0.0, 1.0), (1.0, 0.5)]) is None
    assert 2.0 < _between([(1.0, 0.5), (3.0, -0.1)]) < 8.0
    assert _between([(0.0, 2.0), (0.5, 1.0), (1.0, 0.5)]) == 4.0
    assert _between([(1.0, -0.5), (0.0, -0.4), (-1.0, -0.3)]) == 0.25
