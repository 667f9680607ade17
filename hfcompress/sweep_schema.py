"""What a sweep file may say: a base recipe, the points to run it at, the seeds, and the paper's figures.

recipe + overrides of a point + a seed = a cell: one run in its own folder
points ∪ (axis × axis × …) = the rows of the table, each the mean over the seeds
"""

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass as plain
from dataclasses import field, fields
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from hfcompress.errors import ConfigError
from hfcompress.recipe import find, parse_value, resolve
from hfcompress.recipe_checks import explain
from hfcompress.schema import STRICT, Recipe
from hfcompress.yaml_lines import Address, Document, Place, read, refuse

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # a folder's name
Overrides = tuple[str, ...]  # as on the command line: section.key=value


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Point:
    """A row of the table: overrides of the recipe, run once a seed.

    `row`: which of the run's compressed students it is about. `series`: points of one series make a line in the plot.
    """

    name: Name
    overrides: Overrides = ()
    row: Literal["compressed", "post_training"] = "compressed"
    series: str = ""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PaperFigure:
    """A figure that the paper gives, in the table beside the `point` of that name, and in the plot."""

    label: str
    score: float
    bytes: int | None = Field(default=None, ge=1)
    point: str | None = None
    source: str = Field(min_length=1)  # where it was read


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Choice:
    """An operating point, chosen by the validation split's scores: the smallest file of at least `least_score`, or
    the best score of at most `most_bytes`, among the points whose names match. `paper`: a figure's label, beside it.
    """

    label: str
    least_score: float | None = None
    most_bytes: int | None = Field(default=None, ge=1)
    among: str = "*"
    paper: str | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.least_score is None) == (self.most_bytes is None):
            raise ValueError("give either 'least_score' or 'most_bytes'")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sweep:
    """A grid of runs and what their results are held against. `recipe`: a path (from the sweep's folder), a shipped
    recipe's name, or a recipe's own sections. `grid`: axis → label → overrides; `leave_out`: names of combinations,
    with shell wildcards, that are not run; `lines`: such names → how their line in the plot is called, after the labels
    of all axes but the last; `after_training`: those of which the student that was compressed after its training is
    what counts. `metric`: the one that counts; null: the task's first.
    """

    title: str
    notes: str = ""
    recipe: str | dict[str, Any]
    points: tuple[Point, ...] = ()
    grid: dict[str, dict[Name, Overrides]] = field(default_factory=dict)
    leave_out: tuple[str, ...] = ()
    lines: dict[str, str] = field(default_factory=dict)
    after_training: tuple[str, ...] = ()
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    metric: Literal["accuracy", "bleu", "chrf"] | None = None
    choices: tuple[Choice, ...] = ()
    paper: tuple[PaperFigure, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [point.name for point in self.all_points()]
        if not names:
            raise ValueError("there is nothing to run: give 'points' or a 'grid'")
        for what, found in (("point", names), ("seed", [str(seed) for seed in self.seeds])):
            twice = next((name for name in found if found.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"two are called {what} '{twice}'")
        unknown = {figure.point for figure in self.paper} - {None, *names}
        if unknown:
            raise ValueError(f"the paper's figures name points that are not there: {', '.join(map(str, unknown))}")
        unknown = {choice.paper for choice in self.choices} - {None, *(figure.label for figure in self.paper)}
        if unknown:
            raise ValueError(f"choices name figures of the paper that are not there: {', '.join(map(str, unknown))}")
        return self

    def all_points(self) -> tuple[Point, ...]:
        """Those listed, then those of the grid, its last axis the fastest: a line of the plot, trained or not."""
        made = []
        for labels in product(*self.grid.values()) if self.grid else ():
            name = "-".join(labels)
            if not any(fnmatchcase(name, pattern) for pattern in self.leave_out):
                overrides = [text for axis, label in zip(self.grid.values(), labels) for text in axis[label]]
                after = any(fnmatchcase(name, pattern) for pattern in self.after_training)
                line = next((line for pattern, line in self.lines.items() if fnmatchcase(name, pattern)), "")
                series = ["-".join(labels[:-1]), line, "after training" if after else ""]
                made.append(
                    Point(
                        name=name,
                        overrides=tuple(overrides),
                        row="post_training" if after else "compressed",
                        series=", ".join(part for part in series if part),
                    )
                )
        return (*self.points, *made)


@plain(frozen=True)
class Cell:
    """One run of a sweep."""

    point: Point
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.point.name}.seed-{self.seed}"


@plain(frozen=True)
class Plan:
    """A sweep and its cells: seeds go round within a point."""

    path: Path
    sweep: Sweep
    cells: tuple[Cell, ...]


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a sweep file. Overrides of the sweep's own keys (`seeds=[0, 1]`) change those; all others, the
    recipe of every cell, after the point's own.

    Raises ConfigError: one message with a line for each fault, each with its file and line, or its override.
    """
    documents = read(path)
    if isinstance(tree := documents[0].tree, dict) and "student" in tree and "recipe" not in tree:
        raise ConfigError(f"{path}: this is a recipe, not a sweep of recipes: it is run by 'hfcompress run'")
    if len(documents) > 1:
        raise ConfigError(f"{path}: a sweep is one YAML document, found {len(documents)}")
    document, (ours, theirs) = documents[0], _sorted(overrides, path)
    for key, text, place in ours:
        if isinstance(document.tree, dict):
            document.put(document.tree, (key,), parse_value(text, place), place)
    try:
        sweep = TypeAdapter(Sweep).validate_json(json.dumps(document.tree))
    except ValidationError as error:
        refuse(explain(error, document, root=Sweep))
        raise
    base, seeds = _base(sweep, document, path), document.place(("seeds",))
    cells: list[Cell] = []
    refused: list[str] = []
    for point in sweep.all_points():
        changes = [*_placed(point, document), *theirs]
        try:
            cells += [Cell(point, seed, _recipe(base, point, seed, changes, seeds)) for seed in sweep.seeds]
        except ConfigError as error:
            refused += str(error).split("\n")
    if refused:
        raise ConfigError("\n".join(dict.fromkeys(refused)))
    return Plan(path, sweep, tuple(cells))


def _sorted(overrides: Sequence[str], path: Path) -> tuple[list[tuple[str, str, Place]], list[tuple[str, Place]]]:
    """The overrides of the sweep's own keys as (key, value, place), and those of the recipe."""
    own = {field.name for field in fields(Sweep)}
    ours, theirs = [], []
    for text in overrides:
        key, _, value = text.partition("=")
        place = Place(str(path), override=text)
        if key in own:
            ours.append((key, value, place))
        else:
            theirs.append((text, place))
    return ours, theirs


def _base(sweep: Sweep, document: Document, path: Path) -> Document:
    """The recipe that all cells share, as a document."""
    if isinstance(sweep.recipe, dict):
        length = len(("recipe",))
        places = {key[length:]: place for key, place in document.places.items() if key[:length] == ("recipe",)}
        return Document(document.at("recipe"), places)
    beside = path.parent / sweep.recipe
    found = read(beside if beside.is_file() else find(sweep.recipe))
    if len(found) > 1:
        raise ConfigError(
            f"{document.place(('recipe',))}: {sweep.recipe} holds {len(found)} recipes; name a file of one"
        )
    return found[0]


def _placed(point: Point, document: Document) -> Iterator[tuple[str, Place]]:
    """The point's overrides, each with its place in the sweep's file."""
    where: dict[str, Address] = {}
    for address in document.places:
        value = document.tree
        for step in address:
            value = value[step]
        if isinstance(value, str) and address[0] in ("points", "grid"):
            where.setdefault(value, address)
    for text in point.overrides:
        place = document.place(where.get(text, ("points",)))
        yield text, Place(place.file, place.line, override=text)


def _recipe(base: Document, point: Point, seed: int, changes: Sequence[tuple[str, Place]], seeds: Place) -> Recipe:
    name = f"name={base.at('name')}-{point.name}-seed-{seed}"
    document = Document(deepcopy(base.tree), dict(base.places))
    (recipe,) = resolve([document], [*changes, (name, seeds), (f"seed={seed}", seeds)])
    return recipe
