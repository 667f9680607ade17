"""`hfcompress compare`: the networks of runs, as transformers and as CTranslate2 run them: bytes, scores and speed."""

import gzip
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hfcompress import report
from hfcompress.backends import Generate, converted_backend, converter, encode
from hfcompress.card_text import data_name
from hfcompress.comparison import (
    CTRANSLATE2,
    TRANSFORMERS,
    Against,
    Compared,
    Comparison,
    Speed,
    plot,
    print_table,
    write_table,
)
from hfcompress.errors import ConfigError
from hfcompress.evaluate import corpus_scores, differences, weight_files
from hfcompress.files import write_atomically
from hfcompress.measure import key_of
from hfcompress.networks import from_pretrained
from hfcompress.output import RECIPE, RESULTS, STAGES
from hfcompress.progress import bar, quiet_libraries
from hfcompress.recipe import load
from hfcompress.results import Results
from hfcompress.schema import Recipe, Sequences
from hfcompress.scoring import told_apart
from hfcompress.stages import fingerprint
from hfcompress.tasks import scoring_settings, task_of

Translate = Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class Side:
    """A network as an engine runs it. `folder` has its own files, `converted` those of CTranslate2.

    `key`: of its files; `student`: of the full-precision student's of its run.
    """

    test: str
    model: str
    engine: str
    folder: Path
    converted: Path | None
    parameters: int
    recipe: Recipe
    key: str
    student: str

    def translator(self, beams: int, threads: int = 0) -> Translate:
        """What translates sentences with so many beams."""
        settings = Sequences(beams=beams, n_best=1, max_new_tokens=self.recipe.evaluation.max_new_tokens)
        tokenizer = from_pretrained(AutoTokenizer, str(self.folder))
        model = from_pretrained(AutoModelForSeq2SeqLM, str(self.folder)).eval()
        if self.converted is not None:
            translate = converted_backend(self.converted, model.generation_config, tokenizer, settings, threads)
            return lambda sentences: [best for (best,) in translate(sentences)]
        generate = Generate(model, tokenizer, settings)
        return lambda sentences: [best for (best,) in generate(sentences, encode(model, tokenizer, sentences))]

    def files(self) -> list[Path]:
        """Of its weights."""
        return weight_files(self.folder) if self.converted is None else [self.converted / "model.bin"]


def compare(
    runs: Sequence[Path],
    output: Path,
    data_root: Path | None,
    *,
    beams: int,
    batches: Sequence[int],
    sentences: int,
    rounds: int,
    console: Console,
) -> Comparison:
    """Score and time the teachers, students and compressed files of `runs` and their exports; write table and plot.

    Translations are kept in `output`/translations.json, and taken from there by the next call. Raises ConfigError: a
    folder that is no run of a translation recipe, CTranslate2 is not installed; DataError, FormatError: its files.
    """
    quiet_libraries()
    converter()  # before anything takes time
    with TemporaryDirectory() as folder, bar(console) as shown:
        sides = list(_sides(runs, Path(folder)))
        tests = {side.test: task_of(side.recipe, data_root).rows("test") for side in sides}
        said = _Translations(output / "translations.json", data_root)
        counts = sorted({1, beams})
        line = shown.add_task("translating", total=len(sides) * len(counts), note="")
        outputs: dict[tuple[int, int], list[str]] = {}
        for i, side in enumerate(sides):
            for count in counts:
                note = f"{side.model}, {side.engine}, {'greedy' if count == 1 else f'beam {count}'}"
                shown.update(line, note=note)
                outputs[i, count] = said.of(side, count, list(tests[side.test]["source"]))
                if not console.is_terminal:
                    console.print(f"translated: {side.test}: {note}", markup=False, highlight=False)
                shown.advance(line)
        line = shown.add_task("timing", total=len(counts) * len(batches), note="")
        speeds: list[list[Speed]] = [[] for _ in sides]
        for count in counts:
            for batch in batches:
                for own, speed in zip(speeds, _timed(sides, tests, count, batch, sentences, rounds)):
                    own.append(speed)
                shown.advance(line)
        rows = tuple(_rows(sides, tests, outputs, counts, speeds))
        versions = {**report.versions(), "ctranslate2": version("ctranslate2")}
        found = Comparison(rows, sentences, rounds, versions, report.hardware())
    found.save(output / "comparison.json")
    write_table(found, output / "table.md")
    plot(found, output / "plot.png")
    print_table(found, console)
    return found


# ------------------------------------------------------------------------------------------ what is compared


def _sides(runs: Sequence[Path], root: Path) -> Iterator[Side]:
    """By test set and role; a network that several runs share comes once. Each by transformers, then by CTranslate2."""
    opened = [(run, *_open(run)) for run in dict.fromkeys(runs)]
    for test in dict.fromkeys(_test(recipe) for _, recipe, _ in opened):
        own = [found for found in opened if _test(found[1]) == test]
        labels = _labels([run for run, _, _ in own])
        for role in ("teacher", "student", "compressed"):
            seen: set[str] = set()
            for run, recipe, results in own:
                row, folder = results.row(role), _folder(run, role)
                if row is None or (key := key_of(folder, "", ())) in seen:
                    continue
                title = f"{row.bits_per_weight:.2f} bits" if role == "compressed" else row.title
                told = seen or (role == "compressed" and len(own) > 1)
                name, converted = f"{title}, {labels[run]}" if told else title, root / key
                seen.add(key)
                list(converter()(from_pretrained(AutoModelForSeq2SeqLM, str(folder)), folder, converted, "int8", None))
                keys = key, key_of(_folder(run, "student"), "", ())
                for engine, place in ((TRANSFORMERS, None), (CTRANSLATE2, converted)):
                    yield Side(test, name, engine, folder, place, row.parameters, recipe, *keys)


def _folder(run: Path, role: str) -> Path:
    return run / "student" if role == "compressed" else run / STAGES / role


def _labels(runs: Sequence[Path]) -> dict[Path, str]:
    """What tells the runs' folders apart, without what all of them end in (a sweep's `seed-0`)."""
    parts = {run: run.parts for run in runs}
    while len(runs) > 1 and len({own[-1] for own in parts.values()}) == 1:
        parts = {run: own[:-1] for run, own in parts.items()}
    short = {run: str(Path(*own)) for run, own in parts.items()}
    told = told_apart(list(short.values()))
    return {run: told[name] for run, name in short.items()}


def _open(run: Path) -> tuple[Recipe, Results]:
    if not (run / RESULTS).is_file() or not (run / RECIPE).is_file():
        raise ConfigError(f"{run} is no finished run: expected {RESULTS} and {RECIPE}, as `hfcompress run` leaves them")
    (recipe,) = load(run / RECIPE)
    if recipe.translation is None:
        raise ConfigError(f"{run} is a run of an image recipe; only translation is compared")
    return recipe, Results.load(run / RESULTS)


def _test(recipe: Recipe) -> str:
    data = recipe.translation
    assert data is not None
    return f"{data_name(recipe)} {data.source}→{data.target}, {data.test}"


# ------------------------------------------------------------------------------------------ scores


class _Translations:
    """All translations of a test set, kept in a file by what they depend on."""

    def __init__(self, path: Path, data_root: Path | None) -> None:
        self.path, self.data_root = path, data_root
        self.kept: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def of(self, side: Side, beams: int, sources: list[str]) -> list[str]:
        """By so many beams, in batches of like length, longest first."""
        asked = scoring_settings(side.recipe, self.data_root), report.versions(), report.hardware(), side.engine, beams
        key = key_of(side.folder, fingerprint(*asked), ())
        if key not in self.kept:
            translate, size = side.translator(beams), side.recipe.evaluation.batch_size
            outputs = [""] * len(sources)
            order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                for i, text in zip(rows, translate([sources[i] for i in rows])):
                    outputs[i] = text
            self.kept[key] = outputs
            write_atomically(self.path, json.dumps(self.kept, ensure_ascii=False, indent=0).encode())
        return self.kept[key]


def _rows(
    sides: Sequence[Side],
    tests: dict[str, Dataset],
    outputs: dict[tuple[int, int], list[str]],
    counts: Sequence[int],
    speeds: Sequence[Sequence[Speed]],
) -> Iterator[Compared]:
    against = _against(sides, tests, outputs, counts[-1])
    for i, side in enumerate(sides):
        references, resamples = list(tests[side.test]["target"]), side.recipe.evaluation.bootstrap
        scores = {count: corpus_scores(outputs[i, count], references, resamples) for count in counts}
        size = sum(file.stat().st_size for file in side.files())
        gzipped = sum(len(gzip.compress(file.read_bytes(), compresslevel=9, mtime=0)) for file in side.files())
        names = side.test, side.model, side.engine
        yield Compared(*names, side.parameters, size, gzipped, scores, against.get(i), tuple(speeds[i]))


def _against(
    sides: Sequence[Side], tests: dict[str, Dataset], outputs: dict[tuple[int, int], list[str]], beams: int
) -> dict[int, Against]:
    """Each side against the full-precision student of its run in int8."""
    found: dict[int, Against] = {}
    for base, student in enumerate(sides):
        if student.engine != CTRANSLATE2 or student.key != student.student:
            continue
        alike = [i for i, side in enumerate(sides) if (side.test, side.student) == (student.test, student.key)]
        others = {str(i): outputs[i, beams] for i in alike if i != base}
        references, resamples = list(tests[student.test]["target"]), student.recipe.evaluation.bootstrap
        tested, _ = differences(outputs[base, beams], others, references, resamples)
        found |= {int(i): Against(0.0 - difference, p_value) for i, (difference, p_value) in tested.items()}
    return found


# ------------------------------------------------------------------------------------------ speed


def _timed(
    sides: Sequence[Side], tests: dict[str, Dataset], beams: int, batch: int, sentences: int, rounds: int
) -> Iterator[Speed]:
    """Of each side on one thread; every other round goes backwards, and one more warms up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        translators = [side.translator(beams, threads=1) for side in sides]
        given = [_sample(list(tests[side.test]["source"]), sentences, batch) for side in sides]
        seconds: list[list[float]] = [[] for _ in sides]
        counts = [0] * len(sides)
        for turn in range(rounds + 1):
            for i in list(range(len(sides)))[:: 1 if turn % 2 else -1]:
                started = time.perf_counter()
                texts = [text for part in given[i] for text in translators[i](part)]
                seconds[i].append(time.perf_counter() - started)
                counts[i] = _tokens(sides[i], texts)
    finally:
        torch.set_num_threads(threads)
    for i, own in enumerate(seconds):
        median, count = statistics.median(own[1:]), sum(map(len, given[i]))
        yield Speed(beams, batch, counts[i] / median, 1000 * median / count)


def _sample(sources: list[str], count: int, batch: int) -> list[list[str]]:
    """So many sentences, evenly spread over the test set, in batches of like length."""
    step = max(len(sources) / count, 1.0)
    chosen = sorted((sources[int(i * step)] for i in range(min(count, len(sources)))), key=len)
    return [chosen[i : i + batch] for i in range(0, len(chosen), batch)]


def _tokens(side: Side, texts: list[str]) -> int:
    tokenizer: Any = from_pretrained(AutoTokenizer, str(side.folder))
    return sum(map(len, tokenizer(text_target=texts)["input_ids"]))
