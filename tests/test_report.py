"""results.json, the table and the pictures say what the run measured, and nothing is lost on the way."""

import io
import json
import math
import platform
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from torch import nn

from hfcompress import report
from hfcompress.checkpoint import FILE_NAME, PartSize, Sizes, save
from hfcompress.compressor import Compressor
from hfcompress.errors import DataError
from hfcompress.methods import Dense, Uniform
from hfcompress.reparameterization import Kind
from hfcompress.results import METRICS, TITLES, Paired, Part, Results, Row, Score, by_kind, readable_bytes, wilson
from hfcompress.schema import Rule

numbers = st.floats(-1e6, 1e6)
counts = st.integers(0, 10**12)
scores = st.builds(Score, numbers, counts, st.text(), st.tuples(numbers, numbers))


@st.composite
def results(draw: st.DrawFn) -> Results:
    names = draw(st.lists(st.sampled_from(list(TITLES)), unique=True))
    measured = st.dictionaries(st.sampled_from(list(METRICS)), scores)
    rows = [Row(n, draw(counts), draw(counts), draw(numbers), draw(counts), draw(measured)) for n in names]
    words = st.dictionaries(st.text(), st.text(), max_size=3)
    seconds = st.dictionaries(st.text(), numbers, max_size=3)
    others = st.sampled_from(["teacher", "student", "post_training"])
    tests = st.builds(Paired, others, st.sampled_from(list(METRICS)), numbers, numbers, counts, counts, st.text())
    paired = tuple(draw(st.lists(tests, max_size=3)))
    return Results(tuple(rows), draw(counts), draw(words), draw(words), draw(seconds), paired)


SCORES = {
    "bleu": Score(38.9, 1000, "nrefs:1|tok:13a", (37.7, 40.0)),
    "chrf": Score(59.5, 1000, "chrF2", (58.6, 60.4)),
}
RUN = Results(
    rows=(
        Row("teacher", 95_000_000, 380_000_000, 32.0, 79_000_000, SCORES),
        Row("student", 55_630_000, 222_520_000, 32.0, 49_000_000, SCORES),
        Row("post_training", 55_630_000, 26_156_000, 3.76, 49_000_000, SCORES),
        Row("compressed", 55_630_000, 26_153_000, 3.76, 49_000_000, SCORES),
    ),
    seed=1,
    versions={"python": "3.11"},
    hardware={"cores": 2},
    seconds={"teacher": 12.5},
)


# ---------------------------------------------------------------------------------------------- results.json


@given(results())
def test_what_is_written_is_read_back_equal_and_writes_the_same_text(found: Results) -> None:
    text = found.to_json()
    assert Results.from_json(text) == found
    assert Results.from_json(text).to_json() == text


def test_results_have_the_promised_schema() -> None:
    document = json.loads(RUN.to_json())
    assert list(document) == ["rows", "seed", "versions", "hardware", "seconds"]
    for row in document["rows"]:
        promised = ["name", "parameters", "bytes", "bits_per_weight", "int8_gzip_bytes", "scores"]
        assert list(row) == [*promised, "ratio_to_teacher"]
        assert list(row["scores"]["bleu"]) == ["value", "n", "signature", "interval"]
    paired = Paired("student", "bleu", -0.1, 0.4, 1000, 500, "bs:500")
    assert json.loads(replace(RUN, paired=(paired,)).to_json()) == {**document, "paired": [asdict(paired)]}
    assert [row["ratio_to_teacher"] for row in document["rows"]][::3] == [1.0, 380_000_000 / 26_153_000]


def test_save_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "results.json"
    for found in (Results((), 0, {}, {}, {}), RUN):
        found.save(path)
        assert Results.load(path) == found
    assert list(path.parent.iterdir()) == [path]


def test_keys_of_a_later_version_are_passed_over() -> None:
    document = json.loads(RUN.to_json()) | {"energy": 3}
    document["rows"][0]["scores"]["bleu"]["p"] = 0.1
    assert Results.from_json(json.dumps(document)) == RUN


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda d: d.pop("seed"), "seed: Field required"),
        (lambda d: d["rows"][2].pop("bytes"), "rows.2.bytes: Field required"),
        (
            lambda d: d["rows"][1].update(parameters="many"),
            "rows.1.parameters: Input should be a valid integer",
        ),
        (lambda d: d["rows"][1].update(parameters=-1), "rows.1.parameters: Input should be greater"),
        (lambda d: d["rows"][0].update(name="pupil"), "rows.0.name: Input should be 'teacher', 'student'"),
        (lambda d: d["rows"][0]["scores"]["bleu"].update(interval=[1]), "rows.0.scores.bleu.interval.1"),
    ],
)
def test_a_malformed_file_is_refused_and_the_field_named(break_it, named: str) -> None:  # type: ignore[no-untyped-def]
    document = json.loads(RUN.to_json())
    break_it(document)
    with pytest.raises(DataError, match="results: .*" + named.replace(".", r"\.")):
        Results.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", "[]", RUN.to_json()[:-10]])
def test_what_is_no_results_file_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="results"):
        Results.from_json(text)


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        Score(math.nan, 1, "", (0.0, 0.0))


# ---------------------------------------------------------------------------------------------- numbers


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_are_where_the_score_test_turns(pair: tuple[int, int]) -> None:
    correct, n = pair
    low, high = wilson(correct, n)
    assert 0 <= low <= 100 * correct / n <= high <= 100
    for bound in {low / 100, high / 100} - {0.0, 1.0}:
        z = abs(correct / n - bound) / math.sqrt(bound * (1 - bound) / n)
        assert z == pytest.approx(1.959963984540054, rel=1e-5)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(correct: int, n: int) -> None:
    with pytest.raises(DataError, match=f"found {correct} of {n}"):
        wilson(correct, n)


@given(st.integers(0, 10**15))
def test_readable_bytes_keeps_three_digits(count: int) -> None:
    number, unit = readable_bytes(count).split()
    scale = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}[unit]
    assert float(number) * scale == pytest.approx(count, rel=0.00501, abs=0.5)
    assert len(number.replace(".", "")) <= 3 or unit == "GB"


# ---------------------------------------------------------------------------------------------- file parts


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16, 300), nn.Linear(300, 10))


def test_parts_of_a_real_file_add_up_to_it(tmp_path: Path) -> None:
    model = network()
    rules = (
        Rule(method=Uniform(bits=3), kinds=(Kind.CONV, Kind.LINEAR)),
        Rule(method=Dense(), kinds=(Kind.BIAS,)),
    )
    parts = by_kind(save(model, tmp_path, Compressor(model, rules)))
    assert sum(part.bytes for part in parts) == (tmp_path / FILE_NAME).stat().st_size
    assert [part.bytes for part in parts] == sorted((part.bytes for part in parts), reverse=True)
    known = {part.name: part for part in parts}
    assert known["linear"].values == 16 * 300 + 300 * 10
    assert known["linear"].content.keys() == {"codes", "scales, other arrays"}
    assert known["bias"].bytes <= 2 * known["bias"].values
    assert known["norm"].bytes <= 4 * known["norm"].values
    assert sum(part.values or 0 for part in parts) == sum(t.numel() for t in model.state_dict().values())


tensors = st.builds(
    PartSize,
    st.text(),
    st.tuples(st.integers(0, 99)),
    st.sampled_from(["conv", "linear", "bias"]),
    st.sampled_from(["uniform", "dense", "as it is"]),
    st.just(0.0) | st.floats(0, 1e6),
    st.integers(0, 10**6),
)


@given(st.lists(tensors, min_size=1).map(tuple), st.integers(0, 99), st.integers(0, 99), st.integers(0, 10**7))
def test_parts_always_add_up(found: tuple[PartSize, ...], tables: int, header: int, stream: int) -> None:
    total = tables + header + stream + sum(t.arrays for t in found)
    parts = by_kind(Sizes(found, tables, 0, header, total))
    assert sum(part.bytes for part in parts) == total
    assert all(size > 0 for part in parts for size in part.content.values())


# ---------------------------------------------------------------------------------------------- surroundings


def test_versions_and_hardware_say_what_matters_and_who_does_not() -> None:
    assert report.versions()["torch"] == torch.__version__.partition("+")[0]
    found = report.hardware()
    assert found["cores"] >= 1 and found["cpu"] and found["memory_bytes"] > 2**28
    assert len(found["gpus"]) == torch.cuda.device_count()
    text = json.dumps([found, report.versions()])
    assert platform.node() not in text and str(Path.home()) not in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_holds_every_number_at_any_usual_width(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    report.print_table(RUN, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for number in ("95.0 M", "380 MB", "32.00", "1.0", "26.2 MB", "3.76", "14.5", "49.0 MB"):
        assert number in text
    assert text.count("38.90 ±1.1") == text.count("59.50 ±0.9") == 4


def test_a_row_without_a_score_leaves_its_cell_empty() -> None:
    console = Console(file=io.StringIO(), width=120)
    bare = Row("student", 1, 4, 32.0, 2, {})
    report.print_table(Results((bare, RUN.rows[3]), 0, {}, {}, {}), console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("±") == 3  # two scores and the caption


# ---------------------------------------------------------------------------------------------- pictures


def pixels(path: Path) -> dict[str, np.ndarray]:
    """Colour → where it is in the picture [height, width], of those the pictures draw with."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    colours = ("#555555", "#0072B2", "#D55E00", "#999999", "#E69F00")
    return {c: (picture == [int(c[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=2) for c in colours}


def test_training_pictures_are_drawn_from_a_real_log(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            out = self.layer(x).squeeze(1)
            return {"loss": (out - labels).square().mean(), "logits": out}

    rows = [{"x": torch.randn(2), "labels": torch.tensor(1.0)} for _ in range(8)]
    arguments = TrainingArguments(
        str(tmp_path / "run"), num_train_epochs=3, logging_steps=1, eval_strategy="epoch", save_strategy="no",
        per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(Regression(), arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    path = tmp_path / "training.png"
    assert report.plot_training({"teacher": trainer.state.log_history}, path)
    found = pixels(path)
    assert found["#555555"].any() and not found["#D55E00"].any()
    assert Image.open(path).size[0] == 1260


def curve(parts: bool, *, scale: float = 1.0) -> list[dict[str, float]]:
    log = [{"step": s, "epoch": s / 10, "loss": scale * math.exp(-s / 20)} for s in range(1, 41)]
    log = [{**entry, "ce": entry["loss"], "kd": 2 * entry["loss"]} if parts else entry for entry in log]
    return [
        *log,
        {"step": 40, "epoch": 4.0, "eval_bleu": 30.0, "eval_loss": 1.0},
        {"step": 40, "train_loss": 1.0},
    ]


def test_each_stage_and_each_part_of_the_loss_is_drawn(tmp_path: Path) -> None:
    plain, full = tmp_path / "plain.png", tmp_path / "full.png"
    assert report.plot_training({"teacher": curve(False)}, plain)
    assert report.plot_training({"teacher": curve(False), "student": curve(True), "compressed": curve(True)}, full)
    assert Image.open(full).size[1] > 1.5 * Image.open(plain).size[1]  # four panels, not two
    found = pixels(full)
    assert all(found[colour].sum() > 50 for colour in ("#555555", "#0072B2", "#D55E00"))


@pytest.mark.parametrize("curves", [{}, {"teacher": []}, {"teacher": [{"step": 1, "loss": 2.0}]}])
def test_no_point_no_picture(tmp_path: Path, curves: dict[str, list[dict[str, float]]]) -> None:
    assert not report.plot_training(curves, tmp_path / "training.png")
    assert not any(tmp_path.iterdir())


def test_a_diverged_loss_is_drawn_as_a_gap(tmp_path: Path) -> None:
    log = curve(True)
    log[7]["loss"] = math.nan
    log[9]["ce"] = math.inf
    assert report.plot_training({"compressed": log}, tmp_path / "training.png")


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 10), st.integers(1, 10))
def test_bars_are_as_long_as_bytes_are_many(this: int, teacher: int) -> None:
    parts = (
        Part("linear", 10, {"codes": 600 * this, "scales": 300 * this}),
        Part("index", None, {"header": 100 * this}),
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sizes.png"
        report.plot_sizes(parts, path, {"teacher": 1000 * teacher})
        # a bar is at least 20 pixels high, a letter's stroke is not
        found = {colour: (there.sum(axis=0) > 20).sum() for colour, there in pixels(path).items()}
    assert found["#D55E00"] / found["#999999"] == pytest.approx(this / teacher, rel=0.05)


def test_the_same_numbers_give_the_same_pictures(tmp_path: Path) -> None:
    for name in ("a", "b"):
        report.plot_training({"student": curve(True)}, tmp_path / name / "training.png")
        report.plot_sizes((Part("linear", 10, {"codes": 6}),), tmp_path / name / "sizes.png")
    for picture in ("training.png", "sizes.png"):
        assert (tmp_path / "a" / picture).read_bytes() == (tmp_path / "b" / picture).read_bytes()


def test_scores_are_drawn_where_there_are_two(tmp_path: Path) -> None:
    def row(name: str, size: int, value: float) -> Row:
        score = Score(value, 100, "top1", (value - 2, value + 2))
        return Row(name, 1000, size, 8.0, 500, {"accuracy": score})  # type: ignore[arg-type]

    both = Results((row("teacher", 40_000, 93.0), row("compressed", 3_000, 92.0)), 0, {}, {}, {})
    assert report.plot_scores(both, tmp_path / "a.png") and report.plot_scores(both, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    found = {colour: there.any(axis=0).argmax() for colour, there in pixels(tmp_path / "a.png").items()}
    assert found["#D55E00"] < 0.3 * Image.open(tmp_path / "a.png").width  # the small one lies to the left
    assert not report.plot_scores(Results(both.rows[:1], 0, {}, {}, {}), tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_pictures_leave_pyplot_alone(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from hfcompress import report\n"
        "from hfcompress.results import Part\n"
        "report.plot_sizes((Part('linear', 1, {'codes': 5}),), Path(sys.argv[1]), {'teacher': 9})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "sizes.png")], check=True)
