"""Whether a recipe can be run: everything is built, two steps of each training are taken, nothing is kept."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from rich.console import Console

from hfcompress import callbacks, teaching, zoo
from hfcompress.data import Splits, is_local
from hfcompress.errors import ConfigError
from hfcompress.progress import quiet_libraries
from hfcompress.run import Run
from hfcompress.schema import Filters, ImageData, Network, Recipe, Scalar, TranslationData, Vocabulary
from hfcompress.tasks import Images, Task, task_of

_BATCH = 4
_ROWS = 2 * _BATCH
_TOKENS = 400
_SENTENCES = TranslationData(embedded="cldr", source="de", target="en")
_MARIAN: dict[str, Scalar] = {
    "d_model": 32,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
_QUICK = {
    "max_steps": 2,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "dataloader_num_workers": 0,
    "dataloader_persistent_workers": False,
    "gradient_accumulation_steps": 1,
}


def dry_run(recipe: Recipe, data_root: Path | None, console: Console) -> None:
    """Build a recipe's networks and rules, and take two optimizer steps of each stage that is trained.

    Nothing is fetched from the Hub: images that are not in a folder here are random ones of the right shape, sentences
    are Babel's names of days and countries; a timm model of the Hub has random weights, a translation model of the Hub
    is a small random Marian of six layers a side. Raises whatever would stop the run.
    """
    quiet_libraries()
    data = recipe.translation or recipe.images
    assert data is not None
    here = data.embedded is not None or (
        data.folder is not None and (Path(data_root or ".") / data.folder).is_dir() and is_local(data, data_root)
    )
    if recipe.translation is not None and not here:
        console.print(f"{recipe.name}: the sentences are Babel's", markup=False, highlight=False)
        recipe = replace(recipe, translation=replace(_SENTENCES, streaming=recipe.translation.streaming))
        here = True
    if recipe.translation is not None and here:
        _foresee(recipe, data_root, console)
    small = _small(recipe, here)
    task: Task
    if here:
        task = task_of(small, data_root)
    else:
        assert small.images is not None
        console.print(f"{recipe.name}: the images are random", markup=False, highlight=False)
        task = Images(small, small.images, data_root, random_images(small.images, _classes(small)))
    with TemporaryDirectory() as folder, _without_targets():
        Run(small, Path(folder) / "run", data_root=data_root, console=console).train(task)
    console.print(f"{recipe.name}: can be run", markup=False, highlight=False)


@contextmanager
def _without_targets() -> Iterator[None]:
    """Within, nothing is said of targets that are missed: two steps reach none."""
    said = logging.getLogger(callbacks.__name__)
    said.disabled = True
    try:
        yield
    finally:
        said.disabled = False


def _foresee(recipe: Recipe, data_root: Path | None, console: Console) -> None:
    """What the small run leaves out. A package may be missing only on this machine: that is said, not raised."""
    try:
        teaching.foresee(recipe.distillation, data_root)
    except ConfigError as error:
        console.print(f"{recipe.name}: on this machine the run would stop: {error}", markup=False, highlight=False)


def random_images(data: ImageData, classes: int) -> Splits:
    """Splits of a few rows of noise."""
    draw = np.random.default_rng(0)
    shape = (data.size, data.size) if len(data.mean) == 1 else (data.size, data.size, 3)

    def rows(count: int) -> Dataset:
        images = [draw.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)]
        labels = draw.integers(0, classes, count).tolist()
        features = Features({"image": Image(), "label": ClassLabel(num_classes=classes)})
        return Dataset.from_dict({"image": images, "label": labels}, features=features)

    return Splits(rows(_ROWS), rows(_BATCH), rows(_BATCH))


def _small(recipe: Recipe, here: bool) -> Recipe:
    """The same recipe, two steps long and over a few rows; networks of the Hub only by their architectures."""
    batch = min(_BATCH, int(recipe.training.get("per_device_train_batch_size", _BATCH)))
    quick: dict[str, Any] = {**_QUICK, "per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
    if (
        not torch.cuda.is_available()
    ):  # most CPUs imitate half precision, which takes minutes where float32 takes seconds
        quick |= {"bf16": False, "fp16": False}

    def shorter(settings: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if settings is None else {**settings, **quick}

    def network(given: Network) -> Network:
        found = replace(given, training=shorter(given.training))
        return _without_hub(found) if recipe.images is not None else _small_marian(found)

    changes: dict[str, Any] = {}
    teaching = recipe.distillation
    if recipe.translation is not None:
        if network(recipe.first).marian is not None:
            changes["vocabulary"] = replace(recipe.vocabulary or Vocabulary(size=_TOKENS), size=_TOKENS)
        soon: dict[str, Any] = {"engine": "transformers", "monolingual": None, "max_new_tokens": 8}
        sequences = teaching.sequences and replace(teaching.sequences, **soon, filters=Filters(least_score=-1e9))
        # a teacher of random weights translates nothing
        changes["distillation"] = replace(teaching, least_bleu=0.0, sequences=sequences)
    for name in ("translation", "images"):
        data = getattr(recipe, name)
        if data is not None and here:
            changes[name] = replace(data, train_rows=min(data.train_rows or 200, 200), test_rows=_BATCH)
    return replace(
        recipe,
        teacher=network(recipe.teacher) if recipe.teacher else None,
        student=network(recipe.student),
        training={**recipe.training, **quick},
        compression=replace(recipe.compression, training=shorter(recipe.compression.training)),
        **changes,
    )


def _small_marian(network: Network) -> Network:
    """A translation model of the Hub as a small one of random weights; one in a folder as it is."""
    if network.pretrained is None or Path(network.pretrained).is_dir():
        return network
    return replace(network, pretrained=None, revision=None, marian=_MARIAN)


def _without_hub(network: Network) -> Network:
    """timm's architecture of a model on the Hub, with random weights."""
    name = network.pretrained
    if name is None or Path(name).is_dir():
        return network
    if not name.startswith("timm/"):
        raise ConfigError(f"{name}: without the Hub only timm's own models can be built")
    architecture = name.removeprefix("timm/").partition(".")[0]
    # weights= would be looked for; training=None would then mean "as it is", which random weights are not
    return replace(network, pretrained=None, revision=None, timm=architecture)


def _classes(recipe: Recipe) -> int:
    """As many as the first network knows."""
    zoo.register()
    network = recipe.first
    given = network.arguments.get("num_classes")
    if given is not None or network.timm is None or not timm.is_model(network.timm):
        return int(given or 10)
    config = timm.get_pretrained_cfg(network.timm, allow_unregistered=True)
    return int(config.num_classes) if config is not None and network.timm not in zoo.ARCHITECTURES else 10
