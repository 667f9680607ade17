"""What a recipe cannot have together with a streamed training split."""

from collections.abc import Iterator
from typing import Any

from hfcompress.schema import Recipe

Fault = tuple[tuple[str, ...], str]
"""(where in the recipe, what is wrong there)"""


def stream_faults(recipe: Recipe) -> Iterator[Fault]:
    """All that a streamed training split does not allow; nothing where it is not streamed."""
    task = "translation" if recipe.translation is not None else "images"
    data = recipe.translation or recipe.images
    if data is None or not data.streaming:
        return
    if recipe.distillation.cache is not None:
        yield ("distillation", "cache"), _needs("the teacher is asked about each of them before training")
    layers = recipe.student.from_teacher
    if layers is not None and layers.trim_vocabulary:
        yield ("student", "from_teacher", "trim_vocabulary"), _needs("it keeps the tokens that they need")
    for stage, settings in _trained(recipe):
        if settings.get("max_steps", -1) <= 0:
            yield (
                (task, "streaming"),
                f"give 'max_steps' in the settings of the stage '{stage}': a stream has no known length",
            )
    for address in (("training",), ("teacher", "training"), ("student", "training"), ("compression", "training")):
        if (_at(recipe, address) or {}).get("train_sampling_strategy") == "group_by_length":
            yield (*address, "train_sampling_strategy"), _needs("rows are grouped by all lengths", "group_by_length: ")


def _needs(why: str, what: str = "") -> str:
    return f"{what}needs all training rows ({why}), which are not there with 'streaming: true'"


def _at(recipe: Recipe, address: tuple[str, ...]) -> Any:
    found: Any = recipe
    for name in address:
        found = getattr(found, name) if found is not None else None
    return found


def _trained(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stages that are trained, with their settings."""
    common, student = recipe.training, recipe.student.training
    if recipe.teacher is not None and recipe.teacher.training is not None:
        yield "teacher", {**common, **recipe.teacher.training}
    as_it_is = recipe.teacher is None and (recipe.student.pretrained or recipe.student.weights) is not None
    if student is not None or not as_it_is:
        yield "student", {**common, **(student or {})}
    yield "compressed", {**common, **(student or {}), **(recipe.compression.training or {})}
