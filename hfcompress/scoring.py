"""`hfcompress evaluate`: several models on one recipe's test or validation split."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

import hfcompress.quantizer  # noqa: F401  (makes compressed folders readable)
from hfcompress.errors import ConfigError
from hfcompress.progress import bar, quiet_libraries
from hfcompress.results import Sample, Score
from hfcompress.schema import Recipe
from hfcompress.tasks import Task, task_of


def score_all(
    models: Sequence[str],
    recipes: Sequence[Recipe],
    name: str | None,
    data_root: Path | None,
    console: Console,
    splits: Sequence[str] = ("test",),
) -> dict[str, dict[str, Any]]:
    """model → {"scores": …, "samples": …} on the first split, with {"also": {split: scores}} where there are more.

    splits: of test and validation. Raises ConfigError: which of several recipes is not said, or unknown.
    """
    quiet_libraries()
    names = [recipe.name for recipe in recipes]
    if name is None and len(recipes) > 1:
        raise ConfigError(f"the file holds several recipes ({', '.join(names)}): say which with --name")
    if name is not None and name not in names:
        raise ConfigError(f"the file has no recipe '{name}'; it has {', '.join(names)}")
    recipe = recipes[0] if name is None else recipes[names.index(name)]
    task = task_of(recipe, data_root)
    scored: dict[str, dict[str, Any]] = {}
    with bar(console) as shown:
        for model in models:
            for split in splits:
                scores, samples = _score(task, model, split, shown, console)
                plain = {metric: asdict(score) for metric, score in scores.items()}
                if model not in scored:
                    scored[model] = {"scores": plain, "samples": [asdict(sample) for sample in samples]}
                else:
                    scored[model].setdefault("also", {})[split] = plain
    return scored


def _score(task: Task, model: str, split: str, shown: Any, console: Console) -> tuple[dict[str, Score], list[Sample]]:
    line = shown.add_task(Path(model).name, total=len(task.rows(split)), note="")

    def progress(done: int, total: int) -> None:
        shown.update(line, completed=done, total=total)

    scores, samples = task.score(model, progress, split)
    metric, main = next(iter(scores.items()))
    note = f"{metric} {main.value:.2f}" + (f" ({split})" if split != "test" else "")
    shown.update(line, note=note)
    if not console.is_terminal:
        console.print(f"{Path(model).name}: {note}", markup=False, highlight=False)
    return scores, samples
