"""A run whose teacher translates, answers once, and shares a trimmed vocabulary with its student."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from test_tasks import ANYHOW, QUICK, TINY

from hfcompress import load
from hfcompress.errors import ConfigError, DataError, TeacherError
from hfcompress.run import Run
from hfcompress.schema import (
    Distillation,
    Filters,
    Layers,
    Network,
    Recipe,
    Sequences,
    TranslationData,
    Vocabulary,
)
from hfcompress.students import cut_of
from hfcompress.tasks import task_of
from hfcompress.teacher_cache import TeacherCache
from hfcompress.teaching import foresee

TRAINING = {"per_device_train_batch_size": 16, "max_steps": 3, "use_cpu": True, "learning_rate": 1e-2}
EVERYTHING = Filters(worst=0.1, least_score=-1e9, length_ratio=1e9)
SEQUENCES = Sequences(beams=2, n_best=2, batch_size=16, max_new_tokens=12, filters=EVERYTHING, keep_pairs=True)
STUDENT = Layers(encoder_layers=(1,), decoder_layers=1, ffn_dim=8, trim_vocabulary=True)


def recipe(**changes):
    data = {"embedded": "cldr", "source": "de", "target": "en", "max_length": 24, "train_rows": 150, "test_rows": 12}
    sections = {
        "translation": TranslationData(**data),
        "vocabulary": Vocabulary(size=300),
        "teacher": Network(marian=TINY, training={}),
        "student": Network(from_teacher=STUDENT, training={}),
        "distillation": Distillation(sequences=SEQUENCES, cache=4, temperature=1.0, least_bleu=0.0),
        "training": TRAINING,
    }
    return Recipe(**{"name": "taught", "compression": ANYHOW, "evaluation": QUICK, **sections, **changes})


def train(recipe, output: Path, **options):
    console = Console(record=True, width=200)
    run = Run(recipe, output, console=console, **options)
    stages, _ = run.train(task_of(recipe, None))
    return stages, console.export_text()


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """(stages, what was said, folder)"""
    folder = tmp_path_factory.mktemp("first") / "run"
    return *train(recipe(), folder), folder


def test_the_stages_leave_what_they_should(first):
    stages, said, folder = first
    made = json.loads((folder / "stages" / "translations" / "translation.json").read_text())
    assert sum(made["counts"].values()) == 150 and made["beams"] == 2
    cache = TeacherCache(folder / "stages" / "teacher_cache")
    assert (cache.k, cache.temperature) == (4, 1.0)
    assert "encoder layers 1 of 2; decoder layers 0 of 2; 8 of 16 feed-forward units" in said
    assert "translating: 150 of 150 rows" in said
    teacher, student = (load(stages[name].folder) for name in ("teacher", "student"))
    assert teacher.config.vocab_size == student.config.vocab_size <= 300
    assert cut_of(student).encoder_layers == (1,)
    assert all("kd" in entry for entry in stages["student"].history if "loss" in entry and "ce" in entry)


def test_another_run_takes_over_what_the_teacher_said(first, tmp_path):
    """Only what differs is trained anew; the translations are those of the first."""
    _, _, folder = first
    other = recipe(student=Network(from_teacher=STUDENT, training={"max_steps": 2}))
    _, said = train(other, tmp_path / "run", reuse_from=[folder])
    assert said.count("done before") == 1 and "translating: 150 of 150 rows, " not in said
    names = ["translations/.shards/00000.parquet", "teacher_cache/00000/mass.npy"]
    for name in names:
        assert (tmp_path / "run/stages" / name).read_bytes() == (folder / "stages" / name).read_bytes()


def test_resumed_nothing_is_done_twice(first, tmp_path):
    _, _, folder = first
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    _, said = train(recipe(), folder, resume=True)
    assert said.count("done before") == 3 and "translating" not in said
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}


def test_a_pretrained_teacher_is_trimmed_and_its_direction_checked(first, tmp_path):
    _, _, folder = first
    pretrained = Network(pretrained=str(folder / "stages" / "teacher"))
    given = {"vocabulary": None, "teacher": pretrained}
    with pytest.raises(TeacherError, match=r"of the first 100 pairs have BLEU 0\.\d, under the least of 5"):
        train(recipe(**given, distillation=Distillation(temperature=1.0)), tmp_path / "refused")
    unchecked = Distillation(least_bleu=0.0, temperature=1.0)
    small = {**given, "translation": recipe().translation.__class__(**{**vars(recipe().translation), "train_rows": 60})}
    stages, _ = train(recipe(**small, distillation=unchecked), tmp_path / "run")
    sizes = [load(f).config.vocab_size for f in (folder / "stages" / "teacher", stages["teacher"].folder)]
    assert sizes[1] < sizes[0] and load(stages["student"].folder).config.vocab_size == sizes[1]


def test_a_trained_teacher_who_does_not_translate_is_kept_but_not_asked(tmp_path):
    wanted = Distillation(sequences=SEQUENCES, temperature=1.0)
    with pytest.raises(TeacherError, match="under the least of 5"):
        train(recipe(distillation=wanted), tmp_path)
    assert not (tmp_path / "stages" / "translations").exists()
    _, said = train(recipe(distillation=replace(wanted, least_bleu=0.0)), tmp_path, resume=True)
    assert "teacher: done before" in said and "translating: 150 of 150 rows" in said


def test_only_a_teacher_who_translates_can_do_that():
    with pytest.raises(ValueError, match="are for a translation recipe with a teacher"):
        recipe(teacher=None, student=Network(marian=TINY, training={}))


def test_what_cannot_be_asked_is_said_before_any_training(monkeypatch, tmp_path):
    foresee(Distillation(), tmp_path)
    with pytest.raises(DataError, match=r"news\.de"):
        foresee(Distillation(sequences=Sequences(monolingual="news.de")), tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="CTranslate2 is not installed"):
        foresee(Distillation(sequences=Sequences(engine="ctranslate2")), tmp_path)
