"""A sweep from its file to its table: cells run, stopped, resumed, failing; means, choices, the plot."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from commands import hfcompress, start, tree
from PIL import Image

from hfcompress import load
from hfcompress.checkpoint import FILE_NAME
from hfcompress.errors import ConfigError
from hfcompress.output import RECIPE, RESULTS, VALIDATION
from hfcompress.recipe import dump
from hfcompress.results import Results, Row, Score
from hfcompress.sweep import SweepRun
from hfcompress.sweep_report import plot, write_table
from hfcompress.sweep_results import Mean, cell_folder, error_file, gather, mean
from hfcompress.sweep_schema import load_sweep

SWEEP = """\
title: Digits at two rates
recipe:
  name: digits
  images: {embedded: digits, size: 8, mean: [0.3], std: [0.4], train_rows: 200, test_rows: 60}
  teacher: null
  student: {timm: lenet_300_100, arguments: {img_size: 8}, training: {max_steps: 8}}
  compression:
    rules: [{method: {uniform: {bits: 4}}, kinds: [conv, linear]}]
  training: {max_steps: 8, logging_steps: 8}
points:
  - {name: 2bit, overrides: [compression.rules.0.method.uniform.bits=2]}
  - {name: 6bit, overrides: [compression.rules.0.method.uniform.bits=6]}
  - {name: bad, overrides: ["compression.rules.0.pattern=nothing*"]}
seeds: [0, 1]
choices:
  - {label: smallest of any score, least_score: 0, paper: theirs}
  - {label: within a byte, most_bytes: 1}
paper:
  - {label: theirs, bytes: 20000, score: 50, source: a table}
  - {label: theirs too, score: 40, point: 6bit, source: a figure}
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "tiny.yaml"
    path.write_text(SWEEP, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------ for real


@pytest.fixture(scope="module")
def stopped(path):
    """A sweep that got a SIGINT while its second cell ran: its folder, its exit code, what was said."""
    folder = path.parent / "results"
    process = start((path.parent / "said", path.parent / "errors"), "sweep", path, "--only", "?bit", "--output", folder)
    for _ in range(6000):
        if (folder / "cells" / "2bit" / "seed-1" / RECIPE).exists():
            break
        assert process.is_alive(), (path.parent / "errors").read_text()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    return folder, process.exitcode, (path.parent / "said").read_text() + (path.parent / "errors").read_text()


@pytest.fixture(scope="module")
def resumed(stopped, path):
    """The same, resumed to its end: folder, what was said, what its first cell held before."""
    folder, _, _ = stopped
    before = tree(folder / "cells" / "2bit" / "seed-0")
    done = hfcompress(path.parent, "sweep", path, "--only", "?bit", "--output", folder, "--resume", "--jobs", "2")
    return folder, done, before


def test_a_stopped_sweep_says_how_to_go_on_and_has_a_table(stopped):
    folder, code, said = stopped
    assert code == 130 and "--resume" in said and "Traceback" not in said
    assert "| `2bit` | 1 |" in (folder / "table.md").read_text() and "1 not run" in (folder / "table.md").read_text()
    assert not list((folder / "logs").glob("*.error"))


def test_it_goes_on_where_it_was_stopped(resumed):
    folder, done, before = resumed
    assert tree(folder / "cells" / "2bit" / "seed-0") == before
    assert done.code == 0 and "4 cells, 1 of them done before" in done.out and "[2bit.seed-0]" not in done.out
    assert re.findall(r"^\[([\w.-]+)\] (?:begun|resumed)$", done.out, re.MULTILINE) == [
        *("2bit.seed-1", "6bit.seed-0", "6bit.seed-1")
    ]


def test_a_failing_cell_is_told_and_the_others_are_there(resumed, path, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(resumed[0], folder)
    done = hfcompress(tmp_path, "sweep", path, "seeds=[0]", "--output", folder, "--resume")
    table = (folder / "table.md").read_text()
    assert done.code == 1 and "3 cells, 2 of them done before" in done.out
    assert "| `bad` | 0 |" in table and "1 failed" in table and "| `6bit` | 1 |" in table
    assert re.search(r"^- `bad`, seed 0: rule 0 .* claims no weight", table, re.MULTILINE)
    again = hfcompress(tmp_path, "sweep", path, "seeds=[0]", "--output", folder, "--report")
    assert again.code == 1 and "begun" not in again.out  # it is failed still


def test_every_cell_is_a_run_whose_files_were_scored(resumed):
    folder, _, _ = resumed
    found = json.loads((folder / RESULTS).read_bytes())
    for point in found["points"][:2]:
        for cell in point["cells"]:
            place = folder / "cells" / point["name"] / f"seed-{cell['seed']}"
            file = place / "student" / FILE_NAME
            assert cell["status"] == "done" and cell["row"]["bytes"] == os.stat(file).st_size
            assert cell["row"]["scores"]["accuracy"]["n"] == 60
            assert "split:test" in cell["row"]["scores"]["accuracy"]["signature"]
            assert "split:validation" in cell["validation"]["accuracy"]["signature"]
            assert (
                cell["validation"]["accuracy"]["n"]
                == json.loads((place / VALIDATION).read_bytes())["compressed"]["accuracy"]["n"]
            )
            assert load(place / "student").num_labels == 10 and (place / "student" / "README.md").is_file()
    sizes = [point["mean"]["bytes"]["mean"] for point in found["points"][:2]]
    assert sizes[0] < sizes[1] and found["choices"][0]["point"] == "2bit" and found["choices"][1]["point"] is None


def test_points_of_a_seed_share_the_full_precision_student(resumed):
    folder, _, _ = resumed
    students = [
        tree(folder / "cells" / point / f"seed-{seed}" / "stages" / "student")
        for point, seed in (("2bit", 0), ("6bit", 0), ("6bit", 1))
    ]
    assert students[0] == students[1] != students[2]
    log = (folder / "logs" / "6bit.seed-0.log").read_text()
    assert "student: done before" in log


def test_nothing_is_run_twice_and_a_report_runs_nothing(resumed, path):
    folder, _, _ = resumed
    (folder / "table.md").unlink()
    done = hfcompress(path.parent, "sweep", path, "--output", folder, "--report")
    assert done.code == 0 and (folder / "table.md").is_file() and "begun" not in done.out
    again = hfcompress(path.parent, "sweep", path, "--output", folder, "--resume", "--only", "?bit")
    assert "4 cells, 4 of them done before" in again.out and "begun" not in again.out and again.code == 0


def test_a_dry_run_keeps_nothing(path, tmp_path):
    """On random images: the folder that the recipe names is nowhere."""
    data = "images={folder: nowhere, size: 8, mean: [0.3], std: [0.4], validation: null, validation_fraction: 0.5}"
    output = "--output", tmp_path / "o"
    done = hfcompress(tmp_path, "sweep", path, data, "--only", "2bit", "--dry-run", *output)
    assert done.code == 0 and not (tmp_path / "o").exists()
    assert re.search(r"^\[2bit\.seed-0\] .*: can be run$", done.out, re.MULTILINE)
    assert "the images are random" in done.out


# ------------------------------------------------------------------------------------------ refused


def test_a_folder_that_is_not_a_sweeps_to_take(path, tmp_path):
    plan = load_sweep(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not empty: go on with its sweep with --resume"):
        SweepRun(plan, tmp_path)
    with pytest.raises(ConfigError, match="is a file: give --output a folder"):
        SweepRun(plan, tmp_path / "file")
    with pytest.raises(ConfigError, match=r"no point's name matches; there are 2bit, 6bit, bad"):
        SweepRun(plan, tmp_path / "new", only=["8bit"])
    SweepRun(plan, tmp_path, resume=True)


def test_a_faulty_sweep_is_answered_in_one_line(path, tmp_path):
    done = hfcompress(tmp_path, "sweep", path, "seeds=[0", "--output", tmp_path / "o")
    assert "override 'seeds=[0'" in done.refusal and not (tmp_path / "o").exists()


# ------------------------------------------------------------------------------------------ means and tables


def pretend(plan, folder: Path, found: dict[tuple[str, int], tuple[int, float, float]], student: float = 90.0) -> None:
    """Cells as runs leave them: (point, seed) → (bytes, validation score, test score). student: its test score."""
    for cell in plan.cells:
        if (cell.point.name, cell.seed) not in found:
            continue
        size, validation, test = found[cell.point.name, cell.seed]
        place = cell_folder(cell, folder)
        place.mkdir(parents=True)
        (place / RECIPE).write_text(dump(cell.recipe))

        def score(value: float) -> Score:
            return Score(value, 60, "top1", (value, value))

        rows = [
            Row(name, 1000, size_, 8.0, 900, {"accuracy": score(value)})  # type: ignore[arg-type]
            for name, size_, value in (("student", 4000, student), ("compressed", size, test))
        ]
        hardware = {"cpu": "A processor", "cores": 2, "gpus": []}
        Results(tuple(rows), cell.seed, {"torch": "2.9"}, hardware, {"compressed": 61.0}).save(place / RESULTS)
        scores = {name: {"accuracy": vars(score(validation))} for name in ("student", "compressed")}
        (place / VALIDATION).write_text(json.dumps(scores))


@pytest.fixture
def made(path, tmp_path):
    """Of two points, three of four cells."""
    plan = load_sweep(path, ["points=[{name: 2bit}, {name: 6bit}, {name: never}]"])
    pretend(plan, tmp_path, {("2bit", 0): (1000, 70, 60.0), ("2bit", 1): (1100, 72, 62), ("6bit", 0): (2000, 99, 50)})
    return plan, tmp_path


def test_the_table_holds_means_and_what_is_missing(made):
    plan, folder = made
    results = gather(plan, folder)
    write_table(results, "hfcompress sweep tiny.yaml", folder / "table.md")
    table = (folder / "table.md").read_text()
    assert "| `2bit` | 2 | 1,050 ± 71 | 3.8 ± 0.3 | 71.00 ± 1.41 | 61.00 ± 1.41 |  |  |" in table
    assert "| `6bit` | 1 | 2,000 | 2.0 | 99.00 | 50.00 | 40.00 | 1 not run |" in table
    assert "| `never` | 0 |  |  |  |  |  | not run |" in table
    assert "| theirs | 20,000 | 50.00 | a table |" in table
    assert "| student, full precision | 1,000 | 4,000 | 2 | 90.00 ± 0.00 |" in table
    assert "A processor, 2 cores, no GPU. Training the compressed student took, a seed: `2bit` 1 min 1 s" in table
    assert "```bash\nhfcompress sweep tiny.yaml\n```" in table and "# Digits at two rates\n" in table
    assert not results.complete and results.failed == 0


def test_a_cell_that_was_run_otherwise_says_how(made, path):
    """The table's command is not what made it."""
    _, folder = made
    changed = ["points=[{name: 2bit}, {name: 6bit}, {name: never}]", "student.training.max_steps=99", "seeds=[0]"]
    write_table(gather(load_sweep(path, changed), folder), "hfcompress sweep tiny.yaml", folder / "table.md")
    table = (folder / "table.md").read_text()
    ran = load_sweep(path).cells[0].recipe.student.training["max_steps"]
    assert f"| `2bit` | 1 | 1,000 | 4.0 | 70.00 | 60.00 |  | run with `student.training.max_steps={ran}` |" in table


def test_students_trained_otherwise_are_no_seeds_of_one(path, tmp_path):
    plan = load_sweep(path, ["points=[{name: 2bit}, {name: 4bit}, {name: 6bit}]"])
    pretend(plan, tmp_path, {("2bit", 0): (1000, 70, 60.0), ("4bit", 0): (2000, 72, 62), ("4bit", 1): (2100, 72, 62)})
    pretend(plan, tmp_path, {("6bit", 0): (3000, 60, 50.0)}, student=80.0)
    write_table(gather(plan, tmp_path), "hfcompress", tmp_path / "table.md")
    table = (tmp_path / "table.md").read_text()
    assert "| student, full precision (`2bit`, `4bit`) | 1,000 | 4,000 | 2 | 90.00 ± 0.00 |" in table
    assert "| student, full precision (`6bit`) | 1,000 | 4,000 | 1 | 80.00 |" in table


def test_the_operating_point_is_chosen_on_the_validation_split(path, tmp_path):
    """The test split would choose otherwise, and a point whose seeds are not all there is none."""
    choices = (
        "choices=[{label: a, least_score: 75}, {label: b, most_bytes: 2500}, {label: c, least_score: 75, among: '2*'}]"
    )
    plan = load_sweep(path, ["points=[{name: 2bit}, {name: 4bit}, {name: 6bit}, {name: half}]", choices])
    numbers = {"2bit": (1000, 70, 99.0), "4bit": (2000, 80, 60.0), "6bit": (3000, 90, 98.0)}
    pretend(plan, tmp_path, {(name, seed): found for name, found in numbers.items() for seed in (0, 1)})
    pretend(plan, tmp_path, {("half", 0): (10, 99, 99.0)})
    results = gather(plan, tmp_path)
    found = [results.chosen(choice) for choice in results.choices]
    assert [point and point.name for point in found] == ["4bit", "4bit", None]
    write_table(results, "hfcompress sweep …", tmp_path / "table.md")
    assert "| c | none |" in (tmp_path / "table.md").read_text()
    write_table(gather(plan, tmp_path / "empty"), "hfcompress sweep …", tmp_path / "table.md")
    assert "| c | not run |" in (tmp_path / "table.md").read_text()


def test_a_failed_cell_keeps_its_error_until_it_is_run_again(made):
    plan, folder = made
    cell = plan.cells[3]
    error_file(cell, folder).parent.mkdir()
    error_file(cell, folder).write_text("the device is gone\n")
    results = gather(plan, folder)
    record = results.points[1].cells[1]
    assert (record.status, record.error, results.failed) == ("failed", "the device is gone", 1)
    results.save(folder / RESULTS)
    written = json.loads((folder / RESULTS).read_bytes())
    assert written["points"][1]["cells"][1]["error"] == "the device is gone"
    assert written["points"][0]["mean"]["test"] == {"mean": 61.0, "sd": pytest.approx(2**0.5), "n": 2}
    assert written["points"][2]["mean"]["bytes"] is None


def test_the_plot_shows_something(made, path):
    plan, folder = made
    assert plot(gather(plan, folder), folder / "plot.png")
    with Image.open(folder / "plot.png") as image:
        assert image.format == "PNG" and min(image.size) >= 400
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert not plot(gather(plan, folder / "empty"), folder / "none.png") and not (folder / "none.png").exists()


def test_means_are_those_of_a_sample():
    assert mean([]) is None and mean([3.0]) == Mean(3.0, None, 1)
    assert mean([1.0, 2.0, 3.0]) == Mean(2.0, 1.0, 3)
    assert mean([1.0, 2.0, 3.0]).show(1) == "2.0 ± 1.0" and Mean(12345.6, None, 1).show(0, thousands=True) == "12,346"
