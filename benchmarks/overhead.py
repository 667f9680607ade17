"""What compression costs while training: step time, generate() time, memory; and how near its limit the file is.

    python benchmarks/overhead.py [--rounds 30] [--only steps]

Ratios of medians from interleaved runs in one process (memory: one process each). The machine should be quiet. The
plain side is transformers' own trainer, untouched.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
)

from hfcompress import CompressionTrainer, Compressor, Rule, Seq2SeqCompressionTrainer, checkpoint, zoo
from hfcompress.coding import Symbols
from hfcompress.methods import Dense, EntropyPenalized, Levels, Magnitude, MultiHash, SoftThreshold, Uniform
from hfcompress.reparameterization import MATRICES, Reparameterization
from hfcompress.schema import Compression
from hfcompress.teacher import freeze

RATE = 0.1  # of the methods whose bits are part of the loss
METHODS: dict[str, Reparameterization] = {
    "uniform": Uniform(bits=4, bucket=256),
    "levels": Levels(points=16, bucket=256),
    "entropy penalized": EntropyPenalized(),
    "entropy penalized, dft": EntropyPenalized(transform="dft"),
    "soft threshold": SoftThreshold(),
    "magnitude": Magnitude(),
    "multi-hash": MultiHash(fraction=0.1),
}


def compression(name: str) -> Compression:
    """Every matrix and kernel by that method."""
    rate = RATE if isinstance(METHODS[name], EntropyPenalized | SoftThreshold) else 0.0
    return Compression(rules=(Rule(method=METHODS[name], kinds=MATRICES), Rule(method=Dense())), rate_weight=rate)


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def marian(d: int = 256, layers: int = 3, vocabulary: int = 8000) -> MarianMTModel:
    torch.manual_seed(0)
    return MarianMTModel(
        MarianConfig(
            vocab_size=vocabulary,
            d_model=d,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_ffn_dim=4 * d,
            decoder_ffn_dim=4 * d,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            pad_token_id=vocabulary - 1,
            decoder_start_token_id=vocabulary - 1,
            eos_token_id=0,
            forced_eos_token_id=0,
            dropout=0.1,
        )
    )


def resnet20() -> TimmWrapperForImageClassification:
    zoo.register()
    torch.manual_seed(0)
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="cifar_resnet20", num_labels=10))


def sentences() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 7000, (64, 24), generator=torch.Generator().manual_seed(1))
    start = torch.full((64, 1), 7999)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": torch.cat([start, ids[:, :-1]], 1),
        "labels": ids,
    }


def images() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(128, 3, 32, 32, generator=generator),
        "labels": torch.randint(0, 10, (128,), generator=generator),
    }


def stepper(trainer: Any, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """One whole optimizer step as the Trainer's loop takes it: forward, backward, clip, step, zero."""
    trainer.create_optimizer_and_scheduler(100_000)
    model = trainer.accelerator.prepare(trainer.model)
    optimizer = trainer.accelerator.prepare(trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1  # what the loop would have set
    items = (batch["labels"] != -100).sum()

    def step() -> None:
        trainer.training_step(model, dict(batch), items)
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()

    return step


def interleaved(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, taken in turn, every other round backwards: nobody always follows the same one."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 2):
        for name, side in list(sides.items())[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            side()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def step_time(name: str, rounds: int) -> None:
    text = name.startswith("Marian")
    build: Callable[[], PreTrainedModel] = marian if text else resnet20
    batch = sentences() if text else images()
    arguments = (Seq2SeqTrainingArguments if text else TrainingArguments)(
        tempfile.mkdtemp(), use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False
    )
    stock, ours = (Seq2SeqTrainer, Seq2SeqCompressionTrainer) if text else (Trainer, CompressionTrainer)
    teacher = freeze(build())

    def teach() -> None:
        with torch.no_grad():
            teacher(**{k: v for k, v in batch.items() if k != "labels"})

    sides = {
        "plain": stepper(stock(model=build(), args=arguments), batch),
        "teacher": teach,
        **{
            method: stepper(ours(model=build(), args=arguments, compression=compression(method)), batch)
            for method in METHODS
            if not (text and "dft" in method)
        },
    }
    found = interleaved(sides, rounds)
    for method in [side for side in sides if side != "plain"]:
        bound = "" if method == "teacher" else "≤ 1.05" if method == "uniform" else "≤ 1.15"
        what = "a teacher of the same size, forward" if method == "teacher" else f"step, {method}"
        row(f"{what}, {name}", f"{found[method] / found['plain']:.3f} × plain", bound, "")


def generate_time(rounds: int) -> None:
    plain, trained = marian().eval(), marian().eval()
    arguments = Seq2SeqTrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to=[], dataloader_pin_memory=False)
    trainer = Seq2SeqCompressionTrainer(model=trained, args=arguments, compression=compression("uniform"))
    ids = sentences()["input_ids"][:8]

    def generate(model: PreTrainedModel) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                # the same number of tokens on both sides, whatever the weights say
                model.generate(ids, max_new_tokens=20, min_new_tokens=20)

        return run

    found = interleaved({"plain": generate(plain), "in training": generate(trainer.model)}, rounds)
    row(
        "generate(), 20 tokens, model in training", f"{found['in training'] / found['plain']:.3f} × plain", "≤ 1.01", ""
    )


def memory() -> None:
    peaks = {}
    for side in ("plain", *METHODS):
        done = subprocess.run([sys.executable, __file__, "--peak", side], capture_output=True, text=True, check=True)
        peaks[side] = json.loads(done.stdout.splitlines()[-1])
    weights = peaks["plain"]["weights"]
    for side in METHODS:
        copies = (peaks[side]["peak"] - peaks["plain"]["peak"]) / weights
        bound = "≤ 2" if side == "uniform" else "≤ 3"
        note = f"{peaks['plain']['peak'] / 1e6:.0f} MB plain"
        row(f"peak memory, {side}, Marian {weights / 4e6:.0f} M", f"+ {copies:.2f} copies of the weights", bound, note)


def peak(side: str) -> None:
    """Peak resident memory of three training steps of a larger model, so that weights outweigh activations."""
    model = marian(512, 6)
    arguments = Seq2SeqTrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to=[], dataloader_pin_memory=False)
    trainer = (
        Seq2SeqTrainer(model=model, args=arguments)
        if side == "plain"
        else Seq2SeqCompressionTrainer(model=model, args=arguments, compression=compression(side))
    )
    step = stepper(trainer, {name: tensor[:2] for name, tensor in sentences().items()})
    for _ in range(3):
        step()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "weights": weights}))


def file_size() -> None:
    for name, model in (("Marian 256, 3+3", marian()), ("ResNet-20", resnet20())):
        compressor = Compressor(model, [Rule(method=Uniform(bits=4), kinds=MATRICES)])
        folder = tempfile.mkdtemp()
        total = checkpoint.save(model, folder, compressor).total
        limit = 0.0
        for entry in compressor.entries.values():
            for part in entry.method.describe(entry.latents, entry.slot).values():
                limit += part.entropy() / 8 if isinstance(part, Symbols) else part.nbytes
        reader = checkpoint.read(folder)
        limit += sum(t.arrays for t in checkpoint.sizes(reader).tensors if t.method == "as it is")
        note = f"{total:,} bytes; entropies, scales and unclaimed arrays are {limit:,.0f}"
        measured = f"limit · {total / limit:.5f}, {total - limit:+,.0f} bytes"
        row(f"file, 4 bit, bucket 256, {name}", measured, "limit · 1.001 + 4096", note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", default="", help="of: steps, Marian; steps, ResNet-20; generate(); memory; file")
    parser.add_argument("--peak", choices=("plain", *METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        peak(options.peak)
        return
    row("what", "measured", "bound", "")
    row("---", "---", "---", "---")
    parts: dict[str, Callable[[], None]] = {
        "steps, Marian": lambda: step_time("Marian 256, 3+3, 64 × 24 tokens", options.rounds),
        "steps, ResNet-20": lambda: step_time("ResNet-20, batch 128", options.rounds),
        "generate()": lambda: generate_time(options.rounds),
        "memory": memory,
        "file": file_size,
    }
    for name, part in parts.items():
        if options.only in name:
            part()


if __name__ == "__main__":
    main()
