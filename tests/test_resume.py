"""Stopped, killed or damaged: what a run has done is there when it goes on, and the end is the same to the last bit."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from small import Digits, train_stage
from transformers import TrainerControl, TrainerState, TrainingArguments

from hfcompress import cli, stages
from hfcompress.errors import Interrupted, ResumeError
from hfcompress.resume import MANIFEST, CommitCheckpoints, newest, seconds_of

PATIENCE = 300  # seconds; for machines that have other things to do
FILE = "model.hfcompress.safetensors"
BY_STEPS = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 3}
BY_EPOCHS = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "num_train_epochs": 3}


@pytest.fixture(scope="module")
def processes():
    """Real processes that have imported everything already."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small", "hfcompress.run"])
    return context


def stage_in_process(folder, settings, pause=0.0):
    task = Digits(pause)
    try:
        train_stage(folder, task=task, **settings)
    except Interrupted as error:
        sys.exit(error.exit_code)


def start(processes, *arguments):
    process = processes.Process(target=stage_in_process, args=arguments)
    process.start()
    return process


def wait_for(pattern, folder, process):
    """Until a file that matches is there."""
    for _ in range(50 * PATIENCE):
        if any(folder.glob(pattern)):
            return
        assert process.is_alive(), f"ended with {process.exitcode} before there was {pattern}"
        time.sleep(0.02)
    raise AssertionError(f"no {pattern} after {PATIENCE} seconds")


def committed(folder):
    return sorted(int(m.parent.name.rpartition("-")[2]) for m in folder.glob(f"checkpoints/*/{MANIFEST}"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The compressed files of runs that nothing stopped."""
    files = {}
    for name, settings in (("steps", BY_STEPS), ("epochs", BY_EPOCHS), ("short", {**BY_STEPS, "max_steps": 4})):
        folder = tmp_path_factory.mktemp(name)
        train_stage(folder, **settings)
        files[name] = (folder / FILE).read_bytes()
    return files


# ----------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_to_go_on_from(processes, tmp_path, whole, number):
    process = start(processes, tmp_path, BY_STEPS, 0.3)
    wait_for(f"checkpoints/checkpoint-2/{MANIFEST}", tmp_path, process)
    os.kill(process.pid, number)
    process.join(PATIENCE)
    assert process.exitcode == Interrupted.exit_code == 130
    assert committed(tmp_path)[-1] >= 2 and not (tmp_path / FILE).exists()
    before = seconds_of(newest(tmp_path / "checkpoints"))
    stage = train_stage(tmp_path, **BY_STEPS)
    assert (tmp_path / FILE).read_bytes() == whole["steps"]
    assert stage.seconds > before and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("step", [2, 6, 9])
def test_a_stop_leaves_no_mark_on_the_choice_of_the_best(tmp_path, whole, step):
    """An evaluation more or less than in the uninterrupted run would be one more or less to take the best from."""
    with pytest.raises(Interrupted):
        train_stage(tmp_path, task=Digits(interrupt_at=step), **BY_EPOCHS)
    assert committed(tmp_path)[-1] == step
    state = TrainerState.load_from_json(newest(tmp_path / "checkpoints") / "trainer_state.json")
    evaluated = [entry["epoch"] for entry in state.log_history if "eval_accuracy" in entry]
    assert evaluated == [e for e in (1.0, 2.0, 3.0) if e <= state.epoch]
    train_stage(tmp_path, **BY_EPOCHS)
    assert (tmp_path / FILE).read_bytes() == whole["epochs"]


def test_a_signal_in_the_last_step_keeps_what_was_trained(tmp_path, whole):
    with pytest.raises(Interrupted):
        train_stage(tmp_path, task=Digits(interrupt_at=18), **BY_STEPS)
    assert stages.finished("small", tmp_path, "as it was")
    assert (tmp_path / FILE).read_bytes() == whole["steps"]


def test_a_second_signal_stops_at_once():
    with pytest.raises(KeyboardInterrupt), CommitCheckpoints().stopping_on_signals():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_killed_again_and_again(processes, tmp_path, whole):
    """Once after a checkpoint, then wherever it happens to be: starting, loading, training or saving."""
    draw = random.Random(0)
    for _ in range(3):
        process = start(processes, tmp_path, BY_STEPS, 0.2)  # 18 steps take longer than all three together
        wait_for(f"checkpoints/*/{MANIFEST}", tmp_path, process)
        time.sleep(draw.uniform(0.1, 1.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL and committed(tmp_path)
    train_stage(tmp_path, **BY_STEPS)
    assert (tmp_path / FILE).read_bytes() == whole["steps"]


def test_a_run_that_had_done_its_last_step_takes_no_other(tmp_path, whole):
    """max_steps inside an epoch, killed between its last checkpoint and the end: the Trainer alone would step again."""
    settings = {**BY_STEPS, "max_steps": 4}

    def killed(trainer):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("hfcompress.trainer.CompressionMixin.save_compressed", lambda self, folder: killed(self))
        train_stage(tmp_path, **settings)
    assert committed(tmp_path) == [2, 4]
    stage = train_stage(tmp_path, **settings)
    assert (tmp_path / FILE).read_bytes() == whole["short"]
    assert sum("loss" in entry for entry in stage.history) == 0  # logged every 25 steps


# ------------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Makes copies of a stage that was stopped in its fifth step."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Interrupted):
        train_stage(folder, task=Digits(interrupt_at=5), **BY_STEPS)
    assert committed(folder) == [4, 5]
    return lambda target: shutil.copytree(folder, target, dirs_exist_ok=True) / "checkpoints"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", MANIFEST])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, stopped, harm, name, caplog):
    checkpoints = stopped(tmp_path)
    harm(checkpoints / "checkpoint-5" / name)
    assert newest(checkpoints).name == "checkpoint-4"
    unfinished = (harm, name) == (Path.unlink, MANIFEST)  # as if a crash had come in between: nothing to say
    assert ("checkpoint-5 is damaged" in caplog.text) != unfinished
    flip(checkpoints / "checkpoint-4" / "optimizer.pt")
    with pytest.raises(ResumeError, match=r"checkpoint-4: optimizer.pt was changed.*Start anew with --overwrite"):
        newest(checkpoints)


def test_going_on_past_a_damaged_checkpoint_is_exact(tmp_path, stopped, whole):
    checkpoints = stopped(tmp_path)
    cut(checkpoints / "checkpoint-5" / "model.safetensors")
    (checkpoints / "checkpoint-6").mkdir()  # a crash before anything was committed
    (checkpoints / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    train_stage(tmp_path, **BY_STEPS)
    assert (tmp_path / FILE).read_bytes() == whole["steps"]


def test_nothing_was_ever_committed(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    assert newest(tmp_path) is None and newest(tmp_path / "nowhere") is None


def test_checkpoints_of_other_settings_are_refused(tmp_path, stopped):
    stopped(tmp_path)
    with pytest.raises(ResumeError, match="made with other settings: change them back, or start anew"):
        train_stage(tmp_path, wanted="otherwise", **BY_STEPS)
    assert committed(tmp_path) == [4, 5]


@pytest.mark.parametrize(("now", "best", "kept"), [(9, None, [5, 9]), (9, 3, [3, 5, 9]), (5, None, [4, 5, 9])])
def test_the_newest_and_the_best_are_kept(tmp_path, now, best, kept):
    """And those of later steps, which a damaged one may have left: they are written anew in their turn."""
    for step in (3, 4, 5, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    state = TrainerState(global_step=now, is_world_process_zero=True)
    state.best_model_checkpoint = best and str(tmp_path / f"checkpoint-{best}")
    CommitCheckpoints(keep=2).on_save(TrainingArguments(tmp_path, use_cpu=True), state, TrainerControl())
    assert sorted(int(p.name.rpartition("-")[2]) for p in tmp_path.glob("checkpoint-*")) == kept


# ------------------------------------------------------------------------------------ finished stages


def test_a_finished_stage_is_found_as_it_stands(tmp_path):
    stage = train_stage(tmp_path, **{**BY_STEPS, "max_steps": 2, "logging_steps": 1})
    assert stages.finished("small", tmp_path, "as it was") == stage
    assert [entry["step"] for entry in stage.history if "loss" in entry] == [1, 2]
    with pytest.raises(ResumeError, match=r"'small'.*made with other settings"):
        stages.finished("small", tmp_path, "otherwise")
    assert stages.finished("small", tmp_path / "elsewhere", "as it was") is None


def test_a_stage_of_another_run_is_taken_over(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    assert stages.found("small", target, "as it was", [source]) is None
    train_stage(source, **{**BY_STEPS, "max_steps": 2})
    assert stages.found("small", target, "otherwise", [source]) is None and not target.exists()
    (source / "broken").symlink_to("nowhere")
    with pytest.raises(shutil.Error):
        stages.found("small", target, "as it was", [source])
    assert (target / FILE).exists() and stages.finished("small", target, "as it was") is None  # not all is there
    (source / "broken").unlink()
    assert stages.found("small", target, "as it was", [source]).folder == target
    assert (target / FILE).read_bytes() == (source / FILE).read_bytes()


def test_fingerprints_tell_settings_apart():
    one = stages.fingerprint({"a": 1, "b": [2]}, "c")
    assert one == stages.fingerprint({"b": [2], "a": 1}, "c") != stages.fingerprint({"a": 1, "b": [3]}, "c")


# ------------------------------------------------------------------------------------ the command line

RECIPE = """
name: tiny
images: {embedded: digits, size: 8, train_rows: 96, test_rows: 20, augmentation: {crop_padding: 1}}
teacher: {timm: cifar_resnet20}
student: {timm: cifar_resnet20, training: {num_train_epochs: 1}}
compression:
  rules: [{method: {uniform: {bits: 4, stochastic: true}}, kinds: [conv, linear]}]
  training: {num_train_epochs: 8, save_strategy: steps, save_steps: 2, eval_strategy: "no"}
training: {per_device_train_batch_size: 16, use_cpu: true}
evaluation: {bootstrap: 0}
"""


def command(said, *arguments):
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(cli.main([str(a) for a in arguments]))


def test_ctrl_c_and_resume_through_the_command_line(processes, tmp_path):
    recipe, said, output = (tmp_path / name for name in ("tiny.yaml", "said", "output"))
    recipe.write_text(RECIPE, encoding="utf-8")

    def run(*options):
        process = processes.Process(target=command, args=(said, "run", recipe, "--output", output, *options))
        process.start()
        return process

    stopped = run()
    compressed = output / "stages" / "compressed"
    wait_for(f"checkpoints/*/{MANIFEST}", compressed, stopped)
    os.kill(stopped.pid, signal.SIGINT)
    stopped.join(PATIENCE)
    assert stopped.exitcode == 130 and committed(compressed) and not (compressed / stages.MARKER).exists()
    assert "run the same command with --resume" in said.read_text()
    again = run()
    again.join(PATIENCE)
    assert again.exitcode == 2 and "already holds a run" in said.read_text()
    marker = output / "stages" / "student" / stages.MARKER
    made = marker.stat().st_mtime_ns
    resumed = run("--resume")
    resumed.join(PATIENCE)
    assert resumed.exitcode == 0 and "student: done before" in said.read_text()
    assert marker.stat().st_mtime_ns == made
    assert (output / "student" / FILE).read_bytes() == (compressed / FILE).read_bytes()
    assert len(json.loads((output / "results.json").read_bytes())["rows"]) == 4
