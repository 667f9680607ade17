"""One stage of a run: train a network into a folder, once; resumed where it stopped, reused where it is the same."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hfcompress.errors import ConfigError, ResumeError
from hfcompress.files import write_atomically
from hfcompress.output import MARKER
from hfcompress.passes import Passes
from hfcompress.progress import TrainingProgress
from hfcompress.resume import CommitCheckpoints, newest, seconds_of
from hfcompress.schema import Recipe
from hfcompress.tasks import AugmentedImages, Task, data_settings
from hfcompress.trainer import hold_padding_row


@dataclass(frozen=True)
class Stage:
    """A finished stage: its folder, its log and how long it took."""

    name: str
    folder: Path
    fingerprint: str
    seconds: float
    history: list[dict[str, Any]]

    def mark(self) -> None:
        """Say in the folder that the stage is finished; to be called once the rest is there."""
        record = {"fingerprint": self.fingerprint, "seconds": self.seconds, "history": self.history}
        write_atomically(self.folder / MARKER, json.dumps(record, indent=1).encode())


def fingerprint(*settings: Any) -> str:
    """The same settings give the same fingerprint; everything a stage depends on goes into it."""
    text = json.dumps(settings, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """Stage → the fingerprint of all that it is made of; a teacher's is there without one, of data and settings."""
    teacher = fingerprint(data_settings(recipe), recipe.teacher and asdict(recipe.teacher), recipe.training)
    loss = [asdict(recipe.distillation)] if recipe.teacher is not None else []
    student = fingerprint(teacher, asdict(recipe.student), *loss)
    teaching = fingerprint(teacher, "teaching", *loss)
    rules = [[r.pattern, [k.value for k in r.kinds], repr(r.method)] for r in recipe.compression.rules]
    compression = asdict(recipe.compression, dict_factory=lambda items: {k: v for k, v in items if k != "rules"})
    twin = [asdict(recipe.distillation)] if recipe.compression.taught_by_twin else []
    post, compressed = fingerprint(student, rules), fingerprint(student, rules, compression, *twin)
    return {
        "teacher": teacher,
        "translations": teaching,
        "teacher_cache": teaching,
        "student": student,
        "post_training": post,
        "compressed": compressed,
    }


def finished(name: str, folder: Path, wanted: str) -> Stage | None:
    """The stage as it stands in `folder`, or None. Raises ResumeError: it was made with other settings."""
    path = folder / MARKER
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["fingerprint"] != wanted:
        raise ResumeError(
            f"stage '{name}' in {folder} was made with other settings: change them back, or start anew with "
            "--overwrite (a sweep: delete that cell's folder, or name another --output)"
        )
    return Stage(name, folder, wanted, record["seconds"], record["history"])


def found(name: str, folder: Path, wanted: str, others: Sequence[Path]) -> Stage | None:
    """The stage as it stands in `folder`, or taken over from the first of the `others` that is of the same settings.

    None: it is to be made. Raises ResumeError, as `finished` does.
    """
    there = finished(name, folder, wanted)
    PartialState().wait_for_everyone()  # all have looked before the first copies
    for other in others:
        there = there or _take_over(name, other, folder, wanted)
    return there


def _take_over(name: str, source: Path, folder: Path, wanted: str) -> Stage | None:
    path = source / MARKER
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8"))["fingerprint"] != wanted:
        return None
    if PartialState().is_main_process:
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoints", MARKER))
        write_atomically(folder / MARKER, path.read_bytes())  # last: it says that the rest is there
    PartialState().wait_for_everyone()
    return finished(name, folder, wanted)


def train(
    name: str,
    folder: Path,
    wanted: str,
    task: Task,
    model: PreTrainedModel,
    settings: Mapping[str, Any],
    save: Callable[[Any], None],
    **trainer_arguments: Any,
) -> Stage:
    """Train `model`, resuming from the newest committed checkpoint in the stage's folder, then `save(trainer)`.

    Raises Interrupted (a signal came; what was done is saved), ResumeError (checkpoints of other settings, or damaged).
    """
    hold_padding_row(model)
    checkpoints = folder / "checkpoints"
    _check_settings(checkpoints, name, wanted)
    resume_from = newest(checkpoints)
    commits = CommitCheckpoints(seconds_before=seconds_of(resume_from) if resume_from else 0.0)
    progress = TrainingProgress(name)
    trainer: Any = task.trainer(
        model=model,
        args=training_arguments(name, task, checkpoints, settings),
        callbacks=[TellEpochs(), commits, progress],
        **task.trainer_arguments(model),
        **trainer_arguments,
    )
    trainer.remove_callback(PrinterCallback)
    if isinstance(trainer.train_dataset, Passes):
        trainer.train_dataset.note_in(checkpoints / "passes")
    with closing(progress), commits.stopping_on_signals():
        _train(trainer, resume_from)
        stage = Stage(name, folder, wanted, commits.seconds, trainer.state.log_history)
        trainer.accelerator.wait_for_everyone()  # the others may still be reading the best checkpoint
        if trainer.is_world_process_zero() and not commits.stopped:
            save(trainer)
            stage.mark()
            shutil.rmtree(checkpoints, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
    return stage


def training_arguments(name: str, task: Task, folder: Path, settings: Mapping[str, Any]) -> TrainingArguments:
    """The trainer's arguments for a stage. Raises ConfigError: settings that transformers refuses."""
    try:
        usual = _of_a_stream(settings) if task.stream is not None else {}
        return task.arguments(output_dir=str(folder), **_with_defaults({**usual, **settings}))
    except ValueError as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"stage '{name}': transformers refuses these training settings: {said}") from error


def slow_on(arguments: TrainingArguments) -> str | None:
    """What makes training many times slower than it need be on this machine, and what to do."""
    capability = torch.backends.cpu.get_cpu_capability()
    if arguments.bf16 and arguments.device.type == "cpu" and capability in ("DEFAULT", "AVX2"):
        return (
            f"bf16 on a CPU without AVX-512 ({capability}) is many times slower than float32: set training.bf16=false"
        )
    return None


def _train(trainer: Any, resume_from: Path | None) -> None:
    """From the start, or on from a checkpoint."""
    if resume_from is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(resume_from / "trainer_state.json"))
    if state.global_step < state.max_steps:
        if isinstance(trainer.train_dataset, Passes):
            batches = state.global_step * trainer.args.gradient_accumulation_steps
            trainer.train_dataset.skip(batches, trainer.args.train_batch_size)
        trainer.train(resume_from_checkpoint=str(resume_from))
        return
    # its last step was done: the Trainer, asked to resume, would take one more where that is not an epoch's last
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer.restore(resume_from.parent / Path(best or resume_from).name)
    trainer.state = state


def _check_settings(checkpoints: Path, name: str, wanted: str) -> None:
    path = checkpoints / "settings"
    if path.is_file() and path.read_text() != wanted:
        raise ResumeError(
            f"the checkpoints of stage '{name}' in {checkpoints} were made with other settings: "
            "change them back, or start anew with --overwrite"
        )
    if PartialState().is_main_process:
        write_atomically(path, wanted.encode())
    PartialState().wait_for_everyone()


def _with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "report_to": [],
        "disable_tqdm": True,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_steps": 25,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
        **settings,
    }


def _of_a_stream(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How often a stage is evaluated and saved that the Trainer takes for one epoch."""
    steps = max(1, settings.get("max_steps", 1) // 20)
    return {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": steps, "save_steps": steps}


class TellEpochs(TrainerCallback):
    """Tells augmenting datasets the epoch; the Trainer itself does not when it resumes inside one."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if isinstance(dataset, AugmentedImages):
            dataset.set_epoch(int((state.epoch or 0.0) + 1e-6))
