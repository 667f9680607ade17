"""A rich progress bar for the Trainer, and plain lines where there is no terminal."""

import logging
from typing import Any

from datasets import disable_progress_bars as disable_datasets_bars
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars

_SHOWN = ("loss", "ce", "kd", "eval_loss", "eval_accuracy", "eval_bleu")


def bar(console: Console) -> Progress:
    """The bar that every long step of a run shows; nothing where there is no terminal."""
    columns = (TextColumn("{task.description:<16}", style="bold", markup=False), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )


def quiet_libraries() -> None:
    """One bar is enough: transformers' and datasets' own are switched off, and what is said of tied weights too."""
    disable_transformers_bars()
    disable_datasets_bars()
    logging.getLogger("transformers.trainer").addFilter(_not_of_tied_weights)


def _not_of_tied_weights(record: logging.LogRecord) -> bool:
    """A checkpoint holds a tied weight once; the Trainer calls its other names missing when it goes back to the best.

    Nothing else can be missing: a checkpoint counts with its manifest only.
    """
    return not record.getMessage().startswith("There were missing keys in the checkpoint model loaded")


class TrainingProgress(TrainerCallback):
    """Steps, time and the latest losses of a stage called `name`; on the main process only."""

    def __init__(self, name: str, console: Console | None = None) -> None:
        self.name = name
        self.console = console or Console(stderr=True)
        self.bar: Progress | None = None
        self.latest: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.console.is_terminal:
            self.bar = bar(self.console)
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.latest.update({k: float(v) for k, v in (logs or {}).items() if k in _SHOWN})
        if self.bar is not None:
            self.bar.update(self.task, note=self._note())

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is None and state.is_world_process_zero:
            line = f"{self.name}: step {state.global_step}/{state.max_steps}  {self._note()}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def _note(self) -> str:
        return "  ".join(f"{name} {self.latest[name]:.4g}" for name in _SHOWN if name in self.latest)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal, also where the training did not end by itself."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
