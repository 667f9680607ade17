"""A sweep's table in Markdown, and its plot: bytes against score, with the paper's figures beside ours."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from hfcompress.card_text import Table, duration, hardware_words, markdown_table
from hfcompress.files import write_atomically
from hfcompress.report import entitle, readable_sizes, save_picture
from hfcompress.results import METRICS, Row
from hfcompress.sweep_results import Mean, PointRecord, SweepResults, mean

# Okabe and Ito's palette, and two of Tol's, which the colour-blind tell apart; each line has its own marker too
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
_LINES = tuple(zip(_COLOURS, "os^DvPX<"))
_PAPER = "#000000"
_HEIGHTS = (4, -11, 14, -21, 24, -31, 34)  # of a label over its cross, in points, in the order in which they are tried


def write_table(results: SweepResults, command: str, path: Path) -> None:
    """table.md: the chosen operating points, every point, references, the paper's figures, machines."""
    write_atomically(path, ("\n\n".join(_sections(results, command)) + "\n").encode())


def _sections(results: SweepResults, command: str) -> Iterator[str]:
    metric = METRICS[results.metric].heading
    yield f"# {results.title}"
    if results.notes:
        yield results.notes.strip()
    yield f"```bash\n{command}\n```"
    yield (
        "Bytes are those of the whole file; scores are those of the file, loaded in a fresh process: mean ± standard "
        "deviation over n seeds. × smaller: than the same network in float32."
    )
    if results.choices:
        yield (
            f"## Operating points\n\nChosen by {metric} on the validation split, never on the test split, among the "
            "points all of whose seeds were run."
        )
        yield markdown_table(_choices(results), "llrrrrr")
    yield "## All points"
    yield markdown_table(_points(results), "lrrrrrll")
    if references := _references(results):
        yield "## Full precision"
        yield markdown_table(references, "lrrrr")
    if results.paper:
        yield "## The paper's figures"
        yield markdown_table(_paper(results), "lrrl")
    if failures := _failures(results):
        yield "## What failed"
        yield "\n".join(failures)
    if machines := _machines(results):
        yield "## Machines"
        yield "\n".join(machines)


def _choices(results: SweepResults) -> Table:
    metric = METRICS[results.metric].heading
    table = [["operating point", "point", "n", "bytes", "× smaller", f"validation {metric}", f"test {metric}", "paper"]]
    figures = {figure.label: figure for figure in results.paper}
    missing = "none" if any(point.done for point in results.points) else "not run"
    for choice in results.choices:
        point = results.chosen(choice)
        figure = figures.get(choice.paper or "")
        beside = _figure(figure.bytes, figure.score) if figure else ""
        cells = _numbers(results, point) if point else ["", "", "", "", ""]
        table.append([choice.label, f"`{point.name}`" if point else missing, *cells, beside])
    return table


def _points(results: SweepResults) -> Table:
    metric = METRICS[results.metric].heading
    table = [["point", "n", "bytes", "× smaller", f"validation {metric}", f"test {metric}", "paper", "remarks"]]
    for point in results.points:
        beside = [f for f in results.paper if f.point == point.name]
        paper = "; ".join(_figure(figure.bytes, figure.score) for figure in beside)
        table.append([f"`{point.name}`", *_numbers(results, point), paper, _remarks(point)])
    return table


def _numbers(results: SweepResults, point: PointRecord) -> list[str]:
    """n, bytes, ratio, validation score, test score."""

    def shown(found: Mean | None, digits: int, thousands: bool = False) -> str:
        return found.show(digits, thousands) if found else ""

    return [
        str(len(point.done)),
        shown(point.bytes, 0, thousands=True),
        shown(point.ratio, 1),
        shown(point.score(results.metric, "validation"), 2),
        shown(point.score(results.metric, "test"), 2),
    ]


def _remarks(point: PointRecord) -> str:
    failed, missing = (sum(cell.status == status for cell in point.cells) for status in ("failed", "not run"))
    if missing == len(point.cells):
        return "not run"
    counts = [f"{failed} failed" if failed else "", f"{missing} not run" if missing else ""]
    otherwise = dict.fromkeys(text for cell in point.done for text in cell.otherwise)
    ran = "run with " + ", ".join(f"`{text}`" for text in otherwise) if otherwise else ""
    return ", ".join(remark for remark in (*counts, ran) if remark)


def _figure(size: int | None, score: float) -> str:
    return f"{score:.2f}" + (f" at {size:,} bytes" if size else "")


@dataclass
class _Reference:
    """A teacher or full-precision student that `points` share: seed → its row."""

    rows: dict[int, Row]
    points: list[str]


def _shared(results: SweepResults, role: Literal["teacher", "reference"]) -> list[_Reference]:
    """Every network of that role once, smallest first; those whose scores are equal, seed by seed, are one."""

    def same(one: dict[int, Row], other: dict[int, Row]) -> bool:
        seeds = one.keys() & other.keys()
        return bool(seeds) and all(key(one[seed]) == key(other[seed]) for seed in seeds)

    def key(row: Row) -> tuple[int, float]:
        return row.parameters, row.scores[results.metric].value

    found: list[_Reference] = []
    for point in results.points:
        own = {cell.seed: row for cell in point.done if (row := getattr(cell, role)) is not None}
        if (reference := next((r for r in found if same(own, r.rows)), None)) is not None:
            reference.rows |= own
            reference.points.append(point.name)
        elif own:
            found.append(_Reference(own, [point.name]))
    return sorted(found, key=lambda reference: next(iter(reference.rows.values())).parameters)


def _score_of(reference: _Reference, metric: str) -> Mean:
    found = mean([row.scores[metric].value for row in reference.rows.values()])
    assert found is not None
    return found


def _references(results: SweepResults) -> Table:
    """A line for each teacher and full-precision student."""
    table = [["network", "parameters", "bytes", "n", f"test {METRICS[results.metric].heading}"]]
    for role, name in (("teacher", "teacher"), ("reference", "student, full precision")):
        networks = _shared(results, role)  # type: ignore[arg-type]
        alike = [next(iter(network.rows.values())).parameters for network in networks]
        for network, parameters in zip(networks, alike):
            of = f" ({', '.join(f'`{point}`' for point in network.points)})" if alike.count(parameters) > 1 else ""
            size, n = next(iter(network.rows.values())).bytes, len(network.rows)
            table.append(
                [name + of, f"{parameters:,}", f"{size:,}", str(n), _score_of(network, results.metric).show(2)]
            )
    return table if len(table) > 1 else []


def _paper(results: SweepResults) -> Table:
    table = [["figure", "bytes", METRICS[results.metric].heading, "read in"]]
    for figure in results.paper:
        table.append([figure.label, f"{figure.bytes:,}" if figure.bytes else "", f"{figure.score:.2f}", figure.source])
    return table


def _failures(results: SweepResults) -> list[str]:
    return [
        f"- `{point.name}`, seed {cell.seed}: {cell.error}"
        for point in results.points
        for cell in point.cells
        if cell.status == "failed"
    ]


def _machines(results: SweepResults) -> list[str]:
    """Which machine each point was measured on, with the time that a run of it took there; versions."""
    found: dict[str, dict[str, list[float]]] = {}
    versions: dict[str, None] = {}
    for point in results.points:
        for cell in point.done:
            machine = hardware_words(cell.hardware or {})
            found.setdefault(machine, {}).setdefault(point.name, []).append((cell.seconds or {}).get("compressed", 0.0))
            kept = {name: (cell.versions or {}).get(name) for name in ("hfcompress", "torch", "transformers", "timm")}
            versions[", ".join(f"{name} {version}" for name, version in kept.items() if version)] = None
    lines = []
    for machine, points in found.items():
        times = ", ".join(f"`{name}` {duration(sum(all_) / len(all_))}" for name, all_ in points.items())
        lines.append(f"- {machine}. Training the compressed student took, a seed: {times}.")
    return [*lines, *(f"- {text}." for text in versions)]


# ------------------------------------------------------------------------------------------ the plot


def plot(results: SweepResults, path: Path) -> bool:
    """Bytes (log) against the test score, a line a series, the paper's figures as crosses; False: nothing to show."""
    drawn = [point for point in results.points if point.bytes and point.score(results.metric, "test")]
    if not drawn:
        return False
    figure = Figure((7.2, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[PointRecord]] = {}
    for point in drawn:
        lines.setdefault(point.series, []).append(point)
    for place, (series, points) in enumerate(lines.items()):
        _draw(axes, results.metric, series, points, *_LINES[place % len(_LINES)])
    _draw_reference(axes, results)
    _draw_paper(axes, results)
    axes.set_xscale("log")
    axes.set(xlabel="bytes of the file", ylabel=f"test {METRICS[results.metric].heading}")
    entitle(axes, results.title)
    readable_sizes(axes)
    axes.margins(y=0.1)  # room for labels
    axes.legend(frameon=False, fontsize=8)
    _part_labels(axes)
    save_picture(figure, path)
    return True


def _draw(axes: Axes, metric: str, series: str, points: list[PointRecord], colour: str, marker: str) -> None:
    means = sorted(
        ((size, score) for p in points if (size := p.bytes) and (score := p.score(metric, "test"))),
        key=lambda found: found[0].mean,
    )
    axes.errorbar(
        [size.mean for size, _ in means],
        [score.mean for _, score in means],
        xerr=[size.sd or 0.0 for size, _ in means],
        yerr=[score.sd or 0.0 for _, score in means],
        color=colour,
        marker=marker,
        markersize=5,
        linewidth=1.6,
        capsize=2,
        label=f"hfcompress, {series}" if series else "hfcompress",
    )


def _draw_reference(axes: Axes, results: SweepResults) -> None:
    """A line where the full-precision student stands that most points share, if all are of one size."""
    networks = _shared(results, "reference")
    if len({row.parameters for network in networks for row in network.rows.values()}) == 1:
        height = _score_of(max(networks, key=lambda network: len(network.points)), results.metric).mean
        axes.axhline(height, color="#777777", linestyle=":", linewidth=1.2, label="full precision")


def _draw_paper(axes: Axes, results: SweepResults) -> None:
    """Crosses, each with its label."""
    sizes = {point.name: point.bytes.mean for point in results.points if point.bytes}
    marks: list[tuple[float, float, str]] = []
    for figure in results.paper:
        ours = sizes.get(figure.point or "")  # without bytes of its own it stands above our point
        if figure.bytes:
            marks.append((figure.bytes, figure.score, figure.label))
        elif ours is not None:
            marks.append((ours, figure.score, figure.label))
    said = {"the paper" if figure.bytes else "the paper, at our bytes" for figure in results.paper}
    if marks:
        axes.plot([], [], color=_PAPER, marker="x", linestyle="", label=" or ".join(sorted(said)))
    for size, score, _ in marks:
        axes.plot([size], [score], color=_PAPER, marker="x", linestyle="", markersize=7)
    seen = [*sizes.values(), *(size for size, _, _ in marks)]
    for size, score, note in marks:
        on_the_left = size > min(seen) ** 0.4 * max(seen) ** 0.6  # it would leave the picture on the right
        axes.annotate(
            note,
            (size, score),
            xytext=(-5 if on_the_left else 5, 4),
            textcoords="offset points",
            ha="right" if on_the_left else "left",
            fontsize=7,
        )


def _part_labels(axes: Axes) -> None:
    """Labels that lie on others go up or down until they do not. For when all else is drawn: it asks where they lie."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    placed: list[Bbox] = []
    for label in sorted(axes.texts, key=lambda text: text.get_window_extent().y0):
        assert isinstance(label, Annotation)
        x, _ = label.get_position()
        for height in _HEIGHTS:
            label.set_position((x, height))
            box = label.get_window_extent().padded(1)
            within = axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            if within and not any(box.overlaps(other) for other in placed):
                break
        placed.append(label.get_window_extent().padded(1))
