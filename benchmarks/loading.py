"""What loading a compressed folder costs: seconds against the dense fp32 safetensors file, and peak memory.

    python benchmarks/loading.py [--rounds 9] [--bits 4] [--numpy]

A Marian of 74 million weights, by `Uniform` and as `hfcompress compress` writes it (its dependent grid), the files from
a warm disk, one thread, all sides taken in turn in one process; with --numpy numba is left alone where it is. Memory is
that of one process for each side. The dense file's weights are only mapped by safetensors: what its memory shows, and
its time does not have, is that they are read at first use. The last side is what transformers' constructor takes, which
fills every weight with random numbers: what loading must never do.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, MarianConfig, MarianMTModel
from transformers.utils import logging

from hfcompress import Compressor, Kind, Rule, Uniform, checkpoint, dequantize, load
from hfcompress.coding import rans
from hfcompress.compress import compress
from hfcompress.originals import load_original

COMPRESSED = ("uniform", "grid")
SLACK = 64 << 20
"""Bytes that loading may take besides the dense model and its largest weight."""


def marian(d: int = 512, layers: int = 6, vocabulary: int = 58_101) -> MarianMTModel:
    """As opus-mt's: 74 million weights, 30 of them one tied embedding."""
    torch.manual_seed(0)
    return MarianMTModel(
        MarianConfig(
            vocab_size=vocabulary,
            d_model=d,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_ffn_dim=4 * d,
            decoder_ffn_dim=4 * d,
            encoder_attention_heads=8,
            decoder_attention_heads=8,
            pad_token_id=vocabulary - 1,
            decoder_start_token_id=vocabulary - 1,
            eos_token_id=0,
            forced_eos_token_id=0,
        )
    ).eval()


def prepare(root: Path, bits: int, model: MarianMTModel) -> None:
    """`root`/uniform, `root`/grid, `root`/dense: one network. `root`/warm: a tiny one, compressed."""
    for name, network in (("uniform", model), ("warm", marian(16, 1, 60))):
        rule = Rule(method=Uniform(bits=bits), kinds=(Kind.LINEAR, Kind.EMBEDDING))
        checkpoint.save(network, root / name, Compressor(network, [rule]))
    dequantize(load(root / "uniform")).save_pretrained(root / "dense")
    compress(load_original(str(root / "dense")), root / "grid", bits=bits)


def seconds(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each side, by the clock and of the processor, taken in turn; the first round warms up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter(), time.process_time()
            side()
            if turn:
                taken[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return {name: (statistics.median(w for w, _ in v), statistics.median(c for _, c in v)) for name, v in taken.items()}


def peak(folder: Path | str) -> dict[str, int]:
    """Bytes that loading `folder` took at its peak, beyond what the process had before; in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--peak", str(folder)], capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _resident(what: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{what}:")[1].split()[0])


def _measure(folder: str) -> None:
    load(Path(folder).with_name("warm"))  # so that code and pools are there before the count begins
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, from what is resident now
    before = _resident("VmRSS")
    model = load(folder)
    taken = _resident("VmHWM") - before
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    print(json.dumps({"peak": taken, "dense": sum(sizes), "largest": max(sizes)}))


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--numpy", action="store_true")
    parser.add_argument("--peak")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if options.numpy:
        rans.fast = None
    if options.peak:
        _measure(options.peak)
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        prepare(root, options.bits, marian())
        row("what", "measured", "bound", "")
        row("---", "---", "---", "---")
        loading_time(root, options.rounds)
        for name in (*COMPRESSED, "dense"):
            found = peak(root / name)
            bound = found["dense"] + found["largest"] + SLACK
            note = f"weights {found['dense'] / 1e6:.0f} MB, the largest {found['largest'] / 1e6:.0f} MB"
            measured = f"{found['peak'] / 1e6:.0f} MB"
            row(f"peak memory of loading, {name}", measured, f"≤ {bound / 1e6:.0f} MB", note)


def loading_time(root: Path, rounds: int) -> None:
    def from_pretrained(name: str) -> Callable[[], object]:
        return lambda: AutoModelForSeq2SeqLM.from_pretrained(root / name)

    config = MarianConfig.from_pretrained(root / "dense")
    sides = {name: from_pretrained(name) for name in (*COMPRESSED, "dense")}
    taken = seconds({**sides, "random": lambda: MarianMTModel(config)}, rounds)
    for name in COMPRESSED:
        size = (root / name / checkpoint.FILE_NAME).stat().st_size
        wall, cpu = (taken[name][clock] / taken["dense"][clock] for clock in (0, 1))
        times = [f"{taken[side][0]:.2f} s" for side in (name, "dense", "random")]
        note = f"{times[0]} against {times[1]}; random weights {times[2]}"
        measured = f"{wall:.2f} × dense ({cpu:.2f} × in processor time)"
        row(f"from_pretrained, {name}, {size / 1e6:.1f} MB", measured, "≤ 1.0", note)


if __name__ == "__main__":
    main()
