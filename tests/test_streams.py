# ruff: noqa: E501  (a case is a line)
"""A streamed training split: each row once a pass; a run resumed takes the batches that it would have had."""

import gzip
import json
import os
import random
import signal
from collections import Counter
from itertools import islice

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from recipe_texts import CLDR, DIGITS, refusal, written
from small import arguments
from test_tasks import ANYHOW, QUICK, TINY

from hfcompress.errors import ConfigError, DataError, Interrupted
from hfcompress.passes import SKIPPED, Passes, Pieces, shuffled
from hfcompress.recipe import load
from hfcompress.schema import Augmentation, ImageData, Network, Recipe, TranslationData, Vocabulary
from hfcompress.stages import train
from hfcompress.streams import stream_images, stream_translation
from hfcompress.tasks import data_settings, task_of

PAIRS = [(f"Satz {i} {'a' * (i % 7)}", f"line {i} {'b' * (i % 5)}") for i in range(60)]


def plain(rows, place, skip):
    for number, row in enumerate(rows):
        yield SKIPPED if number < skip else row["n"]


def numbers(count, pieces):
    """Numbers 0 … count - 1 in so many pieces."""
    return Pieces(pieces, lambda piece: ({"n": n} for n in range(count)[piece::pieces]))


def passes(count=40, pieces=1, process=0, processes=1, buffer=8):
    return Passes(numbers(count, pieces), plain, seed=3, buffer=buffer, process=process, processes=processes)


# ------------------------------------------------------------------------------------------ passes


@pytest.mark.parametrize("shares", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 10])
def test_each_row_is_in_one_share(pieces, shares):
    rows = numbers(60, pieces)
    order = random.Random(pieces).sample(range(pieces), pieces)
    found = [row["n"] for share in range(shares) for row in rows.share(share, shares, order)]
    assert sorted(found) == list(range(60))


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_row_is_once_in_a_pass_of_all_processes_and_workers(pieces, workers):
    """Forty rows: ten for each of two workers of two processes, in batches of five."""
    found = []
    for process in range(2):
        loader = torch.utils.data.DataLoader(
            passes(40, pieces, process, 2), batch_size=5, num_workers=workers, collate_fn=list
        )
        found += [row for batch in islice(iter(loader), 4) for row in batch]
    assert sorted(found) == list(range(40))


def test_passes_are_shuffled_differently_and_the_same_again():
    rows = list(islice(iter(passes()), 120))
    first, second, third = rows[:40], rows[40:80], rows[80:]
    assert sorted(first) == sorted(second) == sorted(third) == list(range(40))
    assert first != second != third and first != sorted(first)
    assert list(islice(iter(passes()), 120)) == rows
    again = passes()
    again.set_epoch(1)
    assert list(islice(iter(again), 80)) == rows[40:]


@pytest.mark.parametrize("buffer", [1, 7, 60, 100])
def test_a_buffer_shuffles_and_loses_nothing(buffer):
    rows = [{"n": i} for i in range(60)]
    found = [row["n"] for row in shuffled(iter(rows), buffer, random.Random(0))]
    assert sorted(found) == list(range(60)) and (buffer == 1) == (found == list(range(60)))


def test_no_more_than_the_buffer_is_read_ahead():
    read = []
    endless = Pieces(1, lambda piece: ({"n": read.append(n) or n} for n in range(10**9)))
    list(islice(iter(Passes(endless, plain, seed=0, buffer=50)), 100))
    assert len(read) <= 151


@pytest.mark.parametrize(("workers", "skipped"), [(0, 1), (0, 25), (2, 7), (2, 24)])
def test_skipped_batches_are_those_that_were_taken(workers, skipped, tmp_path):
    def batches(of, count):
        loader = torch.utils.data.DataLoader(of, batch_size=3, num_workers=workers, collate_fn=list)
        return list(islice(iter(loader), count))

    wanted = batches(passes(41, 5), skipped + 9)
    before, first = passes(41, 5), passes(41, 5)
    before.note_in(tmp_path)
    batches(before, skipped)
    for again in (first, before):  # without what is noted of passes, and with it
        again.skip(skipped, 3)
        found = batches(again, skipped + 9)
        assert found[skipped:] == wanted[skipped:]
        assert {row for batch in found[:skipped] for row in batch} == {SKIPPED}


def test_passes_that_were_counted_are_not_read_again(tmp_path):
    stream = passes(20)
    stream.note_in(tmp_path)
    list(islice(iter(stream), 70))
    read = []
    again = Passes(Pieces(1, lambda piece: ({"n": read.append(n) or n} for n in range(20))), plain, seed=3, buffer=8)
    again.note_in(tmp_path)
    again.skip(7, 10)
    assert list(islice(iter(again), 80))[70:] == list(islice(iter(passes(20)), 80))[70:]
    assert len(read) == 20


def test_too_few_rows_are_refused():
    with pytest.raises(DataError, match="No training row is left for part 4 of 5"):
        next(iter(passes(3, 1, 3, 5)))


# ------------------------------------------------------------------------------------------ files


def write_json_lines(folder, split, pairs):
    lines = "".join(json.dumps({"translation": {"de": s, "en": t}}) + "\n" for s, t in pairs)
    (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


def write_parquet(folder, split, pairs, count=3):
    for i in range(count):
        part = [{"translation": {"de": s, "en": t}} for s, t in pairs[i::count]]
        Dataset.from_list(part).to_parquet(folder / f"{split}-{i:05}-of-{count:05}.parquet")


def write_text(folder, split, pairs):
    for side, language in enumerate(("de", "en")):
        (folder / f"{split}.{language}").write_text("".join(pair[side] + "\n" for pair in pairs))


WRITERS = [write_json_lines, write_parquet, write_text]


def translation(**settings):
    return TranslationData(**{"source": "de", "target": "en", "folder": ".", "streaming": True, **settings})


def pairs_of(rows):
    return [(row["source"], row["target"]) for row in rows]


@pytest.mark.parametrize("write", WRITERS)
def test_a_stream_has_the_rows_of_the_split(write, tmp_path):
    gap = [("Nur so", " "), ("", "void")]
    for split, pairs in (("train", [*PAIRS, *gap]), ("validation", PAIRS[:4]), ("test", PAIRS[4:9])):
        write(tmp_path, split, pairs)
    found = stream_translation(translation(), tmp_path)
    assert sorted(pairs_of(found.rows)) == sorted(PAIRS)
    assert sorted(pairs_of(found.splits.test)) == sorted(PAIRS[4:9]) and len(found.splits.validation) == 4
    some = stream_translation(translation(train_rows=7, validation_rows=2), tmp_path)
    assert len(list(some.rows)) == 7 and some.rows.count == 1 and len(some.splits.validation) == 2


def test_validation_may_be_held_out(tmp_path):
    write_json_lines(tmp_path, "train", PAIRS * 2)
    write_text(tmp_path, "test", PAIRS[:2])
    data = translation(validation=None, validation_fraction=0.3)
    found = stream_translation(data, tmp_path)
    train, held_out = set(pairs_of(found.rows)), pairs_of(found.splits.validation)
    assert train | set(held_out) == set(PAIRS) and not train & set(held_out)
    assert set(Counter(held_out).values()) == {2} and 8 <= len(held_out) / 2 <= 28
    first = stream_translation(translation(validation=None, validation_fraction=0.3, validation_rows=3), tmp_path)
    assert pairs_of(first.splits.validation) == held_out[:3] and set(pairs_of(first.rows)) == train


FAULTS = {
    "array": (lambda f: (f / "train.json").write_text("[{}]"), "one JSON array cannot be streamed"),
    "columns": (lambda f: (f / "train.jsonl").write_text('{"de": "a"}\n'), "No 'translation' in the columns"),
    "no object": (
        lambda f: (f / "train.jsonl").write_text('{"de": "a", "en": "b"}\n3\n'),
        "train.jsonl:2: expected a JSON",
    ),
    "none": (lambda f: None, "No split 'train'"),
    "uneven": (lambda f: write_text(f, "train", PAIRS) or (f / "train.en").write_text("one\n"), "one line per pair"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_streamed_is_told_at_once(fault, tmp_path):
    for split in ("validation", "test"):
        write_text(tmp_path, split, PAIRS[:4])
    FAULTS[fault][0](tmp_path)
    with pytest.raises(DataError, match=FAULTS[fault][1]):
        stream_translation(translation(), tmp_path)


def write_images(folder, split, count, files=1, names=("dark", "light")):
    draw = np.random.default_rng(0)
    light = [i % 2 for i in range(count)]
    pixels = [draw.integers(0, 128, (10, 12, 3), dtype=np.uint8) + 120 * np.uint8(shade) for shade in light]
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    rows = Dataset.from_dict({"image": [PIL.Image.fromarray(p) for p in pixels], "label": light}, features=features)
    for i in range(files):
        rows.shard(files, i).to_parquet(folder / f"{split}-{i:05}-of-{files:05}.parquet")


def images(**settings):
    return ImageData(**{"folder": ".", "size": 8, "streaming": True, **settings})


def test_images_are_streamed_and_held_out(tmp_path):
    write_images(tmp_path, "train", 40, 3)
    write_images(tmp_path, "test", 6)
    found = stream_images(images(validation=None, validation_fraction=0.3, validation_rows=4), tmp_path)
    assert found.rows.count == 3 and 15 < len(list(found.rows)) < 40
    row = next(iter(found.rows))
    assert row["image"]["bytes"].startswith(b"\x89PNG") and row["label"] in (0, 1)
    assert len(found.splits.validation) == 4 and found.splits.train.features["label"].names == ["dark", "light"]
    assert found.splits.validation[0]["image"].size == (12, 10)


def test_streamed_labels_have_names(tmp_path):
    write_images(tmp_path, "test", 6)
    stored = Dataset.from_parquet(str(tmp_path / "test-00000-of-00001.parquet"))
    rows = [{"image": row["image"], "label": row["label"]} for row in stored.cast_column("image", Image(decode=False))]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="'label' of the streamed split 'train' should be a ClassLabel"):
        stream_images(images(validation="test"), tmp_path)


def test_the_hub_is_streamed_and_its_other_splits_fetched_alone(tmp_path, monkeypatch):
    """`load_dataset` takes a folder where it takes a repository's name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repository").mkdir()
    for split, count in (("train", 10), ("validation", 4), ("test", 6)):
        write_images(tmp_path / "repository", split, count, 2)
    found = stream_images(ImageData(hub="./repository", size=8, streaming=True))
    assert (len(list(found.rows)), len(found.splits.validation), len(found.splits.test)) == (10, 4, 6)
    assert found.rows.count == 2 and found.splits.test[0]["image"].size == (12, 10)
    with pytest.raises(DataError, match=r"Split 'valid' of './repository' on the Hub cannot be loaded"):
        stream_images(ImageData(hub="./repository", size=8, streaming=True, validation="valid"))


# ------------------------------------------------------------------------------------------ training


def words(folder, write=write_json_lines, **changes):
    write(folder, "train", PAIRS)
    write_text(folder, "validation", PAIRS[:4])
    write_text(folder, "test", PAIRS[:4])
    sections = {"translation": translation(max_length=24), "vocabulary": Vocabulary(size=40)}
    networks = {"teacher": None, "student": Network(marian={**TINY, "dropout": 0.3})}
    given = {"name": "words", "compression": ANYHOW, "evaluation": QUICK, **sections, **networks, **changes}
    return task_of(Recipe(**given), folder)


def pictures(folder):
    write_images(folder, "train", 40, 3)
    write_images(folder, "test", 6)
    augmentation = Augmentation(resized_crop=True, crop_padding=1, flip=True)
    data = images(validation="test", augmentation=augmentation)
    networks = {"teacher": None, "student": Network(timm="test_resnet")}
    return task_of(Recipe(name="p", images=data, compression=ANYHOW, **networks), folder)


SETTINGS = {
    "max_steps": 9,
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 2,
    "use_cpu": True,
    "logging_steps": 1,
    "learning_rate": 1e-3,
}


def losses_of(task, folder, stop_after=None, **settings):
    """Step → loss, of a stage; stopped by a signal in that step."""
    model = task.build(task.recipe.student, None)
    if stop_after is not None:
        task.trainer = stopping(task.trainer, stop_after)
    stage = train("student", folder, "same", task, model, {**SETTINGS, **settings}, lambda trainer: None)
    return {entry["step"]: (entry["loss"], entry["epoch"]) for entry in stage.history if "loss" in entry}


def stopping(trainer, step):
    class Stopping(trainer):
        asked = False

        def training_step(self, *given, **more):
            if self.state.global_step + 1 == step and not self.asked:
                self.asked = True
                os.kill(os.getpid(), signal.SIGINT)
            return super().training_step(*given, **more)

    return Stopping


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [words, pictures])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(kind, workers, tmp_path):
    """Nine steps of twelve rows are several passes; it is stopped in the second."""

    def task():
        found = kind(tmp_path)
        found.prepare(tmp_path / "vocabulary")
        return found

    settings = {"dataloader_num_workers": workers, "eval_strategy": "steps", "eval_steps": 4}
    whole = losses_of(task(), tmp_path / "whole", **settings)
    with pytest.raises(Interrupted):
        losses_of(task(), tmp_path / "stopped", stop_after=5, **settings)
    assert list((tmp_path / "stopped/checkpoints").glob("checkpoint-5/MANIFEST.json"))
    assert losses_of(task(), tmp_path / "stopped", **settings) == whole
    assert list(whole) == list(range(1, 10)) and whole[9][1] == 1.0


def test_the_trainer_alone_skips_the_same_batches(tmp_path):
    def trainer(**given):
        task = words(tmp_path)
        task.prepare(tmp_path / "vocabulary")
        args = arguments(
            tmp_path / "o", seq2seq=True, **{**SETTINGS, "save_strategy": "steps", "save_steps": 5, **given}
        )
        return task.trainer(model=task.build(task.recipe.student, None), args=args, **task.trainer_arguments(None))

    whole = trainer()
    whole.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "o/checkpoint-5"))
    wanted = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in again.state.log_history if "loss" in entry] == wanted


def test_long_pairs_are_left_out_and_the_vocabulary_is_of_the_first_ones(tmp_path):
    task = words(tmp_path, translation=translation(max_length=9))
    facts = task.prepare(tmp_path / "vocabulary")
    assert facts.rows == {"validation": 4, "test": 4} and len(task.tokenizer) == 40
    rows = list(islice(iter(task.train), 200))
    assert 0 < max(max(len(row["input_ids"]), len(row["labels"])) for row in rows) <= 9
    assert len({tuple(row["labels"]) for row in rows}) < len(PAIRS)


# ------------------------------------------------------------------------------------------ recipes


REFUSED = [
    ("no max_steps", CLDR, "target: no}", "target: no, streaming: true}", (), 3, "translation.streaming: give 'max_steps' in the settings of the stage 'teacher'"),
    ("by length", CLDR, "target: no}", "target: no, streaming: true}", ("training={max_steps: 4, train_sampling_strategy: group_by_length}",), None, "training.train_sampling_strategy: group_by_length: needs all training rows"),
    ("cache", CLDR, "target: no}", "target: no, streaming: true}", ("training={max_steps: 4}", "distillation.cache=4"), None, "distillation.cache: needs all training rows"),
    ("trimmed", CLDR, "target: no}", "target: no, streaming: true}", ("training={max_steps: 4}", "student.from_teacher.trim_vocabulary=true"), None, "student.from_teacher.trim_vocabulary: needs all training rows"),
    ("images", DIGITS, "size: 8", "size: 8, streaming: true", (), 3, "images.streaming: give 'max_steps' in the settings of the stage 'student'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "old", "new", "overrides", "line", "said"), REFUSED)
def test_what_a_stream_does_not_allow_is_told_with_its_place(name, text, old, new, overrides, line, said, tmp_path):
    told = refusal(written(tmp_path, text.replace(old, new)), *overrides) if line else None
    if line is None:
        with pytest.raises(ConfigError) as error:
            load(written(tmp_path, text.replace(old, new)), overrides)
        told = str(error.value)
    assert said in told and (line is None or told.startswith(f"{line}: "))


def test_a_recipe_may_stream(tmp_path):
    (recipe,) = load(
        written(tmp_path, CLDR.replace("target: no}", "target: no, streaming: true}")), ["training={max_steps: 4}"]
    )
    assert recipe.translation.streaming


def test_what_was_made_before_there_were_streams_is_still_found(tmp_path):
    (plain,) = load(written(tmp_path, CLDR))
    assert not data_settings(plain)["data"].keys() & {"streaming", "shuffle_buffer", "validation_rows"}
