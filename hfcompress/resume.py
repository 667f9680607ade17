"""Runs that never lose work: committed checkpoints, a picker that trusts only those, and a clean stop on a signal.

The Trainer writes into checkpoint-N in place and picks the highest N by name. Here a checkpoint counts once a manifest
with every file's SHA-256 has been synced into it; older ones are deleted only after that.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfcompress.errors import Interrupted, ResumeError
from hfcompress.files import write_atomically
from hfcompress.signals import stop_signals_call

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"


class CommitCheckpoints(TrainerCallback):
    """Commits each checkpoint the Trainer saves and keeps the newest `keep` (and the best); stops cleanly on a signal.

    Leave `save_total_limit` unset: the Trainer would delete older checkpoints before this one is committed. `stopped`:
    a signal ended the training before its last step, after a checkpoint; the same on all processes.
    """

    def __init__(self, keep: int = 2, seconds_before: float = 0.0) -> None:
        self.keep = keep
        self.stop_requested = False
        self.stopped = False
        self._started = time.perf_counter() - seconds_before

    @property
    def seconds(self) -> float:
        """Wall time of the training so far, before and after resuming."""
        return time.perf_counter() - self._started

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step < state.max_steps and _anywhere(self.stop_requested):
            self.stopped = control.should_training_stop = True
            control.should_save = not _epoch_is_over(state)  # or else after the evaluation that is due
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.stopped:
            control.should_save = _epoch_is_over(state)
            if not control.should_save:  # in the middle of an epoch, where a run that goes on does not look
                control.should_evaluate = control.should_log = False
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # every rank's random state must be on disk
        if not state.is_world_process_zero:
            return
        assert args.output_dir is not None
        commit(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.seconds)
        best = {Path(state.best_model_checkpoint).name} if state.best_model_checkpoint else set()
        past = [p for p in _checkpoints(Path(args.output_dir)) if _step(p) <= state.global_step]
        for old in past[: -self.keep]:
            if old.name not in best:
                shutil.rmtree(old)

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """Within: the first SIGINT or SIGTERM finishes the step and saves; a second stops at once.

        Raises Interrupted at the end if there was one, on all processes.
        """

        def request(number: int, frame: FrameType | None) -> None:
            if self.stop_requested and PartialState().num_processes == 1:  # torchrun passes on what we got ourselves
                raise KeyboardInterrupt
            self.stop_requested = True

        with stop_signals_call(request):
            yield
        if self.stopped or _anywhere(self.stop_requested):
            raise Interrupted("stopped by a signal; all work was saved: run the same command with --resume")


def _anywhere(flag: bool) -> bool:
    """Whether `flag` is set on any process: all must stop after the same step."""
    if PartialState().num_processes == 1:
        return flag
    total = reduce(torch.tensor(int(flag), device=PartialState().device), "sum")
    return bool(total)


def _epoch_is_over(state: TrainerState) -> bool:
    return float(state.epoch or 0.0).is_integer()


def commit(checkpoint: Path, seconds: float) -> None:
    """Sync every file and write the manifest: from here on it counts. `seconds`: training time so far."""
    files = {p.relative_to(checkpoint).as_posix(): _sync(p) for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    files.pop(MANIFEST, None)
    write_atomically(checkpoint / MANIFEST, json.dumps({"seconds": seconds, "sha256": files}, indent=1).encode())


def newest(output: Path) -> Path | None:
    """The newest committed checkpoint whose files are all as they were; None if none was ever committed.

    Raises ResumeError: there are committed checkpoints, and every one of them is damaged.
    """
    damaged = []
    for candidate in reversed(_checkpoints(output)):
        if not (candidate / MANIFEST).is_file():
            continue  # never finished: a crash came in between
        problem = _damage(candidate)
        if problem is None:
            return candidate
        logger.warning("%s is damaged and left out: %s", candidate, problem)
        damaged.append(f"{candidate.name}: {problem}")
    if damaged:
        raise ResumeError(
            f"no checkpoint in {output} can be resumed: {'; '.join(damaged)}. Start anew with --overwrite"
        )
    return None


def seconds_of(checkpoint: Path) -> float:
    """Training time up to a committed checkpoint."""
    return float(json.loads((checkpoint / MANIFEST).read_text())["seconds"])


def _damage(checkpoint: Path) -> str | None:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())["sha256"]
    except (ValueError, LookupError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, digest in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _digest(path) != digest:
            return f"{name} was changed after it was committed"
    return None


def _checkpoints(output: Path) -> list[Path]:
    """Oldest first, by step."""
    found = [p for p in output.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _sync(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
