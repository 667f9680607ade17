"""What the stage that translates the training side costs beside plain `generate`.

    python benchmarks/translation_stage.py TEACHER SENTENCES.jsonl.gz --source de --target en [--rows 512] [--rounds 3]

Plain: batches of sentences sorted by length, through the tokenizer, `generate` and back. The stage does that, chooses
by chrF among the n best, scores what it chose by the teacher's cross-entropy, and writes shards. torch has one thread,
chrF another; sides in turn, every other round backwards. The machine should be quiet.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hfcompress.backends import Generate, encode
from hfcompress.schema import Sequences
from hfcompress.translate import Text, translate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("sentences")
    parser.add_argument("--source", default="de")
    parser.add_argument("--target", default="en")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForSeq2SeqLM.from_pretrained(options.teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    rows = load_dataset("json", data_files=options.sentences, split="train").select(range(options.rows))
    pairs = rows["translation"] if "translation" in rows.column_names else rows
    sources, references = ([pair[side] for pair in pairs] for side in (options.source, options.target))
    settings = Sequences(max_new_tokens=64)
    backend = Generate(model, tokenizer, settings)
    by_length = sorted(sources, key=lambda s: len(tokenizer(s)["input_ids"]))

    def plain() -> None:
        for begin in range(0, len(by_length), settings.batch_size):
            batch = by_length[begin : begin + settings.batch_size]
            backend(batch, encode(model, tokenizer, batch))

    def stage() -> None:
        with tempfile.TemporaryDirectory() as folder:
            translate(model, tokenizer, [Text("train", sources, references)], settings, Path(folder))

    sides = {"plain": plain, "stage": stage}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.rounds):
        for name, side in list(sides.items())[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - started)
    before, after = (statistics.median(seconds[name]) for name in sides)
    print(f"| {settings.beams} beams, {settings.n_best} best | plain {len(sources) / before:.1f} sentences/s |", end="")
    print(f" stage {len(sources) / after:.1f} | {before / after:.3f} × |")


if __name__ == "__main__":
    main()
