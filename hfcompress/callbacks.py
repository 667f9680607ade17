"""What a trainer with compression does once its last step is done."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfcompress.compressor import Compressor, Entry
from hfcompress.errors import ResumeError
from hfcompress.reparameterization import MATRICES

logger = logging.getLogger(__name__)


class BestLatents(TrainerCallback):
    """`load_best_model_at_end` brings back the best weights; this brings back the latents they were decoded from."""

    def __init__(self, compressor: Compressor) -> None:
        self.compressor = compressor

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            load_latents(self.compressor, Path(state.best_model_checkpoint))


class Misses(TrainerCallback):
    """A target that was not reached is said to be so, and by how much; so are matrices that came to nothing."""

    def __init__(self, compressor: Compressor) -> None:
        self.compressor = compressor

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        outcome = self.compressor.outcome()
        if outcome is not None and not outcome.reached and state.is_world_process_zero:
            logger.warning(
                "the target was not reached: %s after %d steps. Train for more steps, or ask for what these rules and "
                "this network can come to",
                outcome,
                state.global_step,
            )
        dead = [entry.slot.name for entry in self.compressor.entries.values() if _dead(entry)]
        if dead and state.is_world_process_zero:
            logger.warning(
                "%s: every weight is zero, and what went through it is lost. Prune less, give it a rule of its own, or "
                "train for more steps",
                ", ".join(dead),
            )


def _dead(entry: Entry) -> bool:
    return entry.slot.kind in MATRICES and entry.slot.numel > 1 and not entry.parameter.any().item()


def load_latents(compressor: Compressor, folder: Path) -> None:
    """The latents of a training checkpoint. Raises ResumeError: it has none."""
    path = folder / "optimizer.pt"
    if not path.is_file():
        raise ResumeError(f"{folder} has no {path.name}: its latents are lost, only weights remain")
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if "compressor" not in saved:
        raise ResumeError(f"{path} was saved without compression: it has no latents")
    compressor.load_state_dict(saved["compressor"])
