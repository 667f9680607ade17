"""The recipes for translation that are shipped: each can be read, and runs as it is, offline and tiny."""

import re
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from hfcompress.dry_run import dry_run
from hfcompress.passes import Passes
from hfcompress.recipe import SHIPPED, available, load
from hfcompress.schema import Network, Recipe
from hfcompress.sweep_schema import load_sweep
from hfcompress.tasks import Translation

TINY = ("d_model=32", "encoder_ffn_dim=32", "decoder_ffn_dim=32", "encoder_attention_heads=4")


def recipes() -> dict[str, list[Recipe]]:
    """By name: the recipes of a file, or those of a sweep's cells."""
    found = {}
    for entry in available():
        sweep = entry.description.startswith("sweep: ")
        found[entry.name] = [cell.recipe for cell in load_sweep(entry.path).cells] if sweep else load(entry.path)
    return {name: of for name, of in found.items() if any(recipe.translation for recipe in of)}


RECIPES = recipes()


def small(*networks: str) -> list[str]:
    return [f"{network}.marian.{field}" for network in networks for field in TINY]


def rehearsed(recipe: Recipe) -> str:
    console = Console(width=200, record=True, file=StringIO())
    dry_run(recipe, None, console)
    return console.export_text()


def test_all_that_there_are() -> None:
    wmt = {"wmt13_de_en", "wmt14_en_de", "wmt16_ro_en", "wmt19_en_de"}
    own = {f"{folder}/{name}" for folder in ("multi30k", "tatoeba") for name in ("pipeline", "curve")}
    assert RECIPES.keys() >= {*wmt, *own, "opus_mt/tiny", "opus_mt/base", "papers/polino_nmt"}


@pytest.mark.parametrize("name", RECIPES)
def test_each_says_how_it_is_run(name: str) -> None:
    path = SHIPPED / f"{name}.yaml"
    text = path.read_text(encoding="utf-8")
    if name != "quickstart":
        assert re.search(rf"^# +hfcompress (run|sweep) recipes/{name}\.yaml", text, re.MULTILINE)
    for recipe in RECIPES[name]:
        data = recipe.translation
        if data is not None and data.hub is not None and data.folder is None:
            assert "Not run. Estimates:" in text and "torchrun --nproc_per_node" in text and "--dry-run" in text


def test_from_scratch_with_the_teachers_translations_and_its_cache(monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    (recipe,) = load(SHIPPED / "tatoeba/pipeline.yaml", small("teacher", "student"))
    said = rehearsed(recipe)
    assert "translating" in said and "teacher's cache" in said and "compressed: training" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["opus_mt/base", "opus_mt/tiny"])
def test_teachers_of_the_hub_are_small_random_ones(name: str) -> None:
    (recipe,) = load(SHIPPED / f"{name}.yaml", small("student") if name == "opus_mt/tiny" else ())
    said = rehearsed(recipe)
    assert "compressed: training" in said and "the sentences are Babel's" in said
    assert ("decoder layers 0, 5 of 6" in said) == (name == "opus_mt/base")


@pytest.mark.parametrize("name", ["wmt19_en_de"])
def test_streamed_text_is_streamed(name: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Students read the teacher's translations as a stream."""
    taken = []
    train_on = Translation.train_on
    monkeypatch.setattr(Translation, "train_on", lambda task, pairs: (train_on(task, pairs), taken.append(task.train)))
    (recipe,) = load(SHIPPED / f"{name}.yaml", small("student"))
    assert "compressed: training" in rehearsed(recipe)
    assert [type(rows) for rows in taken] == [Passes]


@pytest.mark.parametrize("name", ["str_imagenet_resnet50"])
def test_streamed_images_are_streamed(name: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """The recipes as they are, but for a small network."""
    networks = {"teacher": None, "student": Network(timm="test_resnet", training={"max_steps": 9})}
    recipe = load_sweep(SHIPPED / f"papers/{name}.yaml").cells[0].recipe
    assert recipe.images is not None and recipe.images.streaming
    assert "the images are random" in rehearsed(replace(recipe, **networks))
