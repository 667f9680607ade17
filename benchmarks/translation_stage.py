"""What the stage that translates the training side costs beside plain `generate`.

    python benchmarks/translation_stage.py TEACHER SENTENCES.jsonl.gz --source de --target en [--rows 512] [--rounds 3]

Plain: batches of sentences sorted by length, through the tokenizer, `generate` and back. The stage does that, chooses
by chrF among the n best, scores what it chose by the teacher's cross-entropy, and writes shards. torch has one thread,
chrF another; sides in turn, every other round backwards. CTranslate2 in float32 is timed beside them, and how many of
its best translations are others than plain's is counted. Needs the extra `export`. The machine should be quiet.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hfcompress.backends import Backend, Generate, ctranslate2_backend, encode
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
    by_length = sorted(sources, key=lambda s: len(tokenizer(s)["input_ids"]))
    best: dict[str, list[str]] = {}

    def through(name: str, backend: Backend) -> None:
        batches = [by_length[i : i + settings.batch_size] for i in range(0, len(by_length), settings.batch_size)]
        best[name] = [found[0] for batch in batches for found in backend(batch, encode(model, tokenizer, batch))]

    def stage() -> None:
        with tempfile.TemporaryDirectory() as folder:
            translate(model, tokenizer, [Text("train", sources, references)], settings, Path(folder))

    generate, converted = Generate(model, tokenizer, settings), ctranslate2_backend(model, tokenizer, settings)
    sides = {
        "plain": lambda: through("plain", generate),
        "stage": stage,
        "ctranslate2": lambda: through("ctranslate2", converted),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.rounds):
        for name, side in list(sides.items())[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - started)
    speeds = {name: len(sources) / statistics.median(own) for name, own in seconds.items()}
    others = sum(one != other for one, other in zip(best["plain"], best["ctranslate2"]))
    print(f"{settings.beams} beams, {settings.n_best} best, {len(sources)} sentences; CTranslate2's differ in {others}")
    print("| side | sentences/s | × plain |\n| --- | ---: | ---: |")
    for name, speed in speeds.items():
        print(f"| {name} | {speed:.1f} | {speed / speeds['plain']:.3f} |")


if __name__ == "__main__":
    main()
