"""The end of a run for people to look at: its surroundings, a table, three pictures."""

import importlib.metadata
import io
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hfcompress.files import write_atomically
from hfcompress.results import BYTES_IN, METRICS, TITLES, Part, Results, Score, readable_bytes, wilson

__all__ = ["hardware", "plot_scores", "plot_sizes", "plot_training", "print_table", "versions", "wilson"]

# fmt: off
_PACKAGES = (
    "hfcompress", "torch", "transformers", "accelerate", "datasets", "timm", "huggingface_hub", "safetensors",
    "sacrebleu", "sentencepiece", "numpy",
)
# fmt: on

# Okabe and Ito's palette, which the colour-blind tell apart; each line has its own dashes too
_STAGES: dict[str, tuple[str, str]] = {
    "teacher": ("#555555", ":"),
    "student": ("#0072B2", "--"),
    "compressed": ("#D55E00", "-"),
}
_SPARE = (("#009E73", "-."), ("#CC79A7", (0, (1, 1))), ("#E69F00", (0, (5, 1))))
_CONTENT = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999")
_THIS = "#D55E00"

_WIDTH = 8.4  # inches; at this many dots each, twice the width of a card's column
_DOTS = 150


def versions() -> dict[str, str]:
    """Package → version, of Python and of what shapes a run's numbers; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """cpu (model), cores (that this process may use), memory_bytes, gpus (names), platform; no host name."""
    found: dict[str, Any] = {"cpu": _cpu_model(), "cores": _cores()}
    if {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(getattr(os, "sysconf_names", {})):
        found["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["platform"] = f"{platform.system()} {platform.machine()}"
    return found


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def print_table(results: Results, console: Console) -> None:
    """A line per model: parameters, bytes, bits per weight, × smaller than the first, scores, yardstick."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.caption = "±: half the 95 % interval"
    table.add_column("model", min_width=10)  # the one that gives way: all of it fits 80 columns
    scores = [METRICS[metric].heading for metric in results.metrics]
    for heading in ("params", "bytes", "bits/\nweight", "×\nsmaller", *scores, "int8\n+ gzip"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results.rows:
        ratio = results.times_smaller(row)
        table.add_row(
            row.title,
            readable_bytes(row.parameters).rstrip(" B"),  # the same digits and prefixes count weights
            readable_bytes(row.bytes),
            f"{row.bits_per_weight:.2f}",
            "" if ratio is None else f"{ratio:.1f}",
            *(plus_minus(row.scores.get(metric)) for metric in results.metrics),
            readable_bytes(row.int8_gzip_bytes),
            style="bold" if row.name == "compressed" else None,
        )
    console.print(table)


def plus_minus(score: Score | None) -> str:
    """The value ± half the 95 % interval, where one was taken; of no score, nothing."""
    if score is None:
        return ""
    low, high = score.interval
    return f"{score.value:.2f} ±{(high - low) / 2:.1f}" if score.measured else f"{score.value:.2f}"


def plot_training(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> bool:
    """Draw loss, its two parts and the validation metric, a line per stage, into a PNG at `path`.

    curves: stage → the Trainer's log_history (epoch, loss, ce, kd, eval_*; accuracy in percent). Panels
    without a point are left out; without any point nothing is written, and False is returned.
    """
    panels = [
        ("loss", "training loss", "nats"),
        ("ce", "cross-entropy with the data", "nats"),
        ("kd", "distillation: T² · KL(teacher ‖ student)", "nats"),
        ("bits_per_weight", "size on the way to the target", "bits per weight"),
        ("sparsity", "zeros on the way to the target", "fraction of the weights"),
        _validation(curves),
    ]
    lines = {key: {stage: _line(history, key) for stage, history in curves.items()} for key, _, _ in panels}
    panels = [panel for panel in panels if any(lines[panel[0]].values())]
    if not panels:
        return False
    last = max(x for drawn in lines.values() for points in drawn.values() for x, _ in points)
    columns, rows = min(len(panels), 2), -(-len(panels) // 2)
    figure = Figure((_WIDTH, 0.55 + 2.6 * rows), dpi=_DOTS, layout="constrained")
    for place, (key, title, unit) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        _draw_lines(axes, lines[key], validation=key.startswith("eval_"))
        entitle(axes, title)
        axes.set(xlabel="epoch", ylabel=unit, xlim=(0, 1.02 * last))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    save_picture(figure, path)
    return True


def _validation(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[str, str, str]:
    """Key, title and unit of the validation metric that was logged, or of the validation loss."""
    logged = {key for history in curves.values() for entry in history for key in entry}
    for key, metric in METRICS.items():
        if f"eval_{key}" in logged:
            return f"eval_{key}", "validation score", metric.heading
    return "eval_loss", "validation loss", "nats"


def _line(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(entry["epoch"], entry[key]) for entry in history if key in entry and entry.get("epoch") is not None]


def _draw_lines(axes: Axes, lines: Mapping[str, list[tuple[float, float]]], *, validation: bool) -> None:
    spare = iter(_SPARE * len(lines))
    for stage, points in lines.items():
        colour, dashes = _STAGES.get(stage) or next(spare)
        x, y = zip(*points) if points else ((), ())
        marker = "o" if validation or len(points) == 1 else None
        axes.plot(
            x,
            y,
            color=colour,
            linestyle=dashes,
            linewidth=1.8,
            marker=marker,
            markersize=4,
            label=TITLES.get(stage, stage),
        )
    values = [y for points in lines.values() for _, y in points if math.isfinite(y)]
    if not validation and values and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plot_sizes(parts: Sequence[Part], path: Path, yardsticks: Mapping[str, int] | None = None) -> None:
    """Draw the compressed file's bytes, by kind of weight and by what they are, into a PNG at `path`.

    yardsticks: name → bytes of what the file is measured against (the teacher, int8 + gzip, …); with any, a
    second panel shows them beside the file.
    """
    total = sum(part.bytes for part in parts)
    ranked = sorted((part for part in parts if part.bytes), key=lambda part: part.bytes)
    measures = {**(yardsticks or {}), "this file": total}
    heights = [0.34 * len(ranked) + 1.0] + ([0.34 * len(measures) + 0.8] if yardsticks else [])
    figure = Figure((_WIDTH, sum(heights) + 0.2), dpi=_DOTS, layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_parts(panels[0], ranked, total)
    if yardsticks:
        _draw_measures(panels[1], measures, total)
    save_picture(figure, path)


def plot_scores(results: Results, path: Path) -> bool:
    """Draw each model's score, with its interval, against its bytes (log) into a PNG at `path`.

    The metric is the one that speaks for the task. Without two models that have it nothing is written: False.
    """
    metric = next(iter(results.metrics), "")
    rows = [row for row in results.rows if metric in row.scores and row.bytes]
    if len(rows) < 2:
        return False
    figure = Figure((_WIDTH, 3.6), dpi=_DOTS, layout="constrained")
    axes = figure.add_subplot()
    for row, marker in zip(rows, "os^D"):
        colour = _THIS if row.name == "compressed" else "#555555"
        score = row.scores[metric]
        spread = [[max(0.0, score.value - score.interval[0])], [max(0.0, score.interval[1] - score.value)]]
        axes.errorbar([row.bytes], [score.value], spread, color=colour, marker=marker, capsize=3, linestyle="")
        axes.annotate(row.title, (row.bytes, score.value), xytext=(7, 5), textcoords="offset points", color=colour)
    entitle(axes, "score against size")
    axes.set(xlabel="bytes on disk", ylabel=METRICS[metric].heading, xscale="log")
    least, most = min(row.bytes for row in rows), max(row.bytes for row in rows)
    axes.set_xlim(least / 1.5, most * max(3.0, (most / least) ** 0.5))  # room for the names
    readable_sizes(axes)
    save_picture(figure, path)
    return True


def readable_sizes(axes: Axes) -> None:
    """A logarithmic axis of bytes in units a person reads, over a grid."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: readable_bytes(round(size)) if size >= 1 else ""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_parts(axes: Axes, ranked: Sequence[Part], total: int) -> None:
    everywhere = {
        content: sum(p.content.get(content, 0) for p in ranked) for part in ranked for content in part.content
    }
    names = [part.name for part in ranked]
    left = [0] * len(ranked)
    for colour, content in zip(_CONTENT, sorted(everywhere, key=lambda c: -everywhere[c])):
        widths = [part.content.get(content, 0) for part in ranked]
        axes.barh(names, widths, left=left, color=colour, label=content, height=0.7)
        left = [a + b for a, b in zip(left, widths)]
    for place, part in enumerate(ranked):
        share = 100 * part.bytes / total
        note = f"{share:.1f} %" if share >= 0.05 else "< 0.1 %"
        axes.text(part.bytes, place, f" {readable_bytes(part.bytes)}, {note}", va="center")
    entitle(axes, f"the compressed file: {readable_bytes(total)}, by kind of weight")
    axes.legend(loc="lower right", frameon=False)
    _size_axis(axes, max(part.bytes for part in ranked))


def _draw_measures(axes: Axes, measures: Mapping[str, int], total: int) -> None:
    ranked = sorted(measures.items(), key=lambda item: item[1])
    axes.barh(
        [n for n, _ in ranked],
        [b for _, b in ranked],
        height=0.7,
        color=[_THIS if name == "this file" else "#999999" for name, _ in ranked],
    )
    for place, (name, size) in enumerate(ranked):
        ratio = "" if name == "this file" else f", {size / total:.1f} ×"
        axes.text(size, place, f" {readable_bytes(size)}{ratio}", va="center")
    entitle(axes, "measured against")
    _size_axis(axes, max(measures.values()))


def _size_axis(axes: Axes, longest: int) -> None:
    unit = readable_bytes(longest).split()[1]
    scale = BYTES_IN[unit]
    axes.set(xlim=(0, 1.24 * longest), xlabel=unit)  # room for the label of the longest bar
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / scale:g}"))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def entitle(axes: Axes, text: str) -> None:
    """In bold, above its left corner."""
    axes.set_title(text, loc="left", fontsize=10.5, fontweight="bold")


def save_picture(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all; the same figure gives the same bytes."""
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture, metadata={"Software": None})
    write_atomically(path, picture.getvalue())
