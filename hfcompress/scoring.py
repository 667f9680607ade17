"""`hfcompress evaluate`: several models on one recipe's test or validation split."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import cached_file

from hfcompress import zoo
from hfcompress.checkpoint import FILE_NAME, read
from hfcompress.data import label_names
from hfcompress.errors import ConfigError, DataError, FormatError
from hfcompress.networks import check_classifier, from_pretrained
from hfcompress.progress import bar, quiet_libraries
from hfcompress.quantizer import check_model
from hfcompress.results import Sample, Score
from hfcompress.schema import Recipe
from hfcompress.sealed import FORMAT
from hfcompress.tasks import Images, Task, task_of

_DENSE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

Scored = dict[str, dict[str, Any]]
"""Model → {"scores": …, "samples": …} on the first split, with {"also": {split: scores}} where there are more."""


def score_all(
    models: Sequence[str],
    recipes: Sequence[Recipe],
    name: str | None,
    data_root: Path | None,
    console: Console,
    splits: Sequence[str] = ("test",),
) -> Iterator[Scored]:
    """All that has been scored so far, whenever there is more. Every model is checked before the first is scored.

    splits: of test and validation. Raises ConfigError: which of several recipes is not said, or unknown; DataError,
    FormatError: a model cannot be opened, or is not for such a recipe.
    """
    quiet_libraries()
    task = task_of(_chosen(recipes, name), data_root)
    models = list(dict.fromkeys(models))
    for model in models:
        check(task, model)
    labels, scored = told_apart(models), Scored()
    with bar(console) as shown:
        for model in models:
            for split in splits:
                scores, samples = _score(task, model, labels[model], split, shown, console)
                plain = {metric: asdict(score) for metric, score in scores.items()}
                if model not in scored:
                    scored[model] = {"scores": plain, "samples": [asdict(sample) for sample in samples]}
                else:
                    scored[model].setdefault("also", {})[split] = plain
                yield scored


def check(task: Task, model: str) -> None:
    """Raises DataError, FormatError unless the model, a folder or a repository, can be scored: its config makes a
    network of the task's kind, its weights are there, and if they are compressed, whole and the network's.
    """
    zoo.register()
    auto = AutoModelForImageClassification if isinstance(task, Images) else AutoModelForSeq2SeqLM
    config = from_pretrained(AutoConfig, model)
    try:
        with torch.device("meta"):
            network = auto.from_config(config)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{model} is of another kind: {auto.__name__} cannot make it ({reason})") from error
    if isinstance(task, Images):
        check_classifier(model, network, label_names(task.splits))
    else:
        from_pretrained(AutoTokenizer, model)
    quantization = getattr(config, "quantization_config", None) or {}
    if quantization.get("quant_method") != FORMAT:
        _weights(model, _DENSE)
        return
    file = _weights(model, (FILE_NAME,))
    network.tie_weights()
    reader = read(file)
    try:
        check_model(network, reader)
    except FormatError as error:
        raise type(error)(f"{file}: {error}") from error


def told_apart(models: Sequence[str]) -> dict[str, str]:
    """Each model → the last name of its path, or as many of the last as no other has."""
    parts = {model: Path(model).parts or (model,) for model in models}
    labels = {}
    for model, own in parts.items():
        others = [other for name, other in parts.items() if name != model]
        lengths = (n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others))
        labels[model] = str(Path(*own[-next(lengths, len(own)) :]))
    return labels


def _chosen(recipes: Sequence[Recipe], name: str | None) -> Recipe:
    names = [recipe.name for recipe in recipes]
    if name is None and len(recipes) > 1:
        raise ConfigError(f"the file holds several recipes ({', '.join(names)}): say which with --name")
    if name is not None and name not in names:
        raise ConfigError(f"the file has no recipe '{name}'; it has {', '.join(names)}")
    return recipes[0] if name is None else recipes[names.index(name)]


def _weights(model: str, names: Sequence[str]) -> Path:
    """The first of these files that the model has; a repository's is fetched. Raises DataError: none."""
    for name in names:
        try:
            return Path(str(cached_file(model, name)))
        except OSError as error:
            reason = str(error).strip().partition("\n")[0]
    raise DataError(f"{model} has none of {', '.join(names)}: {reason}")


def _score(
    task: Task, model: str, label: str, split: str, shown: Any, console: Console
) -> tuple[dict[str, Score], list[Sample]]:
    line = shown.add_task(label, total=len(task.rows(split)), note="")

    def progress(done: int, total: int) -> None:
        shown.update(line, completed=done, total=total)

    scores, samples = task.score(model, progress, split)
    metric, main = next(iter(scores.items()))
    note = f"{metric} {main.value:.2f}" + (f" ({split})" if split != "test" else "")
    shown.update(line, note=note)
    if not console.is_terminal:
        console.print(f"{label}: {note}", markup=False, highlight=False)
    return scores, samples
