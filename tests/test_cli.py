"""The command line: quick help, what it prints, exit codes, and one clear line for what is wrong."""

import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from commands import hfcompress, installed, start, tree
from conftest import compress, make_model
from datasets import Dataset
from PIL import Image
from recipe_texts import TINY

from hfcompress.checkpoint import FILE_NAME, save
from hfcompress.recipe import available
from hfcompress.stages import MARKER

COMMANDS = (
    "run",
    "sweep",
    "evaluate",
    "compress",
    "inspect",
    "verify",
    "export",
    "push",
    "translate",
    "compare",
    "recipes",
    "recipes show",
)
PAIRS = """\
name: pairs
translation: {folder: pairs, source: de, target: en}
vocabulary: {size: 64}
teacher: {marian: {d_model: 16, encoder_layers: 1, decoder_layers: 1}}
student: {from_teacher: {encoder_layers: 1, decoder_layers: 1}}
compression:
  rules: [{method: {uniform: {bits: 4}}}]
training: {max_steps: 1}
"""


# ------------------------------------------------------------------------------------------ help


def test_help_needs_none_of_the_heavy_packages(run_python):
    code = """
import sys
from hfcompress import cli
codes = [cli.main([*command.split(), "--help"]) for command in ("", *sys.argv[1:])]
codes.append(cli.main(["--version"]))
print(codes, [name for name in ("torch", "transformers", "datasets", "timm", "numpy") if name in sys.modules])
"""
    assert run_python(code, *COMMANDS).splitlines()[-1] == f"{[0] * (2 + len(COMMANDS))} []"


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_come_at_once(option):
    """In half a second of the processor's time, from the start of a fresh process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = installed(option, program=(sys.executable, "-m", "hfcompress"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.code == 0 and done.err == ""
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    if option == "--version":
        assert done.out == f"hfcompress {version('hfcompress')}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, said):
    done = hfcompress(said, *command.split(), "--help")
    assert done.code == 0 and done.err == "" and f"Usage: hfcompress {command} " in done.out


def test_the_help_names_every_command_and_cuts_no_sentence(said):
    done = hfcompress(said, "--help")
    for command in COMMANDS[:-1]:
        assert re.search(rf"^ +{command} +\w.*\.$", done.out, re.MULTILINE)
    assert "..." not in done.out.partition("Commands:")[2]


@pytest.mark.parametrize(
    "line",
    ["", "rn", "run", "run --outptu x quickstart", "evaluate x", "inspect", "recipes shw", "inspect /nowhere/at/all"],
)
def test_a_wrong_command_line_gets_usage_and_one_error(line, said):
    done = hfcompress(said, *line.split())
    assert done.code == 2 and done.err.startswith("Usage: hfcompress") and "Traceback" not in done.err
    if line:
        assert done.err.count("Error: ") == 1 and done.err.splitlines()[-1].startswith("Error: ")


# ------------------------------------------------------------------------------------------ recipes, inspect


def test_recipes_lists_them_all(said):
    done = hfcompress(said, "recipes")
    assert done.code == 0 and {"quickstart", "multi30k/4bit", "cifar10/resnet20"} <= {e.name for e in available()}
    for entry in available():
        assert entry.name in done.out and entry.description in done.out


def test_show_prints_the_file_itself(said):
    for entry in available():
        assert hfcompress(said, "recipes", "show", entry.name).out == entry.path.read_text(encoding="utf-8")
    assert "the nearest is 'quickstart'" in hfcompress(said, "recipes", "show", "quikstart").refusal


@pytest.fixture(scope="module", params=["marian", "cifar_resnet20"])
def compressed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(request.param)
    save(model, folder, compress(model))
    return folder


def test_inspect_accounts_for_every_byte(compressed, said):
    found = json.loads(hfcompress(said, "inspect", compressed, "--json").out)
    size = os.stat(compressed / FILE_NAME).st_size
    around = sum(found[part] for part in ("stream", "tables", "index", "header"))
    assert found["bytes"] == size == around + sum(t["array_bytes"] for t in found["tensors"])
    codes = sum(t["code_bits"] for t in found["tensors"])
    assert 0 <= 8 * found["stream"] - codes < 512 + 0.0025 * codes  # the lanes' states
    assert found["bits_per_weight"] > 0
    for tensor in found["tensors"]:
        bits = tensor["code_bits"] + 8 * tensor["array_bytes"]
        assert tensor["bits_per_weight"] == pytest.approx(bits / max(1, math.prod(tensor["shape"])))
    assert {"uniform"} < {tensor["method"] for tensor in found["tensors"]}


def test_the_table_of_inspect_holds_whole_names(compressed, said):
    by_folder, by_file = (hfcompress(said, "inspect", path) for path in (compressed, compressed / FILE_NAME))
    assert by_folder == by_file and by_folder.code == 0
    found = json.loads(hfcompress(said, "inspect", compressed, "--json").out)
    for tensor in found["tensors"]:
        assert re.search(rf"^{re.escape(tensor['name'])} .*{tensor['bits_per_weight']:.3f}", by_folder.out, re.M)
    assert re.search(rf"^file .* {found['bytes']:,}$", by_folder.out.replace(" \n", "\n").rstrip(), re.M)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_there_is_no_compressed_file(command, said, tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text("{}", encoding="utf-8")
    assert f"dense holds no {FILE_NAME}: give a folder" in hfcompress(said, command, tmp_path / "dense").refusal


def test_a_narrow_terminal_cuts_no_name(compressed, said):
    done = hfcompress(said, "inspect", compressed, COLUMNS="80")
    assert done.code == 0 and "…" not in done.out


# ------------------------------------------------------------------------------------------ the user's mistakes: 2


def refused(said: Path, tmp_path: Path, recipe: str | Path, *options: object) -> str:
    """What is said; and nothing has been written."""
    before = tree(tmp_path)
    output = tmp_path / "output"
    done = hfcompress(said, "run", recipe, "--output", output, *options)
    assert tree(tmp_path) == before, done.err
    return done.refusal


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["studnt.training.max_steps=1"], "no key 'studnt'; the nearest is 'student'"),
        (["training.max_step=1"], "no field 'max_step'; the nearest is 'max_steps'"),
        (["training.max_steps"], "expected section.key=value"),
        (["compression.rules.0.method.uniform.bits=0"], "bits"),
        (["compression.rules.0.method.uniform.bits=9"], "bits"),
        (["compression.rules.0.pattern=nothing*"], "claims no weight"),
        (["student.timm=cifar_resnet21"], "timm has no architecture 'cifar_resnet21'"),
        (["student.arguments={in_chans: 1, widht: 2}"], "widht"),
        (["training.load_best_model_at_end=true", "training.save_strategy=steps"], "transformers refuses"),
        (["teacher={pretrained: no/where}"], "cannot load 'no/where' (no folder here)"),
        (["images.embedded=cldr"], "for a recipe's section 'translation' only"),
    ],
)
def test_a_recipe_that_cannot_be_run(overrides, told, said, tmp_path):
    """Told before anything is trained, and before the output folder is taken."""
    (tmp_path / "tiny.yaml").write_text(TINY, encoding="utf-8")
    assert told in refused(said, tmp_path, tmp_path / "tiny.yaml", *overrides)


def test_a_faulty_file_is_answered_with_its_line(said, tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY.replace("student:", "studnet:"), encoding="utf-8")
    done = hfcompress(said, "run", recipe)
    assert done.code == 2 and f"{recipe}:4" in done.err and "the nearest is 'student'" in done.err
    assert "Traceback" not in done.err


def test_an_unknown_name(said, tmp_path):
    assert "the nearest is 'quickstart'" in refused(said, tmp_path, "quickstrt")


def sentences(count: int, empty: int | None = None) -> str:
    rows = [{"de": f"Satz {i}", "en": "" if i == empty else f"sentence {i}"} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def without_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def without_split(folder: Path) -> None:
    (folder / "test.jsonl").rename(folder / "tset.jsonl")


def with_empty_split(folder: Path) -> None:
    (folder / "test.jsonl").write_text("")


def with_other_counts(folder: Path) -> None:
    (folder / "test.jsonl").unlink()
    (folder / "test.de").write_text("eins\nzwei\ndrei\n")
    (folder / "test.en").write_text("one\ntwo\n")


def with_an_empty_line(folder: Path) -> None:
    (folder / "test.jsonl").write_text(sentences(8, empty=3))


def without_a_column(folder: Path) -> None:
    (folder / "test.jsonl").write_text(sentences(8).replace('"en"', '"fr"'))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (without_folder, "No folder"),
        (without_split, "No split 'test'"),
        (with_empty_split, "Split 'test' has no rows"),
        (with_other_counts, "has 3 lines"),
        (with_an_empty_line, "1 of 8 pairs with an empty side (first: row 3)"),
        (without_a_column, "No 'en'"),
    ],
)
def test_sentence_pairs_that_cannot_be_used(harm, told, said, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split, count in (("train", 40), ("validation", 8), ("test", 8)):
        (folder / f"{split}.jsonl").write_text(sentences(count))
    recipe = tmp_path / "pairs.yaml"
    recipe.write_text(PAIRS.replace("target: en", "target: en, column: null"), encoding="utf-8")
    harm(folder)
    assert told in refused(said, tmp_path, recipe, "--data-root", tmp_path)


@pytest.mark.parametrize(
    ("labels", "override", "told"),
    [
        ([0, 1, 2, 0], "images.label=label", "1 labels that are none of train's 2 classes (first: row 2, 2)"),
        ([0, 1, 1, 0], "images.label=lable", "No 'lable'"),
    ],
)
def test_images_that_cannot_be_used(labels, override, told, said, tmp_path):
    pictures = [Image.new("L", (8, 8), 30 * i) for i in range(4)]
    for split in ("train", "validation", "test"):
        rows = {"image": pictures, "label": labels if split == "test" else [0, 1, 1, 0]}
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Dataset.from_dict(rows).to_parquet(tmp_path / "pictures" / f"{split}.parquet")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        TINY.replace("embedded: digits", "folder: pictures").replace("train_rows: 64, ", ""), encoding="utf-8"
    )
    assert told in refused(said, tmp_path, recipe, override, "--data-root", tmp_path)


# ------------------------------------------------------------------------------------------ the output folder


@pytest.fixture
def held(tmp_path):
    """A folder as a run has begun it, and its recipe."""
    (tmp_path / "tiny.yaml").write_text(TINY, encoding="utf-8")
    stage = tmp_path / "output" / "stages" / "teacher"
    stage.mkdir(parents=True)
    (stage / MARKER).write_text(json.dumps({"fingerprint": "of hours of work", "seconds": 1.0, "history": []}))
    return tmp_path / "tiny.yaml"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], ["already holds a run", "--resume", "--overwrite", "--output"]),
        (["--resume", "--overwrite"], ["contradict each other"]),
        (["--resume"], ["stage 'teacher'", "made with other settings", "--overwrite"]),
        (["--overwrite", "images.folder=nowhere", "images.embedded=null"], ["No folder nowhere"]),
        (["--overwrite", "--reuse", "nowhere"], ["--reuse nowhere", "no run in it"]),
    ],
)
def test_a_folder_that_holds_a_run_is_not_touched(options, told, held, said, tmp_path):
    if options == ["--resume"]:
        (tmp_path / "output" / "recipe.yaml").write_text(TINY)
    message = refused(said, tmp_path, held, *options)
    assert all(words in message for words in told)


def test_a_run_is_not_overwritten_and_reused_at_once(held, said, tmp_path):
    message = refused(said, tmp_path, held, "--overwrite", "--reuse", tmp_path / "output")
    assert "would delete the run that --reuse" in message


@pytest.mark.parametrize("option", ["--overwrite", "--resume", "--no-option"])
def test_a_folder_of_other_files_is_not_touched(option, said, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "thesis.tex").write_text("years of work")
    (tmp_path / "tiny.yaml").write_text(TINY, encoding="utf-8")
    options = [option] if option != "--no-option" else []
    assert "holds other files than a run's" in refused(said, tmp_path, tmp_path / "tiny.yaml", *options)


def test_the_output_is_a_file(said, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY, encoding="utf-8")
    (tmp_path / "output").write_text("something")
    assert "is a file: give --output a folder" in refused(said, tmp_path, tmp_path / "tiny.yaml")


# ------------------------------------------------------------------------------------------ interrupted: 130, bugs: 1


def test_ctrl_c_as_soon_as_the_folder_is_taken(said, tmp_path):
    """In the middle of the training: test_resume.py."""
    process = start((said / "out", said / "err"), "run", "quickstart", "--output", tmp_path / "output")
    try:
        while not (tmp_path / "output").exists():
            assert process.is_alive()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 130
    finally:
        process.kill()
    assert "--resume" in (said / "err").read_text() and "Traceback" not in (said / "err").read_text()


def test_anything_else_is_a_traceback_and_one(run_python):
    code = "import sys; from hfcompress import cli; cli._console = None; sys.exit(cli.main(['recipes']))"
    assert "TypeError: 'NoneType' object is not callable" in run_python(code, fails=True)


def test_debugging_shows_where_an_error_came_from(said):
    done = hfcompress(said, "run", "nowhere", HFCOMPRESS_DEBUG="1")
    assert done.code == 1 and "Traceback" in done.err and "ConfigError: nowhere" in done.err
