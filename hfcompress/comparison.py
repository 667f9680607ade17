"""What `hfcompress compare` found: bytes, scores and speeds of networks that translate; as a table, and as a plot."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import FiniteFloat, NonNegativeInt, TypeAdapter
from pydantic.dataclasses import dataclass as checked
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Shown

from hfcompress.card_text import Table, hardware_words, markdown_table
from hfcompress.files import write_atomically
from hfcompress.report import entitle, plus_minus, readable_sizes, save_picture
from hfcompress.results import METRICS, Score

TRANSFORMERS, CTRANSLATE2 = "transformers", "CTranslate2 int8"
_STYLES = {TRANSFORMERS: ("#D55E00", "o"), CTRANSLATE2: ("#0072B2", "s")}


@checked(frozen=True)
class Speed:
    """On one thread of the CPU, a median over rounds in which all networks took turns."""

    beams: int
    batch: int
    tokens_per_second: FiniteFloat
    ms_per_sentence: FiniteFloat


@checked(frozen=True)
class Against:
    """BLEU minus that of the full-precision student in int8, and the p-value of no difference (paired bootstrap)."""

    difference: FiniteFloat
    p_value: FiniteFloat


@checked(frozen=True)
class Compared:
    """A network as one engine runs it. bytes: of its weights on disk; gzipped: the same after gzip.

    scores: number of beams → metric → score; `against` is of the most beams, None for the baseline itself.
    """

    test: str
    model: str
    engine: str
    parameters: NonNegativeInt
    bytes: NonNegativeInt
    gzipped: NonNegativeInt
    scores: dict[int, dict[str, Score]]
    against: Against | None
    speeds: tuple[Speed, ...]

    @property
    def bits(self) -> float:
        return 8 * self.bytes / self.parameters

    @property
    def best(self) -> dict[str, Score]:
        """The scores of the most beams."""
        return self.scores[max(self.scores)]


@checked(frozen=True)
class Comparison:
    """All rows, in the order of the table; `sentences`, `rounds`: of the timing."""

    rows: tuple[Compared, ...]
    sentences: int
    rounds: int
    versions: dict[str, str]
    hardware: dict[str, Any]

    def save(self, path: Path) -> None:
        write_atomically(path, (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "Comparison":
        return TypeAdapter(cls).validate_json(path.read_bytes())

    @property
    def tests(self) -> list[str]:
        return list(dict.fromkeys(row.test for row in self.rows))


def write_table(found: Comparison, path: Path) -> None:
    """Markdown: one table, and how its numbers came to be."""
    write_atomically(path, ("\n\n".join(_sections(found)) + "\n").encode())


def _sections(found: Comparison) -> Iterator[str]:
    yield "# Translation: bytes, scores and speed"
    yield (
        "Each row is a network as one engine loads it from its files. gzipped: its weights after gzip. ± half the 95 % "
        "interval. against int8: BLEU, with the most beams, minus that of the same run's full-precision student as "
        f"{CTRANSLATE2}, with the p-value of paired bootstrap resampling. Speeds: tokens a second (milliseconds a "
        f"sentence), one thread, medians of {found.rounds} rounds in which all rows took turns, {found.sentences} "
        "sentences of the test set, tokenizing included."
    )
    for test in found.tests:
        yield f"## {test}"
        yield markdown_table(_table([row for row in found.rows if row.test == test]), "llrrrrrr")
    signatures = sorted({s.signature for row in found.rows for scores in row.scores.values() for s in scores.values()})
    yield "Signatures: " + ", ".join(f"`{signature}`" for signature in signatures) + "."
    kept = ("hfcompress", "torch", "transformers", "ctranslate2")
    versions = ", ".join(f"{name} {found.versions[name]}" for name in kept if name in found.versions)
    yield f"{hardware_words(found.hardware)}. {versions}."
    yield "![BLEU against bytes](plot.png)"


def _table(rows: Sequence[Compared]) -> Table:
    beams = list(rows[0].scores)
    speeds = [f"{beam_name(speed.beams)}, batch {speed.batch}" for speed in rows[0].speeds]
    scores = [f"{METRICS[metric].name}, {beam_name(b)}" for b in beams for metric in rows[0].scores[b]]
    table = [["network", "engine", "parameters", "bytes", "bits a weight", "gzipped", *scores, "against int8", *speeds]]
    for row in rows:
        values = [plus_minus(score) for b in beams for score in row.scores[b].values()]
        times = [f"{speed.tokens_per_second:,.0f} ({speed.ms_per_sentence:.1f})" for speed in row.speeds]
        sizes = [f"{row.parameters:,}", f"{row.bytes:,}", f"{row.bits:.2f}", f"{row.gzipped:,}"]
        table.append([row.model, row.engine, *sizes, *values, _against(row), *times])
    return table


def _against(row: Compared) -> str:
    return f"{row.against.difference:+.2f} (p = {row.against.p_value:.3f})" if row.against else ""


def print_table(found: Comparison, console: Console) -> None:
    """What matters most of each row: for a terminal."""
    for test in found.tests:
        rows = [row for row in found.rows if row.test == test]
        beams, batch = beam_name(max(rows[0].scores)), rows[0].speeds[0].batch
        speed = f"tokens/s, {beam_name(rows[0].speeds[0].beams)}, batch {batch}"
        table = Shown("network", "engine", "bytes", "bits", f"BLEU, {beams}", "against int8", speed, title=escape(test))
        for row in rows:
            score, fast = plus_minus(row.best["bleu"]), f"{row.speeds[0].tokens_per_second:,.0f}"
            cells = [row.model, row.engine, f"{row.bytes:,}", f"{row.bits:.2f}", score, _against(row), fast]
            table.add_row(*map(escape, cells))
        console.print(table)


def beam_name(beams: int) -> str:
    """How a search with so many beams is called."""
    return "greedy" if beams == 1 else f"beam {beams}"


def plot(found: Comparison, path: Path) -> None:
    """BLEU against bytes (log), a panel a test set."""
    figure = Figure((8.4, 4.2 * len(found.tests)), dpi=150, layout="constrained")
    panels = figure.subplots(len(found.tests), squeeze=False)[:, 0]
    for axes, test in zip(panels, found.tests):
        _draw(axes, [row for row in found.rows if row.test == test])
        entitle(axes, test)
    save_picture(figure, path)


def _draw(axes: Axes, rows: Sequence[Compared]) -> None:
    for engine in dict.fromkeys(row.engine for row in rows):
        own = [(row.bytes, row.best["bleu"]) for row in rows if row.engine == engine]
        colour, marker = _STYLES[engine]
        sizes, values = [size for size, _ in own], [score.value for _, score in own]
        axes.plot(sizes, values, color=colour, marker=marker, linestyle="", markersize=5, label=engine)
        if engine == TRANSFORMERS:  # the other's intervals are as wide, and lie on one another
            for size, score in own:
                axes.plot([size, size], score.interval, color=colour, linewidth=0.7)
    named = sorted((row for row in rows if row.engine == TRANSFORMERS), key=lambda row: row.best["bleu"].value)
    for place, row in enumerate(named):
        axes.annotate(
            row.model,
            (row.bytes, row.best["bleu"].value),
            xytext=(6, 7 if place % 2 else -13),
            textcoords="offset points",
            fontsize=7.5,
        )
    axes.set(xlabel="bytes of the weights on disk", ylabel=METRICS["bleu"].heading, xscale="log")
    least, most = min(row.bytes for row in rows), max(row.bytes for row in rows)
    axes.set_xlim(least / 1.5, most * 3)  # room for the names
    readable_sizes(axes)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
