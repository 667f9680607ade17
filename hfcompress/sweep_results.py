"""What a sweep found: a record for each cell, read from its folder, and what the seeds of a point have in common."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml

from hfcompress.files import write_atomically
from hfcompress.measure import scores_of
from hfcompress.output import RECIPE, RESULTS, VALIDATION
from hfcompress.recipe import dump, load
from hfcompress.recipe_checks import show
from hfcompress.results import METRICS, Results, Row, Score
from hfcompress.sweep_schema import Cell, Choice, PaperFigure, Plan

Status = Literal["done", "failed", "not run"]


@dataclass(frozen=True)
class CellRecord:
    """One run. `row` is the point's student, `reference` the same network in full precision, both as scored on the
    test split; `validation`, `reference_validation`: their scores on the validation split. Where `status` is not "done"
    they are None; `error` says in one line why a cell failed.
    """

    seed: int
    status: Status
    row: Row | None = None
    reference: Row | None = None
    validation: dict[str, Score] | None = None
    reference_validation: dict[str, Score] | None = None
    teacher: Row | None = None
    error: str = ""
    hardware: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    seconds: dict[str, float] | None = None
    otherwise: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mean:
    """The mean over `n` seeds, and their standard deviation (of a sample; None of one seed)."""

    mean: float
    sd: float | None
    n: int

    def show(self, digits: int, thousands: bool = False) -> str:
        form = f"{',' if thousands else ''}.{digits}f"
        return f"{self.mean:{form}}" + (f" ± {self.sd:{form}}" if self.sd is not None else "")


@dataclass(frozen=True)
class PointRecord:
    """A row of the table."""

    name: str
    series: str
    overrides: tuple[str, ...]
    cells: tuple[CellRecord, ...]

    @property
    def done(self) -> list[CellRecord]:
        return [cell for cell in self.cells if cell.status == "done"]

    @property
    def bytes(self) -> Mean | None:
        """Of the file."""
        return mean([cell.row.bytes for cell in self.done if cell.row])

    @property
    def ratio(self) -> Mean | None:
        """How many times smaller the file is than the same network in full precision."""
        return mean([c.reference.bytes / c.row.bytes for c in self.done if c.row and c.reference])

    def score(self, metric: str, split: Literal["test", "validation"]) -> Mean | None:
        found = [cell.row.scores if split == "test" else cell.validation for cell in self.done if cell.row]
        return mean([scores[metric].value for scores in found if scores and metric in scores])

    def reference_score(self, metric: str) -> Mean | None:
        """Of the same network in full precision, on the test split."""
        return mean([c.reference.scores[metric].value for c in self.done if c.reference])


@dataclass(frozen=True)
class SweepResults:
    """All that a sweep found; results.json holds this, the means beside each point."""

    title: str
    notes: str
    metric: str
    points: tuple[PointRecord, ...]
    choices: tuple[Choice, ...]
    paper: tuple[PaperFigure, ...]

    @property
    def complete(self) -> bool:
        return all(cell.status == "done" for point in self.points for cell in point.cells)

    @property
    def failed(self) -> int:
        return sum(cell.status == "failed" for point in self.points for cell in point.cells)

    def chosen(self, choice: Choice) -> PointRecord | None:
        """The operating point, by the validation split alone; None where no point (with all its seeds) will do."""
        able = []
        for point in self.points:
            score, size = point.score(self.metric, "validation"), point.bytes
            if score is None or size is None or len(point.done) < len(point.cells):
                continue
            if fnmatchcase(point.name, choice.among) and _allowed(choice, score.mean, size.mean):
                able.append((point, score.mean, size.mean))
        if choice.least_score is not None:
            return min(able, key=lambda found: (found[2], -found[1]), default=(None,))[0]
        return max(able, key=lambda found: (found[1], -found[2]), default=(None,))[0]

    def save(self, path: Path) -> None:
        """Write results.json."""
        document = asdict(self)
        for record, point in zip(document["points"], self.points):
            means = {"bytes": point.bytes, "ratio": point.ratio, "validation": point.score(self.metric, "validation")}
            means |= {"test": point.score(self.metric, "test"), "reference": point.reference_score(self.metric)}
            record["mean"] = {name: asdict(of) if of else None for name, of in means.items()}
        for record, choice in zip(document["choices"], self.choices):
            found = self.chosen(choice)
            record["point"] = found.name if found else None
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(path, text.encode())


def _allowed(choice: Choice, score: float, size: float) -> bool:
    if choice.least_score is not None:
        return score >= choice.least_score
    assert choice.most_bytes is not None
    return size <= choice.most_bytes


def mean(values: Sequence[float]) -> Mean | None:
    """None of nothing."""
    n = len(values)
    if not n:
        return None
    middle = math.fsum(values) / n
    spread = math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (n - 1)) if n > 1 else None
    return Mean(middle, spread, n)


def gather(plan: Plan, folder: Path) -> SweepResults:
    """What is in the folders of the plan's cells. `folder`: the sweep's."""
    points = [
        PointRecord(
            point.name,
            point.series,
            point.overrides,
            tuple(read_cell(cell, folder) for cell in plan.cells if cell.point == point),
        )
        for point in plan.sweep.all_points()
    ]
    metrics = [m for m in METRICS if any(c.row and m in c.row.scores for p in points for c in p.cells)]
    metric: str = plan.sweep.metric or (metrics[0] if metrics else "accuracy")
    sweep = plan.sweep
    return SweepResults(sweep.title, sweep.notes, metric, tuple(points), sweep.choices, sweep.paper)


def cell_folder(cell: Cell, folder: Path) -> Path:
    return folder / "cells" / cell.point.name / f"seed-{cell.seed}"


def error_file(cell: Cell, folder: Path) -> Path:
    """Where it is kept why the cell failed."""
    return folder / "logs" / f"{cell.name}.error"


def read_cell(cell: Cell, folder: Path) -> CellRecord:
    """Raises DataError: a results.json that no run wrote."""
    place, error = cell_folder(cell, folder), error_file(cell, folder)
    if error.is_file():
        return CellRecord(cell.seed, "failed", error=error.read_text(encoding="utf-8").strip())
    if not (place / RESULTS).is_file() or not (place / VALIDATION).is_file():
        return CellRecord(cell.seed, "not run")
    results = Results.load(place / RESULTS)
    found = json.loads((place / VALIDATION).read_text(encoding="utf-8"))
    return CellRecord(
        cell.seed,
        "done",
        row=results.row(cell.point.row),
        reference=results.row("student"),
        validation=scores_of(found[cell.point.row]),
        reference_validation=scores_of(found["student"]),
        teacher=results.row("teacher"),
        hardware=results.hardware,
        versions=results.versions,
        seconds=results.seconds,
        otherwise=_otherwise(cell, place),
    )


def _otherwise(cell: Cell, place: Path) -> tuple[str, ...]:
    """Each as an override that makes the plan's setting the run's. Raises ConfigError: a recipe that no run wrote."""
    (ran,) = load(place / RECIPE)
    found, planned = (_leaves("", yaml.safe_load(dump(recipe))) for recipe in (ran, cell.recipe))
    keys = dict.fromkeys([*planned, *found])
    return tuple(f"{key}={show(found.get(key))}" for key in keys if found.get(key) != planned.get(key))


def _leaves(key: str, node: Any) -> dict[str, Any]:
    """Dotted keys of a recipe's tree, and their values."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        return {key: node}
    return {at: leaf for step, item in items for at, leaf in _leaves(f"{key}.{step}".lstrip("."), item).items()}
