"""The quickstart recipe, cut down to seconds, through the command line: what it leaves, and whether it is true."""

import json
import os
import re
import shutil
import signal
import sys
import time

import pytest
from commands import hfcompress, installed, start, tree
from PIL import Image

from hfcompress import load, recipe
from hfcompress.checkpoint import FILE_NAME
from hfcompress.networks import parameters
from hfcompress.results import Results
from hfcompress.stages import MARKER

STAGES = ("teacher", "student", "post_training", "compressed")
NAMES = ("digits", "spelled-out")
TINY = (
    "images.train_rows=128",
    "images.test_rows=50",
    "translation.train_rows=256",
    "translation.test_rows=30",
    "teacher.training.max_steps=2",
    "student.training.max_steps=2",
    "evaluation.bootstrap=20",
    "spelled-out:evaluation.max_new_tokens=12",
    "spelled-out:training.load_best_model_at_end=true",
    "spelled-out:training.save_strategy=epoch",
)
TOKENIZER = {"source.spm", "target.spm", "tokenizer_config.json", "vocab.json"}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The run's folder, and what was said."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    return folder, installed("run", "quickstart", *TINY, "--output", folder)


@pytest.fixture(scope="module")
def run(done):
    folder, said = done
    assert said.code == 0, said.err
    return folder


def results(folder):
    return json.loads((folder / "results.json").read_bytes())


def rows(folder):
    return {row["name"]: row for row in results(folder)["rows"]}


# ------------------------------------------------------------------------------------------ what is there


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_holds_what_was_promised(run, name):
    assert {path.name for path in run.iterdir()} == set(NAMES)
    folder = run / name
    assert {path.name for path in folder.iterdir()} == {"student", "stages", "results.json", "recipe.yaml"}
    student = {"config.json", FILE_NAME, "README.md", "training.png", "sizes.png", "scores.png"}
    if name == "spelled-out":
        student |= TOKENIZER | {"generation_config.json"}
    assert {path.name for path in (folder / "student").iterdir()} == student
    assert {path.name for path in (folder / "stages").iterdir()} - {"vocabulary"} == {*STAGES, "scores.json"}
    assert not list(folder.rglob("checkpoints")) and not list(folder.rglob(".*"))


@pytest.mark.parametrize("name", NAMES)
def test_results_keep_their_schema(run, name):
    found = results(run / name)
    paired = ["paired"] if name == "spelled-out" else []
    assert list(found) == ["rows", "seed", "versions", "hardware", "seconds", *paired]
    assert [test["against"] for test in found.get("paired", [])] == [s for s in STAGES if s != "compressed" and paired]
    assert [row["name"] for row in found["rows"]] == list(STAGES)
    for row in found["rows"]:
        assert list(row) == [
            *("name", "parameters", "bytes", "bits_per_weight", "int8_gzip_bytes", "scores", "ratio_to_teacher")
        ]
        assert set(row["scores"]) == ({"accuracy"} if name == "digits" else {"bleu", "chrf"})
        for score in row["scores"].values():
            assert list(score) == ["value", "n", "signature", "interval"]
            assert score["n"] == (50 if name == "digits" else 30)
            low, high = score["interval"]
            assert 0 <= low <= high <= 100 and 0 <= score["value"] <= 100
    assert set(found["seconds"]) == set(STAGES) and found["seconds"]["teacher"] > 0
    assert {"hfcompress", "torch", "transformers", "python"} <= found["versions"].keys()
    assert found["seed"] == 0 and found["hardware"]["cores"] > 0
    assert Results.load(run / name / "results.json").to_json() == (run / name / "results.json").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_on_disk(run, name):
    found = rows(run / name)
    for stage, row in found.items():
        folder = run / name / "stages" / stage
        file = folder / ("model.safetensors" if stage in ("teacher", "student") else FILE_NAME)
        assert row["bytes"] == os.stat(file).st_size
        assert row["parameters"] == parameters(load(folder))
        assert row["bits_per_weight"] == 8 * row["bytes"] / row["parameters"]
        assert row["ratio_to_teacher"] == found["teacher"]["bytes"] / row["bytes"]
        assert 0.5 * row["parameters"] < row["int8_gzip_bytes"] < 1.1 * row["parameters"]
    assert os.stat(run / name / "student" / FILE_NAME).st_size == found["compressed"]["bytes"]
    assert len({found[stage]["int8_gzip_bytes"] for stage in STAGES[1:]}) == 1  # the same student's, each time
    assert found["compressed"]["bytes"] < found["compressed"]["int8_gzip_bytes"] < found["student"]["bytes"]


@pytest.mark.parametrize("name", NAMES)
def test_the_student_is_the_trained_stage(run, name):
    stage, student = tree(run / name / "stages" / "compressed"), tree(run / name / "student")
    assert {file: digest for file, digest in stage.items() if file != MARKER}.items() <= student.items()
    config = json.loads((run / name / "student" / "config.json").read_bytes())
    assert config["quantization_config"]["quant_method"] == "hfcompress"


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_is_kept_as_resolved(run, name):
    wanted = {r.name: r for r in recipe.load(recipe.find("quickstart"), TINY)}
    assert recipe.load(run / name / "recipe.yaml") == [wanted[name]]


@pytest.mark.parametrize("picture", ["training.png", "sizes.png", "scores.png"])
@pytest.mark.parametrize("name", NAMES)
def test_pictures_show_something(run, name, picture):
    with Image.open(run / name / "student" / picture) as image:
        assert image.format == "PNG" and min(image.size) >= 400
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20


@pytest.mark.parametrize("name", NAMES)
def test_the_card_gives_the_measured_numbers(run, name):
    card = (run / name / "student" / "README.md").read_text(encoding="utf-8")
    row = rows(run / name)["compressed"]
    assert card.startswith("---\n") and f"{row['bytes']:,}" in card and f"{row['parameters']:,}" in card
    assert "hfcompress run recipes/quickstart.yaml" in card and str(run) not in card


# ------------------------------------------------------------------------------------------ what is said


def test_without_a_terminal_there_are_plain_lines_and_nothing_else(done):
    """No bars, and none of the libraries' warnings."""
    _, said = done
    lines = said.err.splitlines()
    trained = [line for line in lines if re.fullmatch(r"\S+: step 2/2( +\w+ [\d.e-]+)+", line)]
    scored = [line for line in lines if re.fullmatch(r"\S+: (accuracy|bleu) \d+\.\d\d", line)]
    assert (len(trained), len(scored)) == (6, 8) and set(lines) == {*trained, *scored}
    assert "\r" not in said.err and "\x1b" not in said.out + said.err


def test_a_table_ends_a_run(done):
    folder, said = done
    for name in NAMES:
        part = said.out[said.out.index(f"{name}: ") :]
        for title in ("teacher", "student, full precision", "student, compressed after training"):
            assert re.search(rf"^{title} +\d", part, re.MULTILINE)
        assert re.search(r"^student, trained compressed +\d", part, re.MULTILINE)
        assert f"pictures are in {folder / name / 'student'}\n" in part


# ------------------------------------------------------------------------------------------ whether it is true


def test_a_fresh_process_finds_the_same_scores(run, tmp_path):
    folders = [run / "digits" / "stages" / name for name in STAGES]
    again = installed("evaluate", *folders, "--recipe", run / "digits" / "recipe.yaml", "--json", tmp_path / "scores")
    assert again.code == 0, again.err
    found = json.loads((tmp_path / "scores").read_bytes())
    for name, folder in zip(STAGES, folders):
        assert found[str(folder)]["scores"] == rows(run / "digits")[name]["scores"]


def test_the_student_alone_has_the_scores_of_its_stage(run, tmp_path):
    student, kept = run / "spelled-out" / "student", run / "spelled-out" / "recipe.yaml"
    again = hfcompress(tmp_path, "evaluate", student, "--recipe", kept, "--json", tmp_path / "scores")
    assert again.code == 0, again.err
    (found,) = json.loads((tmp_path / "scores").read_bytes()).values()
    assert found["scores"] == rows(run / "spelled-out")["compressed"]["scores"]
    assert len(found["samples"]) == 30


def test_the_same_seed_gives_the_same_bytes(run, tmp_path):
    other = tmp_path / "other"
    process = start((tmp_path / "out", tmp_path / "err"), "run", "quickstart", *TINY, "--output", other)
    try:
        while not (other / "digits" / "stages" / "compressed" / MARKER).exists():
            assert process.is_alive(), (tmp_path / "err").read_text()
            time.sleep(0.05)
    finally:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)  # only its weights are wanted
        process.join()
    for stage in STAGES:
        one, two = (tree(folder / "digits" / "stages" / stage) for folder in (run, other))
        assert one.keys() == two.keys()
        assert {name for name in one if one[name] != two[name]} <= {MARKER}  # which holds seconds


# ------------------------------------------------------------------------------------------ again


def test_a_finished_run_resumed_trains_nothing(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run / "digits", folder)
    (folder / "results.json").unlink()
    given = ("run", run / "digits" / "recipe.yaml", "card.limits=Read with care.", "--output", folder, "--resume")
    again = hfcompress(tmp_path, *given)
    assert again.code == 0, again.err
    assert re.findall(r"^(\w+): done before", again.out, re.MULTILINE) == ["teacher", "student", "compressed"]
    assert "training" not in again.out.partition("scoring")[0] and "step" not in again.err
    before, after = (results(place) for place in (run / "digits", folder))
    assert after["rows"] == before["rows"] and after["seconds"] == before["seconds"]
    assert recipe.load(folder / "recipe.yaml")[0].card.limits == "Read with care."
    assert "Read with care." in (folder / "student" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("digits", "student.training.max_steps=3", "stage 'student'"),
        ("digits", "teacher.arguments.width=1", "stage 'teacher'"),
        ("spelled-out", "vocabulary.size=500", "the vocabulary"),
    ],
)
def test_other_settings_are_not_resumed_and_nothing_is_touched(run, tmp_path, name, change, told):
    folder = tmp_path / "copy"
    shutil.copytree(run / name, folder)
    before = tree(folder)
    said = hfcompress(tmp_path, "run", run / name / "recipe.yaml", change, "--output", folder, "--resume")
    assert told in said.refusal and "made with other settings" in said.refusal
    assert tree(folder) == before


def test_stages_of_another_run_are_taken_over_where_settings_agree(run, tmp_path):
    """A file of two recipes: each looks into its own folder of the other run."""
    folder = tmp_path / "new"
    changed = ("digits:student.training.max_steps=1", "digits:evaluation.bootstrap=0", "--reuse", run)
    said = hfcompress(tmp_path, "run", "quickstart", *TINY, *changed, "--output", folder)
    assert said.code == 0, said.err
    trained = re.findall(r"^(\w+): (?:training|done before)", said.out, re.MULTILINE)
    kept = re.findall(r"^(\w+): done before", said.out, re.MULTILINE)
    assert trained == ["teacher", "student", "compressed"] * 2
    assert kept == ["teacher", "teacher", "student", "compressed"]

    def marker(of, name, stage):
        return (of / name / "stages" / stage / MARKER).read_bytes()

    for name, stage in (("digits", "teacher"), *(("spelled-out", s) for s in ("teacher", "student", "compressed"))):
        assert marker(folder, name, stage) == marker(run, name, stage)
        assert results(folder / name)["seconds"][stage] == results(run / name)["seconds"][stage]
    assert marker(folder, "digits", "student") != marker(run, "digits", "student")
    assert rows(folder / "digits")["teacher"] == rows(run / "digits")["teacher"]
    assert rows(folder / "digits")["compressed"] != rows(run / "digits")["compressed"]
    assert rows(folder / "spelled-out") == rows(run / "spelled-out")


def test_two_processes_make_one_run(run, tmp_path):
    """As the README says it: one of them speaks, writes and scores."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    given = ("run", run / "digits" / "recipe.yaml", "--output", tmp_path / "two", "--reuse", run / "digits")
    done = installed(*given, "student.training.max_steps=1", program=(*torchrun, "-m", "hfcompress"))
    assert done.code == 0, done.err
    assert re.findall(r"^(\w+): \w+", done.out, re.MULTILINE) == ["digits", "teacher", "student", "compressed"]
    assert done.out.count("scoring the files") == 1 and len(re.findall("^compressed: accuracy", done.err, re.M)) == 1
    assert list(rows(tmp_path / "two")) == list(STAGES)
