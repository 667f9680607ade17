"""`hfcompress compare`: the networks of runs, as transformers and as CTranslate2 run them: bytes, scores and speed."""

import gzip
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer

from hfcompress import report
from hfcompress.comparison import (
    CTRANSLATE2,
    Against,
    Compared,
    Comparison,
    Speed,
    beam_name,
    plot,
    print_table,
    write_table,
)
from hfcompress.evaluate import corpus_scores, differences, translated
from hfcompress.files import write_atomically
from hfcompress.measure import key_of
from hfcompress.networks import from_pretrained
from hfcompress.progress import bar, quiet_libraries
from hfcompress.sides import Side, sides_of
from hfcompress.stages import fingerprint
from hfcompress.tasks import scoring_settings, task_of


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

    Translations are kept in `output`/translations.json, and taken from there by the next call. Raises as `sides_of`.
    """
    quiet_libraries()
    with TemporaryDirectory() as folder, bar(console) as shown:
        sides = list(sides_of(runs, Path(folder)))
        recipes = {side.test: side.recipe for side in sides}  # of a test set the same rows, whichever
        tests = {test: task_of(recipe, data_root).rows("test") for test, recipe in recipes.items()}
        said = _Translations(output / "translations.json", data_root)
        counts = sorted({1, beams})
        line = shown.add_task("translating", total=len(sides) * len(counts), note="")
        outputs: dict[tuple[int, int], list[str]] = {}
        for i, side in enumerate(sides):
            for count in counts:
                note = f"{side.model}, {side.engine}, {beam_name(count)}"
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


# ------------------------------------------------------------------------------------------ scores


class _Translations:
    """All translations of a test set, kept in a file by what they depend on."""

    def __init__(self, path: Path, data_root: Path | None) -> None:
        self.path, self.data_root = path, data_root
        self.machine = report.versions(), report.hardware()
        self.kept: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def of(self, side: Side, beams: int, sources: list[str]) -> list[str]:
        """By so many beams, in batches of like length, longest first."""
        asked = scoring_settings(side.recipe, self.data_root), *self.machine, side.engine, beams
        key = key_of(side.folder, fingerprint(*asked), ())
        if key not in self.kept:
            self.kept[key] = translated(side.translator(beams), sources, side.recipe.evaluation.batch_size)
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
        texts: list[list[str]] = [[] for _ in sides]
        for turn in range(rounds + 1):
            for i in list(range(len(sides)))[:: 1 if turn % 2 else -1]:
                started = time.perf_counter()
                texts[i] = [text for part in given[i] for text in translators[i](part)]
                seconds[i].append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    for i, own in enumerate(seconds):
        median, count = statistics.median(own[1:]), sum(map(len, given[i]))
        yield Speed(beams, batch, _tokens(sides[i], texts[i]) / median, 1000 * median / count)


def _sample(sources: list[str], count: int, batch: int) -> list[list[str]]:
    """So many sentences, evenly spread over the test set, in batches of like length."""
    step = max(len(sources) / count, 1.0)
    chosen = sorted((sources[int(i * step)] for i in range(min(count, len(sources)))), key=len)
    return [chosen[i : i + batch] for i in range(0, len(chosen), batch)]


def _tokens(side: Side, texts: list[str]) -> int:
    tokenizer: Any = from_pretrained(AutoTokenizer, str(side.folder))
    return sum(map(len, tokenizer(text_target=texts)["input_ids"]))
