"""A teacher's answers on disk: the same rows, the same loss, whoever wrote them and in whatever order they are read."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import collate, equal, marian, names, translation_trainer, weights
from transformers import Seq2SeqTrainer

from hfcompress import losses
from hfcompress.errors import ConfigError, DataError, ResumeError
from hfcompress.schema import Distillation
from hfcompress.teacher_cache import (
    COLUMNS,
    SAMPLES,
    Process,
    TeacherCache,
    WithTeacher,
    _packed,
    _unpacked,
    key_of,
    summarize,
    take,
    write,
)

SOFT = Distillation(soft=1.0, hard=0.0, temperature=1.0)


def written(folder, rows=None, teacher=None, **settings):
    given = {"k": 8, "shard_rows": 12, "batch_size": 5, **settings}
    write(teacher or marian(seed=1), rows or names(), collate, folder, **given)
    return TeacherCache(folder)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


def both(student, teacher, cache, rows, temperature=1.0):
    """(the loss from the teacher, from the cache)"""
    batch = WithTeacher(collate, cache)(rows)
    cached = take(batch)
    with torch.no_grad():
        s, t = student(**batch).logits, teacher(**batch).logits
    labels = batch["labels"]
    return losses.distillation(s, t, labels, temperature), losses.cached_distillation(s, cached, labels, temperature)


# ------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_classes_give_the_whole_loss(tmp_path, temperature):
    """Up to halves."""
    teacher = marian(seed=1, init_std=1.0).eval()
    cache = written(tmp_path, teacher=teacher, k=10_000, temperature=temperature)
    whole, cached = both(marian().eval(), teacher, cache, names(), temperature)
    assert cached.item() == pytest.approx(whole.item(), rel=2e-3) and whole > 1


@given(st.integers(1, 20), st.integers(0, 2**31), st.sampled_from([0.5, 1.0, 4.0]))
def test_the_estimate_is_unbiased(k, seed, temperature):
    """Summed over evenly spread draws, the samples are the distribution of the rest."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(1, 25, generator=generator) for _ in range(2))
    n = 4000
    draws = (torch.arange(n) + 0.5) / n
    cached = summarize(teacher.expand(n, -1), k, temperature, draws)
    labels = torch.zeros(n, dtype=torch.long)
    found = losses.cached_distillation(student.expand(n, -1), cached, labels, temperature) / n
    whole = losses.distillation(student, teacher, labels[:1], temperature)
    assert found == pytest.approx(whole.item(), rel=2e-3, abs=2e-4)


def test_summaries_are_the_plain_sums():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).double()
    logits[0, :30] = -torch.inf
    found = summarize(logits, 16, 1.0, torch.rand(6))
    for row, scores in enumerate(logits):
        p = scores.softmax(-1)
        order = p.argsort(descending=True)
        rest = order[16:][p[order[16:]] > 0]
        assert found["ids"][row][p[found["ids"][row]] > 0].tolist() == order[:16][p[order[:16]] > 0].tolist()
        assert found["mass"][row].item() == pytest.approx(p[rest].sum().item(), abs=1e-6)
        drawn = p[found["samples"][row]].log().tolist()
        assert found["sample_log_probs"][row].tolist() == pytest.approx(drawn, abs=1e-5)
        assert not len(rest) or set(found["samples"][row].tolist()) <= set(rest.tolist())


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    """To halves: nothing is left to chance."""
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    cached = {
        k: v.half() if v.is_floating_point() else v for k, v in summarize(logits, 16, 1.0, torch.rand(50)).items()
    }
    assert abs(losses.cached_distillation(logits, cached, torch.zeros(50, dtype=torch.long), 1.0).item() / 50) < 1e-3


def test_gradients_are_finite_where_the_teacher_is_certain(tmp_path):
    cached = summarize(torch.tensor([[0.0, -torch.inf, -torch.inf]]), 2, 1.0, torch.zeros(1))
    logits = torch.zeros(1, 3, requires_grad=True)
    loss = losses.cached_distillation(logits, cached, torch.zeros(1, dtype=torch.long), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(np.log(3)) and torch.isfinite(logits.grad).all()


def test_within_a_percent_on_real_sentences(data, tmp_path):
    """A teacher and a student trained a little on Multi30k, k = 16: what the benchmark prints."""
    script = Path(__file__).parents[1] / "benchmarks" / "cached_loss.py"
    command = [sys.executable, str(script), "--data-root", str(data), "--steps", "40", "--sentences", "64"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["student's steps"] for line in found] == [0, 40]
    for line in found:
        assert abs(line["cached"] - line["whole"]) < max(0.01 * line["whole"], 2e-3) and line["bytes per token"] <= 120


# ------------------------------------------------------------------------------------------ rows and files


def test_rows_are_found_wherever_they_are(tmp_path):
    cache = written(tmp_path)
    rows = names()
    whole = {key_of(row): cache.of(row) for row in rows}
    for row in rows[::-1][::3]:
        found = cache.of({**row, "attention_mask": [1]})
        assert all(len(found[name]) == len(row["labels"]) for name in COLUMNS)
        assert all(np.array_equal(found[name], whole[key_of(row)][name]) for name in COLUMNS)
    assert found["ids"].shape[1] == 8 and found["samples"].shape[1] == SAMPLES
    with pytest.raises(DataError, match="knows nothing of a row"):
        cache.of(names(40, 1)[0])


def test_keys_tell_rows_apart():
    rows = [{"input_ids": a, "labels": b} for a, b in itertools.product([[1], [1, 2], [2, 1]], repeat=2)]
    assert len({key_of(row) for row in rows}) == len(rows)


@given(st.integers(1, 3), st.integers(4, 20))
def test_processes_write_what_one_writes(tmp_path_factory, count, shard_rows):
    one, several = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("several")
    written(one, shard_rows=shard_rows)
    for index in reversed(range(count)):
        write(
            marian(seed=1),
            names(),
            collate,
            several,
            k=8,
            shard_rows=shard_rows,
            batch_size=5,
            process=Process(index, count),
        )
    assert files(one) == files(several)


def test_a_batch_is_padded_like_its_labels(tmp_path):
    batch = WithTeacher(collate, written(tmp_path))(names(3, 6))
    for name in COLUMNS:
        assert batch[f"teacher_{name}"].shape[:2] == batch["labels"].shape
    assert take(batch).keys() == set(COLUMNS) and batch.keys() == {"input_ids", "attention_mask", "labels"}


def test_what_is_whole_is_kept_and_what_is_not_is_written_again(tmp_path):
    written(tmp_path)
    before = files(tmp_path)
    (tmp_path / "00001" / "shard.json").unlink()
    (tmp_path / "00002" / "ids.npy").write_bytes(before["00002/ids.npy"][:-1])
    kept = (tmp_path / "00000" / "ids.npy").stat().st_mtime_ns
    asked = []
    teacher = marian(seed=1)
    teacher.register_forward_hook(lambda *_: asked.append(1))
    with pytest.raises(DataError, match="unfinished: 1 of 3 shards are missing, first 1"):
        TeacherCache(tmp_path)
    written(tmp_path, teacher=teacher)
    assert files(tmp_path) == before and (tmp_path / "00000" / "ids.npy").stat().st_mtime_ns == kept
    assert len(asked) == 3 + 2  # 12 and 8 rows by fives


def test_a_cache_of_something_else_is_refused(tmp_path):
    written(tmp_path)
    with pytest.raises(ResumeError, match="k 8 / 9"):
        written(tmp_path, k=9)
    with pytest.raises(ResumeError, match=r"made otherwise .*teacher"):
        written(tmp_path, teacher=marian(seed=2))
    with pytest.raises(ResumeError, match="is of other rows"):
        written(tmp_path, rows=names(1))
    with pytest.raises(DataError, match="no teacher's cache"):
        TeacherCache(tmp_path / "elsewhere")


@given(st.lists(st.integers(0, 2**24 - 1), min_size=1))
def test_classes_in_three_bytes(ids):
    packed = _packed(np.array([ids]), 1 << 20)
    assert packed.dtype == np.uint8 and packed.shape == (1, len(ids), 3)
    assert _unpacked(packed).tolist() == [ids]
    small = [i % (1 << 16) for i in ids]
    assert _packed(np.array(small), 1 << 16).tolist() == small


def test_bytes_per_token(tmp_path):
    cache = written(tmp_path, k=16)
    assert cache.bytes_per_token == 16 * 4 + SAMPLES * 4 + 2
    assert json.loads((tmp_path / "cache.json").read_text())["rows"] == 32


# ------------------------------------------------------------------------------------------ training


def test_training_needs_no_teacher(tmp_path):
    """All classes cached, it is the training with the teacher, but for halves; shuffled, with evaluation."""
    cache = written(tmp_path / "cache", k=10_000)
    runs = []
    for teacher in (marian(seed=1), cache):
        given = {"teacher": teacher, "distillation": SOFT}
        trainer = translation_trainer(tmp_path / "o", given=given, eval_strategy="steps", eval_steps=2)
        trainer.train()
        runs.append(trainer)
    taught, cached = (trainer.state.log_history for trainer in runs)
    for a, b in zip(taught, cached):
        for name in {"loss", "kd", "eval_loss"} & a.keys():
            assert b[name] == pytest.approx(a[name], rel=5e-3, abs=1e-4)
    assert runs[1].teacher is None and isinstance(runs[1], Seq2SeqTrainer)


def test_rows_that_were_left_out_do_not_matter(tmp_path):
    cache = written(tmp_path / "cache")
    given = {"teacher": cache, "distillation": SOFT, "train_dataset": names()[::-1][::2]}
    trainer = translation_trainer(tmp_path, given=given)
    before = weights(trainer.model)
    trainer.train()
    assert not equal(weights(trainer.model), before) and trainer.state.log_history[0]["kd"] > 0


def test_refused(tmp_path):
    cache = written(tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"at temperature 1\.0, distillation is at 2\.0"):
        translation_trainer(tmp_path, given={"teacher": cache, "distillation": Distillation(temperature=2.0)})
    with pytest.raises(DataError, match="knows nothing of a row"):
        translation_trainer(
            tmp_path, given={"teacher": cache, "distillation": SOFT, "train_dataset": names(40, 8)}
        ).train()
