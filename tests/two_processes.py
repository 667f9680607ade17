"""What test_distributed.py runs on two processes: `torchrun --nproc_per_node 2 two_processes.py OUTPUT`.

Rank 0 leaves what was found in OUTPUT/found.pt.
"""

import sys
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from packaging.version import Version
from small import (
    SEQ2SEQ,
    VARIANTS,
    Digits,
    Seen,
    equal,
    first_gradient,
    marian,
    rules,
    train_stage,
    translation_trainer,
    weights,
)
from test_streams import losses_of, words, write_parquet

from hfcompress.errors import Interrupted

RESUMES = Version(version("transformers")) >= Version("5.23")
"""Older ones look for their optimizer's state on a device "cpu:0", which torch does not know."""


def main(output: Path) -> None:
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    found = {
        "gradients": {(k, v): first_gradient(k, v, 16, 1, output / "o") for k in SEQ2SEQ for v in VARIANTS},
        "accumulated": first_gradient("marian", "both", 4, 4, output / "o"),
        "whole run": whole_run(output / "whole", state.process_index),
        "stopped": stopped_run(output, state.process_index),
        "streamed": streamed_runs(output, state.process_index),
    }
    if state.is_main_process:
        torch.save(found, output / "found.pt")
    dist.destroy_process_group()


def whole_run(folder: Path, rank: int) -> dict:
    """Train, evaluate with generation, save, load the best; then resume from inside an epoch."""

    look = Seen(lambda model: agree(weights(model)), "step_end")

    def trainer():
        return translation_trainer(
            folder,
            marian(seed=rank),  # as a script without a seed would; rank 0's counts
            given={"teacher": marian(seed=7), "compression": rules(3, stochastic=True), "callbacks": [look]},
            per_device_train_batch_size=4,
            predict_with_generate=True,
            generation_max_length=6,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=1,
            save_steps=1,
            max_steps=6,
            load_best_model_at_end=True,
        )

    whole = trainer()
    whole.train()
    best = folder / f"checkpoint-{whole.state.best_global_step}"
    if whole.is_world_process_zero():
        whole.save_compressed(folder / "file")
    found = {"best": best.name, "ranks agree": look.seen["step_end"], "history": whole.state.log_history}
    if not RESUMES:
        return found
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    same = equal(weights(resumed.model), weights(whole.model)) and equal(latents(resumed), latents(whole))
    return {**found, "resumed": same}


def stopped_run(output: Path, rank: int) -> dict:
    """One process alone gets a signal: both stop after the same step, and go on from there as if nothing had been."""
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 8}
    try:
        train_stage(output / "stopped", task=Digits(interrupt_at=2 if rank == 1 else None), **settings)
        stopped = False
    except Interrupted:
        stopped = True
    kept = sorted(path.parent.name for path in output.glob("stopped/checkpoints/*/MANIFEST.json"))
    dist.barrier()
    if RESUMES:
        train_stage(output / "stopped", **settings)
        train_stage(output / "unstopped", **settings)
    return {"stopped": gather_object([stopped]), "kept": kept}


def streamed_runs(output: Path, rank: int) -> dict:
    """A streamed stage, and one that was stopped in its second pass and resumed; and what each rank read in a pass."""

    def task():
        folder = output / f"words{rank}"
        folder.mkdir(exist_ok=True)
        found = words(folder, write_parquet)
        found.prepare(folder / "vocabulary")
        return found

    rows = [tuple(row["input_ids"]) for row in islice(iter(task().train), 30)]
    found = {"rows": [tuple(row) for row in gather_object(rows)]}
    whole = losses_of(task(), output / "streamed")
    if not RESUMES:
        return found
    try:
        losses_of(task(), output / "streamed-stopped", stop_after=4 if rank == 1 else None)
    except Interrupted:
        found["interrupted"] = True
    return {**found, "same": losses_of(task(), output / "streamed-stopped") == whole, "steps": list(whole)}


def latents(trainer) -> dict[str, torch.Tensor]:
    entries = trainer.compressor.entries
    return {f"{name}:{key}": z.detach() for name, entry in entries.items() for key, z in entry.latents.items()}


def agree(tensors: dict[str, torch.Tensor]) -> bool:
    flat = torch.cat([tensor.flatten().double() for tensor in tensors.values()])
    copies = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(copies, flat)
    return torch.equal(*copies)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
