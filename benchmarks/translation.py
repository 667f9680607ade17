"""How fast translation is: a teacher, its student, that student's compressed file, and its CTranslate2 export in int8.

    python benchmarks/translation.py [--rounds 7] [--tokens 16] [--folder RUN …] [--only TEXT]

Networks of random weights (Marian, 8,000 tokens unless a row says otherwise); every sentence is translated into the
same number of tokens, whatever the weights say, and lengths of sources are those of captions. One thread; in each round
every row is timed once, in turn, every other round backwards; a cell is the median. Rows that show one thing alone: the
same network with a decoder of two layers; the same student before its vocabulary is trimmed.

--folder: what `hfcompress run` made, whose teacher, student and file are timed in the same rounds, with their BLEU.
Needs the extra `export`. The machine should be quiet.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import ctranslate2
import torch
from datasets import Dataset
from rich.progress import track
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from hfcompress import Compressor, Dense, Kind, Rule, Uniform, checkpoint
from hfcompress.evaluate import weight_bytes
from hfcompress.export_ctranslate2 import to_ctranslate2
from hfcompress.networks import parameters
from hfcompress.results import Results
from hfcompress.schema import TranslationData, Vocabulary
from hfcompress.tokenizer import train_tokenizer

LENGTHS = (
    *(8, 9, 9, 10, 11, 11, 11, 12, 12, 13, 13, 13, 14, 14, 14, 15),
    *(15, 15, 16, 16, 17, 17, 18, 18, 19, 19, 20, 21, 23, 25, 28, 33),
)
"""Pieces of German captions (Multi30k, test_2016_flickr, 8,000 pieces): every 32nd part of their distribution."""
BATCHES = (1, 16, 32)
BEAMS = (1, 4)
LEAST = 8
"""So many sentences at least are translated for one measurement."""
TRIMMED, WHOLE = 8_000, 32_000
RULES = (
    Rule(method=Uniform(bits=4, bucket=256), kinds=(Kind.LINEAR, Kind.EMBEDDING)),
    Rule(method=Dense()),
)

Translate = Callable[[list[list[int]], int, int], list[int]]
"""(a batch of sources as ids, beams, tokens) → how many tokens each translation has."""


@dataclass(frozen=True)
class Side:
    """A row of the table. bytes: of its weights on disk; vocabulary: ids of which sources are drawn."""

    name: str
    parameters: int
    bytes: int
    vocabulary: int
    translate: Translate
    bleu: str = ""


# ------------------------------------------------------------------------------------------ what is timed


def by_transformers(model: PreTrainedModel) -> Translate:
    model = model.eval()
    pad = model.config.pad_token_id

    def translate(sources: list[list[int]], beams: int, tokens: int) -> list[int]:
        longest = max(map(len, sources))
        ids = torch.tensor([source + [pad] * (longest - len(source)) for source in sources])
        exactly = {"max_new_tokens": tokens, "min_new_tokens": tokens, "max_length": None, "forced_eos_token_id": None}
        with torch.inference_mode():
            found = model.generate(ids, attention_mask=(ids != pad).long(), num_beams=beams, do_sample=False, **exactly)
        return [found.shape[1] - 1] * len(found)  # without the token that starts it

    return translate


def by_ctranslate2(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Translate:
    translator = ctranslate2.Translator(
        str(folder), device="cpu", compute_type="int8", inter_threads=1, intra_threads=1
    )

    def translate(sources: list[list[int]], beams: int, tokens: int) -> list[int]:
        found = translator.translate_batch(
            [tokenizer.convert_ids_to_tokens(source) for source in sources],
            beam_size=beams,
            min_decoding_length=tokens,
            max_decoding_length=tokens,
            max_input_length=0,
        )
        return [len(line.hypotheses[0]) for line in found]

    return translate


def exported(model: PreTrainedModel, folder: Path, output: Path) -> tuple[Translate, int]:
    """CTranslate2's int8 form of `model`, whose tokenizer is in `folder`, and its bytes."""
    list(to_ctranslate2(model, folder, output, "int8", None))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return by_ctranslate2(output, tokenizer), (output / "model.bin").stat().st_size


# ------------------------------------------------------------------------------------------ random weights


def marian(d: int, decoder_layers: int, vocabulary: int) -> MarianMTModel:
    torch.manual_seed(0)
    heads = d // 64
    return MarianMTModel(
        MarianConfig(
            vocab_size=vocabulary,
            d_model=d,
            encoder_layers=6,
            decoder_layers=decoder_layers,
            encoder_ffn_dim=4 * d,
            decoder_ffn_dim=4 * d,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            pad_token_id=vocabulary - 1,
            decoder_start_token_id=vocabulary - 1,
            bad_words_ids=[[vocabulary - 1]],
            eos_token_id=0,
            scale_embedding=True,
        )
    )


def tokenizer_of(size: int, folder: Path) -> None:
    """A tokenizer of so many ids in `folder`: a few pieces learnt from letters, and words that no text has."""
    letters = [chr(ord("a") + i) + chr(ord("a") + j) for i in range(26) for j in range(26)]
    few = Dataset.from_dict({"source": letters, "target": letters})
    train_tokenizer(few, TranslationData(embedded="cldr", source="de", target="en"), Vocabulary(size=40), folder)
    pieces = list(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    assert pieces[-1] == "<pad>"  # the last id, as Marian has it
    words = [*pieces[:-1], *(f"word{i}" for i in range(size - len(pieces))), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    spm, vocabulary = str(folder / "source.spm"), str(folder / "vocab.json")
    tokenizer = MarianTokenizer(source_spm=spm, target_spm=spm, vocab=vocabulary)
    assert len(tokenizer) == size
    tokenizer.save_pretrained(folder)


def random_networks(root: Path) -> Iterator[Side]:
    for name, d, layers, vocabulary in (
        ("teacher, 6+6, d=512", 512, 6, TRIMMED),
        ("its decoder cut, 6+2, d=512", 512, 2, TRIMMED),
        ("student, 6+2, d=256", 256, 2, TRIMMED),
        (f"student, {WHOLE:,} tokens", 256, 2, WHOLE),
    ):
        model = marian(d, layers, vocabulary)
        count = parameters(model)
        yield Side(f"{name}: transformers fp32", count, 4 * count, vocabulary, by_transformers(model))
        if d == 512:
            continue
        folder = root / str(vocabulary)
        checkpoint.save(model, folder, Compressor(model, RULES))
        tokenizer_of(vocabulary, folder)
        ours = AutoModelForSeq2SeqLM.from_pretrained(folder)
        if vocabulary == TRIMMED:
            size = weight_bytes(folder)
            yield Side(f"{name}: our 4-bit file, transformers", count, size, vocabulary, by_transformers(ours))
        translate, size = exported(ours, folder, root / f"{vocabulary}-int8")
        yield Side(f"{name}: CTranslate2 int8", count, size, vocabulary, translate)


# ------------------------------------------------------------------------------------------ a run's networks


def networks_of(run: Path, root: Path) -> Iterator[Side]:
    """Teacher, student and file of a run, and the file's export."""
    results = Results.load(run / "results.json")
    for row in results.rows:
        if row.name == "post_training":
            continue
        folder = run / ("student" if row.name == "compressed" else f"stages/{row.name}")
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
        vocabulary, name, bleu = model.config.vocab_size, f"{run.name}, {row.title}", f"{row.scores['bleu'].value:.2f}"
        yield Side(f"{name}: transformers fp32", row.parameters, row.bytes, vocabulary, by_transformers(model), bleu)
        if row.name == "compressed":
            translate, size = exported(model, folder, root / f"{run.name}-int8")
            yield Side(f"{name}: CTranslate2 int8", row.parameters, size, vocabulary, translate)


# ------------------------------------------------------------------------------------------ timing


def sources(vocabulary: int, batch: int) -> list[list[list[int]]]:
    """Batches of random ids, `LEAST` sentences or more, their lengths spread over those of captions; like together."""
    count = max(LEAST, batch)
    step = len(LENGTHS) / count
    generator = torch.Generator().manual_seed(0)
    lengths = sorted(LENGTHS[int((i + 0.5) * step)] for i in range(count))
    drawn = [torch.randint(2, vocabulary - 1, (n - 1,), generator=generator).tolist() for n in lengths]
    ended = [[*ids, 0] for ids in drawn]
    return [ended[i : i + batch] for i in range(0, count, batch)]


def timed(sides: list[Side], beams: int, batch: int, tokens: int, rounds: int) -> list[tuple[float, float]]:
    """Of each side (tokens a second, milliseconds a sentence), medians over the rounds; one more round warms up."""
    seconds: list[list[float]] = [[] for _ in sides]
    given = [sources(side.vocabulary, batch) for side in sides]
    count = sum(map(len, given[0]))
    for turn in range(rounds + 1):
        for i in list(range(len(sides)))[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            found = [n for part in given[i] for n in sides[i].translate(part, beams, tokens)]
            if turn:
                seconds[i].append(time.perf_counter() - started)
            assert found == [tokens] * count, f"{sides[i].name} wrote {found} tokens, not {tokens} each"
    return [(count * tokens / s, 1000 * s / count) for s in map(statistics.median, seconds)]


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16, help="of every translation")
    parser.add_argument("--folder", type=Path, action="append", default=[], help="a folder of `hfcompress run`")
    parser.add_argument("--only", default="", help="only rows whose name has this text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        sides = list(random_networks(Path(folder)))
        sides += [side for run in options.folder for side in networks_of(run, Path(folder))]
        sides = [side for side in sides if options.only in side.name]
        cases = [(beams, batch) for beams in BEAMS for batch in BATCHES]
        measured = [
            timed(sides, beams, batch, options.tokens, options.rounds)
            for beams, batch in track(cases, "timing", transient=True)
        ]
    said = [f"{'greedy' if beams == 1 else f'beam {beams}'}, batch {batch}" for beams, batch in cases]
    print(f"Tokens a second (milliseconds a sentence), one thread, medians of {options.rounds} rounds:\n")
    row("network", "parameters", "bytes", "BLEU", *said)
    row("---", "---:", "---:", "---:", *("---:" for _ in said))
    for i, side in enumerate(sides):
        cells = [f"{speed:,.0f} ({each:.1f})" for speed, each in (case[i] for case in measured)]
        row(side.name, f"{side.parameters:,}", f"{side.bytes:,}", side.bleu, *cells)
    print(f"\nTimes as fast as {sides[0].name}:\n")
    row("network", *said)
    row("---", *("---:" for _ in said))
    for i, side in enumerate(sides):
        row(side.name, *(f"{case[i][0] / case[0][0]:.2f}" for case in measured))


if __name__ == "__main__":
    main()
