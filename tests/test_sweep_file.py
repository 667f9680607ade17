"""Sweep files: what they may say, the cells they make, and how they are refused."""

from pathlib import Path

import pytest

from hfcompress.errors import ConfigError
from hfcompress.recipe import SHIPPED
from hfcompress.sweep_schema import Point, load_sweep

RECIPE = """\
name: digits
images: {embedded: digits, size: 8, mean: [0.3], std: [0.4]}
teacher: null
student: {timm: lenet_300_100, arguments: {img_size: 8}, training: {max_steps: 2}}
compression:
  rules: [{method: {uniform: {bits: 4}}, kinds: [conv, linear]}]
"""
INLINE = "recipe:\n" + "".join(f"  {line}\n" for line in RECIPE.splitlines())
GRID = """\
grid:
  student:
    one: []
    two: ["student.arguments={img_size: 8, num_classes: 10}"]
  bits:
    2bit: [compression.rules.0.method.uniform.bits=2]
    4bit: [compression.rules.0.method.uniform.bits=4]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_sweep(written(folder, text), overrides)
    return str(error.value)


def bits(cell) -> int:
    return vars(cell.recipe.compression.rules[0].method)["bits"]


def test_a_grid_is_the_product_of_its_axes(tmp_path):
    plan = load_sweep(written(tmp_path, f"title: t\n{INLINE}{GRID}seeds: [3, 4]\n"))
    names = ["one-2bit", "one-4bit", "two-2bit", "two-4bit"]
    assert [cell.name for cell in plan.cells] == [f"{name}.seed-{seed}" for name in names for seed in (3, 4)]
    assert [bits(cell) for cell in plan.cells] == [2, 2, 4, 4] * 2
    assert [cell.recipe.seed for cell in plan.cells] == [3, 4] * 4
    assert plan.cells[5].recipe.name == "digits-two-2bit-seed-4"
    assert [len(cell.recipe.student.arguments) for cell in plan.cells] == [1] * 4 + [2] * 4
    assert [point.series for point in plan.sweep.all_points()] == ["one", "one", "two", "two"]
    named = load_sweep(plan.path, ["lines={'*-2bit': coarse}", "after_training=['two-*']"]).sweep.all_points()
    wanted = ["one, coarse", "one", "two, coarse, after training", "two, after training"]
    assert [point.series for point in named] == wanted


def test_points_come_before_the_grid_and_combinations_can_be_left_out(tmp_path):
    extra = 'points: [{name: plain, row: post_training}]\nleave_out: ["two-2*"]\nafter_training: ["*-4bit"]\n'
    plan = load_sweep(written(tmp_path, f"title: t\n{INLINE}{GRID}{extra}"))
    rows = {point.name: point.row for point in plan.sweep.all_points()}
    assert rows == {
        "plain": "post_training",
        "one-2bit": "compressed",
        "one-4bit": "post_training",
        "two-4bit": "post_training",
    }
    assert plan.sweep.all_points()[0] == Point(name="plain", row="post_training")


def test_the_recipe_may_be_a_file_beside_it_or_a_shipped_one(tmp_path):
    (tmp_path / "base.yaml").write_text(RECIPE)
    points = "points: [{name: a, overrides: [images.train_rows=9]}]\n"
    inline, beside = (load_sweep(written(tmp_path, f"title: t\n{r}\n{points}")) for r in (INLINE, "recipe: base.yaml"))
    assert inline.cells == beside.cells
    shipped = load_sweep(written(tmp_path, f"title: t\nrecipe: cifar10/resnet20\n{points}"))
    assert shipped.cells[0].recipe.teacher.timm == "cifar_resnet56" and shipped.cells[0].recipe.images.train_rows == 9


def test_overrides_of_the_command_line_win_and_may_be_the_sweeps_own(tmp_path):
    path = written(tmp_path, f"title: t\n{INLINE}{GRID}seeds: [0, 1, 2]\n")
    plan = load_sweep(path, ["compression.rules.0.method.uniform.bits=8", "seeds=[7]", "notes=new"])
    assert {bits(cell) for cell in plan.cells} == {8} and {cell.seed for cell in plan.cells} == {7}
    assert plan.sweep.notes == "new" and len(plan.cells) == 4


def test_a_recipe_is_told_from_a_sweep(tmp_path):
    assert "it is run by 'hfcompress run'" in refused(tmp_path, RECIPE)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"title: t\n{INLINE}", "sweep: there is nothing to run: give 'points' or a 'grid'"),
        (f"titel: t\n{INLINE}{GRID}", ":1: sweep: there is no key 'titel'; the nearest is 'title'"),
        (f"title: t\n{GRID}", "sweep: 'recipe' is missing"),
        (f"title: t\n{INLINE}{GRID}seeds: []\n", "seeds: found an empty list, expected at least 1 item(s)"),
        (f"title: t\n{INLINE}{GRID}seeds: [1, 1]\n", "two are called seed '1'"),
        (f"title: t\n{INLINE}{GRID}points: [{{name: one-2bit}}]\n", "two are called point 'one-2bit'"),
        (f"title: t\n{INLINE}points: [{{name: a/b}}]\n", ':9: points.0.name: found "a/b", expected text'),
        (
            f"title: t\n{INLINE}{GRID}paper: [{{label: a, score: 1, source: b, point: c}}]\n",
            "points that are not there",
        ),
        (f"title: t\n{INLINE}{GRID}paper: [{{label: a, score: 1}}]\n", "paper.0: 'source' is missing"),
        (f"title: t\n{INLINE}{GRID}choices: [{{label: a, least_score: 1, paper: b}}]\n", "figures of the paper"),
        (f"title: t\n{INLINE}{GRID}choices: [{{label: a}}]\n", "choices.0: give either 'least_score' or 'most_bytes'"),
        (f"title: t\n{INLINE}{GRID}---\ntitle: u\n", "a sweep is one YAML document, found 2"),
        (f"title: t\nrecipe: nowhere.yaml\n{GRID}", "nowhere.yaml: no such file, nor a shipped recipe's name"),
        (f"title: t\nrecipe: quickstart\n{GRID}", ":2: quickstart holds 2 recipes; name a file of one"),
    ],
)
def test_what_a_sweep_may_not_say(text, told, tmp_path):
    message = refused(tmp_path, text)
    assert told in message and message.startswith((str(tmp_path / "sweep.yaml"), "nowhere.yaml"))


def test_what_is_wrong_with_the_recipe_is_told_with_its_line_once(tmp_path):
    """For four cells of one file."""
    message = refused(tmp_path, f"title: t\n{INLINE.replace('size: 8', 'size: 0')}{GRID}")
    assert message == f"{tmp_path / 'sweep.yaml'}:4: images.size: found 0, expected at least 1"


def test_an_override_is_told_with_its_line(tmp_path):
    grid = GRID.replace("uniform.bits=2", "uniform.bit=2").replace("bits=4", "bits=40")
    lines = refused(tmp_path, f"title: t\n{INLINE}{grid}seeds: [0, 1]\n").split("\n")
    assert len(lines) == 2
    assert f"{tmp_path / 'sweep.yaml'}:14: " in lines[0] and "no key 'bit'; the nearest is 'bits'" in lines[0]
    assert "found 40 (with override 'compression.rules.0.method.uniform.bits=40')" in lines[1]


def test_an_override_of_the_command_line_is_told_as_one(tmp_path):
    message = refused(tmp_path, f"title: t\n{INLINE}{GRID}", "student.tim=x")
    assert "override 'student.tim=x'" in message and "the nearest is 'timm'" in message


@pytest.mark.parametrize("path", sorted((SHIPPED / "papers").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_loads(path):
    plan = load_sweep(path)
    assert plan.cells and plan.sweep.title
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert f"hfcompress sweep recipes/papers/{path.name}" in path.read_text(encoding="utf-8")


def test_the_figures_beside_our_points_are_the_papers():
    """Of the papers' own tables, a few that are easily mistyped."""
    figures = {p.label: p for p in load_sweep(SHIPPED / "papers" / "polino_cifar10.yaml").sweep.paper}
    assert len(figures) == 3 * 11
    assert figures["QD 2 bit, student 1"].score == 82.4 and figures["DQ 4 bit, student 3"].score == 77.36
    assert figures["PM, no bucket 4 bit, student 2"].point == "student2-pm-nobucket-4bit"
    lenet = load_sweep(SHIPPED / "papers" / "epr_lenet300.yaml").sweep.paper
    assert [(figure.bytes, figure.score) for figure in lenet] == [(8560, 98.1)]
