"""`hfcompress evaluate`: several models on one recipe's test split."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

import hfcompress.quantizer  # noqa: F401  (makes compressed folders readable)
from hfcompress.errors import ConfigError
from hfcompress.progress import bar, quiet_libraries
from hfcompress.schema import Recipe
from hfcompress.tasks import task_of


def score_all(
    models: Sequence[str],
    recipes: Sequence[Recipe],
    name: str | None,
    data_root: Path | None,
    console: Console,
) -> dict[str, dict[str, Any]]:
    """model → {"scores": …, "samples": …}. Raises ConfigError: which of several recipes is not said, or unknown."""
    quiet_libraries()
    names = [recipe.name for recipe in recipes]
    if name is None and len(recipes) > 1:
        raise ConfigError(f"the file holds several recipes ({', '.join(names)}): say which with --name")
    if name is not None and name not in names:
        raise ConfigError(f"the file has no recipe '{name}'; it has {', '.join(names)}")
    recipe = recipes[0] if name is None else recipes[names.index(name)]
    task = task_of(recipe, data_root)
    scored = {}
    with bar(console) as shown:
        for model in models:
            line = shown.add_task(Path(model).name, total=len(task.splits.test), note="")

            def progress(done: int, total: int, line: Any = line) -> None:
                shown.update(line, completed=done, total=total)

            scores, samples = task.score(model, progress)
            metric, main = next(iter(scores.items()))
            note = f"{metric} {main.value:.2f}"
            shown.update(line, note=note)
            if not console.is_terminal:
                console.print(f"{Path(model).name}: {note}", markup=False, highlight=False)
            scored[model] = {
                "scores": {metric: asdict(score) for metric, score in scores.items()},
                "samples": [asdict(sample) for sample in samples],
            }
    return scored
