"""`hfcompress evaluate` as a command: its table and bar, what it refuses, and files that are corrupt."""

import json
import os
import pty
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy
import pytest
from commands import hfcompress, start
from conftest import compress, make_model
from recipe_texts import TINY
from safetensors.numpy import save as to_bytes

from hfcompress import cli
from hfcompress.checkpoint import FILE_NAME, save
from hfcompress.data import label_names, load_images
from hfcompress.errors import DataError
from hfcompress.measure import score_afresh
from hfcompress.networks import classifier
from hfcompress.recipe import load
from hfcompress.scoring import told_apart
from hfcompress.tasks import Images


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A recipe, and an untrained compressed network for it."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "tiny.yaml").write_text(TINY, encoding="utf-8")
    (recipe,) = load(folder / "tiny.yaml")
    model = classifier(recipe.student, recipe.images, label_names(load_images(recipe.images)), None, 0)
    save(model, folder / "model [1]", compress(model))
    return folder


def test_evaluate_prints_a_table(digits, said):
    model = digits / "model [1]"
    done = hfcompress(said, "evaluate", model, "--recipe", digits / "tiny.yaml")
    assert done.code == 0 and re.fullmatch(r"model \[1\]: accuracy \d+\.\d\d\n", done.err)
    (line,) = (line for line in done.out.splitlines() if str(model) in line)
    value, low, high, rows = re.search(r"accuracy +│ +([\d.]+) +│ ([\d.]+) – ([\d.]+) +│ (\d+)", line).groups()
    assert float(low) <= float(value) <= float(high) and rows == "20" and "top1|split:test|size:8" in line


def test_evaluate_on_both_splits(digits, said):
    model, both = digits / "model [1]", ("--split", "validation", "--split", "test")
    done = hfcompress(said, "evaluate", model, "--recipe", digits / "tiny.yaml", *both, "--json", said / "scores")
    assert done.code == 0 and re.search(r"^model \[1\]: accuracy \d+\.\d\d \(validation\)$", done.err, re.MULTILINE)
    (found,) = json.loads((said / "scores").read_bytes()).values()
    assert "split:validation" in found["scores"]["accuracy"]["signature"] and len(found["samples"]) == 200
    assert "split:test" in found["also"]["test"]["accuracy"]["signature"]
    assert found["samples"][0]["source"] == "validation image 0"


def test_the_recipe_changed_for_once(digits, said):
    given = ("evaluate", digits / "model [1]", "--recipe", digits / "tiny.yaml")
    done = hfcompress(said, *given, "--set", "images.test_rows=7", "--set", "seed=3", "--json", said / "scores")
    (found,) = json.loads((said / "scores").read_bytes()).values()
    assert done.code == 0 and len(found["samples"]) == 7
    done = hfcompress(said, *given, "--set", "images.tests=7")
    assert done.code == 2 and "tests" in done.err and "test" in done.err


def test_what_was_scored_of_the_same_files_is_not_scored_again(digits, tmp_path, monkeypatch):
    model, copy, recipe = digits / "model [1]", tmp_path / "copy", digits / "tiny.yaml"
    (first,) = score_afresh([model], recipe, tmp_path / "first", None, settings="these").values()
    shutil.copytree(model, copy)
    (copy / "stage.json").write_text("{}", encoding="utf-8")  # how it was made is not what is scored
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: pytest.fail("scored again"))
    given, known = ([copy], recipe, tmp_path / "second", None), [tmp_path / "nowhere", tmp_path / "first"]
    assert score_afresh(*given, settings="these", known=known) == {str(copy): first}
    assert score_afresh(*given, settings="these") == {str(copy): first}  # its own, of before
    for changed in ({"settings": "those"}, {"settings": "these", "splits": ("validation",)}):
        with pytest.raises(pytest.fail.Exception, match="scored again"):
            score_afresh(*given, known=known, **changed)
    (copy / "config.json").write_bytes((copy / "config.json").read_bytes() + b"\n")
    monkeypatch.setattr(subprocess, "run", run)
    (again,) = score_afresh(*given, settings="these", known=known).values()
    assert again["key"] != first["key"] and again["scores"] == first["scores"]


def test_folders_of_one_name_are_told_apart(digits, said, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(digits / "model [1]", tmp_path / place / "model")
    done = hfcompress(said, "evaluate", tmp_path / "a/model", tmp_path / "b/model", "--recipe", digits / "tiny.yaml")
    assert re.fullmatch(r"a/model: accuracy \d+\.\d\d\nb/model: accuracy \d+\.\d\d\n", done.err)


def test_labels_are_as_long_as_need_be():
    models = ["runs/a/student", "runs/b/student", "old/b/student", "runs/a/teacher", "me/tiny", "student", ".", "a/"]
    labels = ["a/student", "runs/b/student", "old/b/student", "teacher", "tiny", "student", ".", "a"]
    assert told_apart(models) == dict(zip(models, labels))


def test_one_bad_model_is_found_before_any_is_scored(digits, said, tmp_path):
    good, recipe = digits / "model [1]", ("--recipe", digits / "tiny.yaml")
    (tmp_path / "unweighted").mkdir()
    config = json.loads((good / "config.json").read_bytes())
    (tmp_path / "unweighted" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert f"none of {FILE_NAME}" in hfcompress(said, "evaluate", good, tmp_path / "unweighted", *recipe).refusal
    del config["quantization_config"], config["transformers_weights"]
    (tmp_path / "unweighted" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "none of model.safetensors" in hfcompress(said, "evaluate", good, tmp_path / "unweighted", *recipe).refusal
    shutil.copytree(good, tmp_path / "other")
    save(make_model("test_vit"), tmp_path / "vit")
    shutil.copy(tmp_path / "vit" / FILE_NAME, tmp_path / "other")
    done = hfcompress(said, "evaluate", good, tmp_path / "other", *recipe)
    assert done.code == 3 and re.fullmatch(rf"error: {tmp_path}/other/.* is of another model: .*\n", done.err), done.err


def test_what_was_scored_before_a_failure_is_written(digits, tmp_path, monkeypatch, capsys):
    first, second, whole = digits / "model [1]", tmp_path / "second", Images.score

    def fails_later(self, model, *given):
        if model == str(second):
            raise DataError("the test's own")
        return whole(self, model, *given)

    monkeypatch.setattr(Images, "score", fails_later)
    shutil.copytree(first, second)
    asked = ["evaluate", str(first), str(second), "--recipe", str(digits / "tiny.yaml")]
    assert cli.main(asked) == 2
    said = capsys.readouterr()
    assert "error: the test's own" in said.err and re.search(r"accuracy +│ +\d+\.\d\d ", said.out)
    assert cli.main([*asked, "--json", str(tmp_path / "scores")]) == 2
    assert list(json.loads((tmp_path / "scores").read_bytes())) == [str(first)] and capsys.readouterr().out == ""


def test_on_a_terminal_there_is_a_bar(digits, said):
    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def read():
        try:
            while text := os.read(ours, 4096):
                shown.append(text)
        except OSError:  # how Linux says that the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    files = said / "out", Path(os.ttyname(theirs))
    process = start(files, "evaluate", digits / "model [1]", "--recipe", digits / "tiny.yaml")
    process.join(120)
    os.close(theirs)
    reader.join(10)
    os.close(ours)
    text = b"".join(shown).decode()
    assert process.exitcode == 0 and "━" in text and "20/20" in text and "model [1]" in text


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("nowhere", "'nowhere' (no folder here)"),
        ("some/where/else", "'some/where/else' (no folder here)"),
        ("empty", "(a folder)"),
        ("marian", "AutoModelForImageClassification"),
        ("cifar_resnet20", "knows 7 labels, the data has 10"),
    ],
)
def test_what_cannot_be_evaluated(model, told, digits, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if model in ("marian", "cifar_resnet20"):
        save(make_model(model), tmp_path / model)
    assert told in hfcompress(said, "evaluate", model, "--recipe", digits / "tiny.yaml").refusal


def test_which_of_several_recipes(digits, said):
    asked = ("evaluate", digits / "model [1]", "--recipe", "quickstart")
    assert "(digits, spelled-out): say which with --name" in hfcompress(said, *asked).refusal
    assert "no recipe 'digit'; it has digits, spelled-out" in hfcompress(said, *asked, "--name", "digit").refusal


# ------------------------------------------------------------------------------------------ corrupt files: 3


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 4]) + data[-99:]


def foreign(data: bytes) -> bytes:
    return to_bytes({"weight": numpy.zeros(3)})


@pytest.mark.parametrize("harm", [truncated, flipped, foreign])
def test_a_corrupt_file(harm, digits, said, tmp_path):
    folder = tmp_path / "harmed"
    shutil.copytree(digits / "model [1]", folder)
    file = folder / FILE_NAME
    whole = file.stat().st_size
    file.write_bytes(harm(file.read_bytes()))
    for command in (("inspect", folder), ("evaluate", folder, "--recipe", digits / "tiny.yaml")):
        done = hfcompress(said, *command)
        assert done.code == 3 and done.err.count("\n") == 1 and done.err.startswith(f"error: {file}: "), done.err
        if harm is truncated:
            sizes = f"{file.stat().st_size:,} bytes were found, its header promises {whole:,}: download it again"
            assert f"{file}: truncated: {sizes}" in done.err
