"""The two tasks: from a recipe's section to tensors, networks and scores."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import arguments, equal, weights
from transformers import AutoImageProcessor, AutoTokenizer, EvalPrediction

from hfcompress import Dense, Uniform, load
from hfcompress.errors import ConfigError, TeacherError
from hfcompress.schema import (
    Augmentation,
    Compression,
    Evaluation,
    ImageData,
    Layers,
    Network,
    Recipe,
    Rule,
    TranslationData,
    Vocabulary,
)
from hfcompress.tasks import AugmentedImages, Images, Translation, data_settings, task_of

TINY = {
    "d_model": 16,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 16 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
}
ANYHOW = Compression(rules=(Rule(method=Dense()),))
QUICK = Evaluation(bootstrap=0, batch_size=16, max_new_tokens=4)


def translation(**changes):
    data = {"embedded": "cldr", "source": "de", "target": "en", "max_length": 12, "train_rows": 200, "test_rows": 20}
    sections = {
        "translation": TranslationData(**data),
        "vocabulary": Vocabulary(size=120),
        "teacher": Network(marian=TINY),
        "student": Network(from_teacher=Layers(encoder_layers=1, decoder_layers=1)),
    }
    return Recipe(**{"name": "words", "compression": ANYHOW, "evaluation": QUICK, **sections, **changes})


def images(**changes):
    data = {"embedded": "digits", "size": 8, "train_rows": 40, "test_rows": 20, "mean": (0.1, 0.2, 0.3)}
    network = Network(timm="cifar_resnet20")
    sections = {"images": ImageData(**data), "teacher": network, "student": network}
    return Recipe(**{"name": "digits", "compression": ANYHOW, "evaluation": QUICK, **sections, **changes})


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """(task, folder of its vocabulary, facts)"""
    folder = tmp_path_factory.mktemp("vocabulary")
    task = task_of(translation(), None)
    return task, folder, task.prepare(folder)


@pytest.fixture(scope="module")
def pictures():
    task = task_of(images(), None)
    return task, task.prepare(None)


def trained(task, model, folder, **settings):
    given = {"per_device_train_batch_size": 20, "max_steps": 2, "eval_strategy": "epoch", **settings}
    args = arguments(folder, seq2seq=isinstance(task, Translation), **given)
    trainer = task.trainer(model=model, args=args, **task.trainer_arguments(model))
    trainer.train()
    return trainer


# ------------------------------------------------------------------------------------- translation


def test_sentences_become_ids_and_none_is_lost_from_evaluation(words):
    task, folder, facts = words
    assert isinstance(task, Translation)
    assert facts.rows["train"] == 200 and facts.rows["test"] == 20
    assert facts.rows["validation"] == len(task.validation) and len(task.train) == 200 - facts.left_out < 200
    assert max(len(row) for row in task.validation["labels"]) == 12  # cut
    assert len(task.tokenizer) == 120 and (folder / "vocab.json").is_file()
    row = task.train[0]
    assert task.tokenizer.decode(row["labels"], skip_special_tokens=True) in task.splits.train["target"]


def test_the_vocabulary_is_trained_once(words):
    _, folder, _ = words
    made = (folder / "source.spm").stat().st_mtime_ns
    again = task_of(translation(), None)
    again.prepare(folder)
    assert (folder / "source.spm").stat().st_mtime_ns == made
    assert again.tokenizer.get_vocab() == words[0].tokenizer.get_vocab()


def test_teacher_and_student_of_a_translation(words):
    task, _, _ = words
    teacher = task.build(task.recipe.teacher, None)
    assert teacher.config.vocab_size == 120 and teacher.config.pad_token_id == task.tokenizer.pad_token_id == 119
    assert equal(weights(task.build(task.recipe.teacher, None)), weights(teacher))  # the recipe's seed
    student = task.build(task.recipe.student, teacher)
    assert (student.config.encoder_layers, student.config.decoder_layers) == (1, 1)
    assert torch.equal(student.model.shared.weight, teacher.model.shared.weight)
    with pytest.raises(ConfigError, match="'from_teacher' needs a teacher"):
        task.build(task.recipe.student, None)
    with pytest.raises(ConfigError, match="cannot have a 'timm' network"):
        task.build(Network(timm="resnet18"), None)


def test_a_translation_trains_saves_and_is_scored(words, tmp_path):
    task, _, _ = words
    model = task.build(task.recipe.teacher, None)
    trainer = trained(task, model, tmp_path)
    assert trainer.state.log_history[-2]["eval_loss"] > 0
    model.save_pretrained(tmp_path / "model")
    task.save_processing(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == task.tokenizer.get_vocab()
    scores, samples = task.score(str(tmp_path / "model"), None)
    assert scores.keys() == {"bleu", "chrf"} and scores["bleu"].n == len(samples) == 20
    assert [sample.reference for sample in samples] == task.splits.test["target"]


def test_a_pretrained_student_must_speak_the_same_vocabulary(words, tmp_path):
    task, _, _ = words
    model = task.build(task.recipe.teacher, None)
    model.save_pretrained(tmp_path)
    task.save_processing(tmp_path)
    student = Network(pretrained=str(tmp_path))
    assert equal(weights(task.build(student, None)), weights(model))
    ids = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))  # the same tokens, two of them exchanged
    first, second = (token for token, i in ids.items() if i in (50, 51))
    ids[first], ids[second] = ids[second], ids[first]
    (tmp_path / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    with pytest.raises(TeacherError, match=r"differ in 2 of 120 ids \(id: teacher / student\): 50 is"):
        task.build(student, None)


# ------------------------------------------------------------------------------------------ images


def test_images_become_tensors_as_the_saved_model_says(pictures, tmp_path):
    task, facts = pictures
    assert isinstance(task, Images) and facts.rows == {"train": 40, "validation": 200, "test": 20}
    model = task.build(task.recipe.teacher, None)
    model.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    given = task.trainer_arguments(model)
    for split, rows in (("train", given["train_dataset"]), ("validation", given["eval_dataset"])):
        picture = getattr(task.splits, split)[3]
        wanted = processor(picture["image"].convert("RGB"))["pixel_values"][0]
        assert wanted.shape == (3, 8, 8) and torch.equal(rows[3]["pixel_values"], wanted)
        assert int(rows[3]["labels"]) == picture["label"]
    assert model.config.id2label == {i: str(i) for i in range(10)}


def test_images_train_and_are_scored(pictures, tmp_path):
    task, _ = pictures
    model = task.build(task.recipe.student, None)
    trainer = trained(task, model, tmp_path)
    accuracy = trainer.state.log_history[-2]["eval_accuracy"]
    assert accuracy == pytest.approx(round(accuracy * 2) / 2)  # of 200, in percent
    model.save_pretrained(tmp_path / "model")
    task.save_processing(tmp_path / "model")
    scores, samples = task.score(str(tmp_path / "model"), None)
    assert scores["accuracy"].n == len(samples) == 20
    right = sum(sample.reference == sample.output for sample in samples)
    assert scores["accuracy"].value == 100 * right / 20


def test_a_compressed_classifier_goes_on_training_from_its_file(pictures, tmp_path):
    """A wrapper that was loaded names its weights otherwise than one that was built: nothing may get lost."""
    task, _ = pictures
    rules = Compression(rules=(Rule(method=Uniform(bits=4), pattern="*conv*"),))
    task.build(task.recipe.student, None).save_pretrained(tmp_path / "first")

    def trainer():
        model = load(tmp_path / "first")
        args = arguments(tmp_path, per_device_train_batch_size=20, save_strategy="steps", save_steps=1)
        return task.trainer(model=model, args=args, compression=rules, **task.trainer_arguments(model))

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(weights(resumed.model), weights(whole.model))
    whole.save_compressed(tmp_path / "second")
    assert equal(weights(load(tmp_path / "second")), weights(whole.model))


def test_accuracy_counts_what_has_a_label():
    from hfcompress.tasks import _accuracy

    logits = np.eye(4)
    assert _accuracy(EvalPrediction((logits, None), np.array([0, 1, 0, -100]))) == {"accuracy": pytest.approx(200 / 3)}


# ------------------------------------------------------------------------------------ augmentation


class Ramps:
    """Images of one channel whose pixels are all different."""

    def __init__(self, side):
        self.pixels = 1 + torch.arange(side * side, dtype=torch.float32).reshape(1, side, side)

    def __len__(self):
        return 1000

    def __getitem__(self, row):
        return {"pixel_values": self.pixels, "labels": row}


def test_no_augmentation_is_none():
    rows = AugmentedImages(Ramps(4), Augmentation(), seed=0)
    assert len(rows) == 1000 and rows[7]["labels"] == 7
    assert torch.equal(rows[7]["pixel_values"], Ramps(4).pixels)


@given(st.integers(0, 3), st.booleans(), st.integers(0, 2**31), st.integers(0, 99), st.integers(0, 999))
def test_an_augmented_image_is_a_window_of_the_padded_one(padding, flip, seed, epoch, row):
    rows = AugmentedImages(Ramps(4), Augmentation(crop_padding=padding, flip=flip), seed)
    rows.set_epoch(epoch)
    found = rows[row]["pixel_values"]
    padded = torch.nn.functional.pad(Ramps(4).pixels, (padding,) * 4)
    windows = padded.unfold(1, 4, 1).unfold(2, 4, 1).reshape(-1, 4, 4)
    allowed = torch.cat([windows, windows.flip(-1)]) if flip else windows
    assert (allowed == found).all(dim=(1, 2)).any()
    again = AugmentedImages(Ramps(4), Augmentation(crop_padding=padding, flip=flip), seed)
    again.set_epoch(epoch)
    assert torch.equal(again[row]["pixel_values"], found)  # and so in any worker, in any order


def test_epochs_rows_and_seeds_draw_apart_and_evenly():
    def windows(seed, epoch):
        rows = AugmentedImages(Ramps(4), Augmentation(crop_padding=1, flip=True), seed)
        rows.set_epoch(epoch)
        return [tuple(rows[i]["pixel_values"].flatten().tolist()) for i in range(900)]

    first, counts = windows(0, 0), {}
    for window in first:
        counts[window] = counts.get(window, 0) + 1
    assert len(counts) == 18 and min(counts.values()) > 25 and max(counts.values()) < 85  # 50 expected
    for other in (windows(0, 1), windows(1, 0)):
        assert 20 < sum(a == b for a, b in zip(first, other)) < 90  # by chance a window is the same


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(crop_padding=2, flip=True)])
def test_a_batch_is_augmented_as_its_rows_are(pictures, augmentation):
    task, _ = pictures
    images = task.trainer_arguments(task.build(task.recipe.student, None))["train_dataset"].rows
    rows = AugmentedImages(images, augmentation, seed=3)
    rows.set_epoch(2)
    for item, row in zip(rows.__getitems__([5, 0, 39]), (5, 0, 39)):
        assert item["labels"] == rows[row]["labels"] and torch.equal(item["pixel_values"], rows[row]["pixel_values"])


# ---------------------------------------------------------------------------------------- settings


def test_settings_tell_what_the_tensors_depend_on():
    assert data_settings(images()) == data_settings(images(student=Network(timm="test_resnet")))
    assert data_settings(images()) != data_settings(images(seed=1))
    assert data_settings(translation()) != data_settings(translation(vocabulary=Vocabulary(size=121)))
    json.dumps(data_settings(translation()))
