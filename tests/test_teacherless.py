"""Recipes without a teacher: the full-precision student is the reference, trained or as it was given."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from small import equal, weights

from hfcompress import Uniform, load, zoo
from hfcompress.dry_run import dry_run, random_images
from hfcompress.errors import ConfigError
from hfcompress.output import VALIDATION
from hfcompress.recipe import dump
from hfcompress.recipe import load as load_recipes
from hfcompress.reparameterization import Kind
from hfcompress.results import Results
from hfcompress.run import Run
from hfcompress.schema import (
    Compression,
    Distillation,
    ImageData,
    Layers,
    Network,
    Recipe,
    Rule,
    TranslationData,
    Vocabulary,
)
from hfcompress.stages import fingerprints
from hfcompress.tasks import task_of

STAGES = ("student", "post_training", "compressed")
RULES = (Rule(method=Uniform(bits=3), kinds=(Kind.CONV, Kind.LINEAR)),)
TINY = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16}
QUICK = {"max_steps": 2, "per_device_train_batch_size": 16, "eval_strategy": "no"}


def recipe(**changes):
    data = {"embedded": "digits", "size": 8, "mean": (0.3,), "std": (0.4,), "train_rows": 64, "test_rows": 20}
    sections = {
        "images": ImageData(**data),
        "teacher": None,
        "student": Network(timm="lenet_300_100", arguments={"img_size": 8}, training={}),
        "compression": Compression(rules=RULES),
        "training": QUICK,
    }
    return Recipe(**{"name": "alone", **sections, **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, Run(recipe(), folder, validation=True).run()


def test_there_are_three_rows_and_the_student_is_the_reference(done):
    folder, results = done
    assert tuple(row.name for row in results.rows) == STAGES
    assert results.reference is results.row("student") and Results.load(folder / "results.json") == results
    written = json.loads((folder / "results.json").read_bytes())
    assert [row["ratio_to_teacher"] for row in written["rows"]] == [None] * 3
    student, compressed = results.row("student"), results.row("compressed")
    assert results.times_smaller(compressed) == student.bytes / compressed.bytes > 5
    assert set(written["seconds"]) == set(STAGES)


def test_the_card_speaks_of_no_teacher(done):
    folder, _ = done
    card = (folder / "student" / "README.md").read_text(encoding="utf-8")
    prose = card.partition("<details>")[0]
    assert "teacher" not in prose.lower() and "knowledge-distillation" not in card
    assert "smaller than the same student in full precision" in prose and "cross-entropy" in prose


def test_the_validation_split_is_scored_too(done):
    folder, results = done
    found = json.loads((folder / VALIDATION).read_bytes())
    assert tuple(found) == STAGES
    for row in results.rows:
        assert "split:validation" in found[row.name]["accuracy"]["signature"]
        assert "split:test" in row.scores["accuracy"].signature


def test_the_recipe_reads_back_as_it_is_kept(done):
    folder, _ = done
    text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    assert "teacher: null" in text and load_recipes(folder / "recipe.yaml") == [recipe()] and text == dump(recipe())


def test_a_student_with_weights_and_no_training_is_used_as_it_is(tmp_path):
    zoo.register()
    torch.manual_seed(5)
    given = timm.create_model("lenet_300_100", img_size=8).state_dict()
    save_file(given, tmp_path / "lenet.safetensors")
    student = Network(timm="lenet_300_100", arguments={"img_size": 8}, weights="lenet.safetensors")
    made = recipe(student=student, compression=Compression(rules=RULES, training={"learning_rate": 1e-2}))
    stages, _ = Run(made, tmp_path / "run", data_root=tmp_path).train(task_of(made, tmp_path))
    assert stages["student"].seconds == 0.0 and stages["compressed"].seconds > 0
    assert equal(load(stages["student"].folder).timm_model.state_dict(), given)
    assert not equal(weights(load(stages["compressed"].folder)), weights(load(stages["post_training"].folder)))


def test_without_settings_a_student_from_random_weights_is_trained(tmp_path):
    made = recipe(student=Network(timm="lenet_300_100", arguments={"img_size": 8}))
    stages, _ = Run(made, tmp_path).train(task_of(made, None))
    assert stages["student"].seconds > 0


def test_the_twin_can_be_the_teacher(tmp_path):
    """As differentiable quantization is trained in the paper: from the network's own full-precision copy."""
    wanted = Compression(rules=RULES, warm_start=True, taught_by_twin=True)
    made = recipe(compression=wanted, training={**QUICK, "logging_steps": 1})
    stages, _ = Run(made, tmp_path).train(task_of(made, None))
    assert not any("kd" in entry for entry in stages["student"].history)
    assert all("kd" in entry for entry in stages["compressed"].history if "loss" in entry)
    warmer = replace(made, distillation=Distillation(temperature=3.0))
    assert fingerprints(warmer)["student"] == fingerprints(made)["student"]
    assert fingerprints(warmer)["compressed"] != fingerprints(made)["compressed"]


def test_a_student_does_not_depend_on_a_teacher_that_is_not_there():
    alone, distilled = (fingerprints(recipe(teacher=t)) for t in (None, Network(timm="lenet_300_100")))
    assert all(alone[stage] != distilled[stage] for stage in STAGES)
    other = fingerprints(recipe(compression=Compression(rules=RULES, warm_start=True)))
    assert other["student"] == alone["student"] and other["compressed"] != alone["compressed"]
    assert fingerprints(recipe(seed=1))["student"] != alone["student"]
    assert fingerprints(recipe(training={"max_steps": 3}))["student"] != alone["student"]


def test_a_translation_needs_no_teacher_either(tmp_path):
    data = TranslationData(embedded="cldr", source="de", target="en", max_length=12, train_rows=100, test_rows=5)
    sections = {"images": None, "translation": data, "vocabulary": Vocabulary(size=100)}
    task = task_of(recipe(student=Network(marian=TINY), **sections), None)
    task.prepare(tmp_path)
    assert task.build(task.recipe.student, None).config.vocab_size == 100
    with pytest.raises(ValidationError, match="needs a teacher"):
        recipe(student=Network(from_teacher=Layers(encoder_layers=1, decoder_layers=1)), **sections)
    with pytest.raises(ValidationError, match="'marian' student from scratch needs a 'vocabulary' section"):
        recipe(student=Network(marian=TINY), **{**sections, "vocabulary": None})


# ------------------------------------------------------------------------------------------ dry runs


def test_random_images_have_the_shape_that_is_asked_for():
    for mean, mode in (((0.5,), "L"), ((0.5,) * 3, "RGB")):
        splits = random_images(
            ImageData(hub="some/where", size=9, mean=mean, validation_fraction=0.1, validation=None), 7
        )
        image = splits.train[0]["image"]
        assert image.size == (9, 9) and image.mode == mode
        assert splits.test.features["label"].num_classes == 7 and len(splits.train) >= 8


class Silent:
    def print(self, *text, **style):
        pass


def test_a_dry_run_needs_neither_hub_nor_data(tmp_path, monkeypatch):
    """Of timm's model on the Hub its architecture, of its data set noise; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    hub = ImageData(hub="some/where", folder="nowhere", size=32, validation_fraction=0.1, validation=None)
    made = recipe(images=hub, student=Network(pretrained="timm/test_resnet.r160_in1k"), training={"max_steps": 50_000})
    seen = []

    class Console(Silent):
        def print(self, *text, **style):
            seen.append(" ".join(map(str, text)))

    dry_run(made, None, Console())
    assert any("the images are random" in line for line in seen) and not list(tmp_path.iterdir())
    assert any("compressed: training" in line for line in seen)


def test_what_a_dry_run_cannot_do():
    hub = {"hub": "some/where", "size": 32, "validation_fraction": 0.1, "validation": None}
    with pytest.raises(ConfigError, match="only timm's own models can be built"):
        dry_run(recipe(images=ImageData(**hub), student=Network(pretrained="some/model")), None, Silent())
