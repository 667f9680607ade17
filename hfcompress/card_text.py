"""What a model card says: sentences and tables, each made of a number of the run or a line of its recipe."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hfcompress.reparameterization import Kind
from hfcompress.results import METRICS, Paired, Part, Results, Row, Sample, Score, readable_bytes
from hfcompress.schema import ImageData, Network, Recipe, Rule, TranslationData

WORST = TYPICAL = 4
"""Samples shown: so many of the lowest score, so many from the middle of the ranking."""

_LEVEL = 0.05  # a difference with a smaller p-value counts as one

_LONGEST = 240  # characters of a sample that are shown: a student that cannot stop must not fill the card

Table = list[list[str]]  # the first row is the heading

_EMBEDDED = {
    "digits": "scikit-learn's handwritten digits",
    "cldr": "phrases spelled out by Babel from the Unicode CLDR",
}
_CALLED = {
    "teacher": "its teacher",
    "student": "the same student in full precision",
    "post_training": "the same student compressed only after training",
}


def claim(recipe: Recipe, results: Results, row: Row) -> str:
    """Size and score in one sentence, beside those of the teacher (or else of the full-precision student)."""
    sentence = f"{readable_bytes(row.bytes)} on disk"
    baseline = results.reference
    if baseline is not None and row.bytes:
        ratio = baseline.bytes / row.bytes
        times = f"{ratio:.1f} × smaller" if ratio >= 1 else f"{1 / ratio:.1f} × larger"
        sentence += f", {times} than {_CALLED[baseline.name]} ({readable_bytes(baseline.bytes)})"
    for key in _spoken_for(results, row):
        score, metric = row.scores[key], METRICS[key]
        sentence += f"; {metric.name} {score}{metric.unit}"
        if baseline is not None and key in baseline.scores:
            sentence += f" against {baseline.scores[key]}{metric.unit}"
        sentence += f" on {score.n:,} rows of {data_name(recipe)}, split `{dataset_of(recipe).test}`"
    return sentence + "."


def comparisons(results: Results, row: Row) -> Iterator[str]:
    """What the numbers say about this model, for better or worse: a sentence for each baseline."""
    for key in _spoken_for(results, row):
        for name, called in _CALLED.items():
            other = results.row(name)
            paired = next((p for p in results.paired if (p.against, p.metric) == (name, key)), None)
            if other is not None and key in other.scores:
                yield f"{METRICS[key].name} {_compare(row.scores[key], called, other.scores[key], paired)}."
    if row.int8_gzip_bytes:
        share, yardstick = row.bytes / row.int8_gzip_bytes, readable_bytes(row.int8_gzip_bytes)
        yield f"{share:.2f} × the bytes of the same student as int8 + gzip ({yardstick})."


def _spoken_for(results: Results, row: Row) -> list[str]:
    """The one metric that sentences are about, if there is any."""
    return [metric for metric in results.metrics if metric in row.scores][:1]


def _compare(score: Score, called: str, other: Score, paired: Paired | None) -> str:
    difference = round(score.value - other.value, 2)
    side = "above" if difference > 0 else "below"
    found = f"{abs(difference):.2f} points {side} {called}" if difference else f"equal to that of {called}"
    if paired is not None:
        found += f"; {_verdict(paired)}"
    elif score.measured and other.measured:
        found += f"; the 95 % intervals {'overlap' if score.overlaps(other) else 'do not overlap'}"
    return found


def _verdict(paired: Paired) -> str:
    said = "the difference is significant" if paired.p_value < _LEVEL else "no significant difference"
    p = f"p = {paired.p_value:.3f}" if paired.p_value >= 0.001 else "p < 0.001"
    return f"{said} ({p}, paired bootstrap of {paired.resamples:,} samples of the {paired.n:,} rows)"


def making(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """How the model came to be, as the recipe says: (what, how)."""
    if recipe.teacher is not None:
        yield "Teacher", _network(recipe.teacher)
    yield "Student", _network(recipe.student)
    weights, compression = recipe.distillation, recipe.compression
    loss = f"{weights.hard:g} · cross-entropy" if recipe.teacher is not None else "cross-entropy"
    if weights.soft and recipe.teacher is not None:
        loss += f" + {weights.soft:g} · T² · KL(teacher ‖ student), T = {weights.temperature:g}"
    yield "Loss of both students", loss
    if weights.sequences is not None:
        beside = ", beside the references" if weights.sequences.keep_pairs else " in place of the references"
        yield "Training sentences", f"the teacher's translations (beam {weights.sequences.beams}){beside}"
    start = "the student's starting point"
    if compression.warm_start:
        start = "the trained full-precision student, which itself was not trained on"
    how = f"from {start}, with its weights compressed at every step"
    if compression.taught_by_twin:
        how += ", taught by the trained full-precision student"
    if compression.rate_weight:
        how += f", and {compression.rate_weight:g} · bits per parameter added to the loss"
    yield "Compressed training", how


def _network(network: Network) -> str:
    if network.pretrained is not None:
        hub = hub_id(network.pretrained)
        name = f"[{hub}](https://huggingface.co/{hub})" if hub else f"`{PurePath(network.pretrained).name}`"
        name += f", revision `{network.revision}`" if network.revision else ""
        return f"{name}, {'as it is' if network.training is None else 'trained further'}"
    if network.from_teacher is not None:
        layers = network.from_teacher
        kept = f"{layers.encoder_layers} of the teacher's encoder layers and {layers.decoder_layers} of its decoder's"
        return f"{kept}, evenly spaced, with their weights"
    name = "Marian" if network.marian is not None else f"timm's `{network.timm}`"
    return f"{name}, from {'a file of weights' if network.weights else 'random weights'}"


def signatures(results: Results) -> list[tuple[str, str, int]]:
    """(metric, how it was computed, rows): one a metric, or more where models were scored differently."""
    scores = [(METRICS[m].name, r.scores[m]) for m in results.metrics for r in results.rows if m in r.scores]
    tests = [(f"{METRICS[p.metric].name}, paired bootstrap", p.signature, p.n) for p in results.paired]
    return list(dict.fromkeys([*((metric, score.signature, score.n) for metric, score in scores), *tests]))


def score_table(results: Results) -> Table:
    heading = ["model", "parameters", "bytes", "× smaller", "bits per weight", "int8 + gzip"]
    table = [[*heading, *(METRICS[metric].heading for metric in results.metrics)]]
    for row in results.rows:
        ratio = results.times_smaller(row)
        table.append(
            [
                f"**{row.title}** (this model)" if row.name == "compressed" else row.title,
                *(f"{row.parameters:,}", f"{row.bytes:,}", f"{ratio:.1f}" if ratio else ""),
                *(f"{row.bits_per_weight:.2f}", f"{row.int8_gzip_bytes:,}"),
                *(str(row.scores.get(metric, "")) for metric in results.metrics),
            ]
        )
    return table


def part_table(parts: Sequence[Part], row: Row) -> Table:
    table = [["part", "values", "bytes", "share", "bits per value", "of which"]]
    for part in parts:
        bits = f"{8 * part.bytes / part.values:.2f}" if part.values else ""
        content = "; ".join(f"{what} {size:,}" for what, size in part.content.items())
        share = f"{100 * part.bytes / row.bytes:.1f} %"
        table.append([part.name, f"{part.values:,}" if part.values else "", f"{part.bytes:,}", share, bits, content])
    whole = ["**whole file**", f"{row.parameters:,}", f"{row.bytes:,}", "100 %", f"{row.bits_per_weight:.2f}"]
    return [*table, [*whole, "per parameter"]]


def rule_table(rules: Sequence[Rule]) -> Table:
    """What is stored how, in order of precedence; a method's file says in its first line what it is."""
    table = [["weights named", "of kind", "stored by", "which is"]]
    for rule in rules:
        kinds = "any" if set(rule.kinds) == set(Kind) else ", ".join(kind.value for kind in rule.kinds)
        about = (sys.modules[type(rule.method).__module__].__doc__ or "").strip().partition("\n")[0]
        table.append([f"`{rule.pattern}`", kinds, f"`{rule.method}`", about])
    return table


def sample_table(samples: Sequence[Sample]) -> Table:
    """The worst and the middling, lowest score first; all where there are few; without any, no table."""
    ranked = sorted(samples, key=lambda sample: sample.score)
    if len(ranked) > WORST + TYPICAL:
        middle = max(WORST, (len(ranked) - TYPICAL) // 2)
        ranked = ranked[:WORST] + ranked[middle : middle + TYPICAL]
    shown = [[*(plain(_cut(t)) for t in (s.source, s.reference, s.output)), f"{s.score:.1f}"] for s in ranked]
    return [["source", "reference", "this model", "score"], *shown] if shown else []


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rstrip()} …"


def hardware_words(found: dict[str, Any]) -> str:
    """What `report.hardware` found; what it did not find is left out."""
    words = [
        found.get("cpu"),
        f"{found['cores']} cores" if "cores" in found else None,
        f"{found['memory_bytes'] / 2**30:.0f} GiB of memory" if "memory_bytes" in found else None,
        (", ".join(found["gpus"]) or "no GPU") if "gpus" in found else None,
        found.get("platform"),
    ]
    return ", ".join(word for word in words if word)


def dataset_of(recipe: Recipe) -> TranslationData | ImageData:
    dataset = recipe.translation or recipe.images
    assert dataset is not None  # a recipe has one of the two
    return dataset


def data_name(recipe: Recipe) -> str:
    """What people call the data."""
    dataset = dataset_of(recipe)
    named = recipe.card.dataset_name or dataset.hub or _EMBEDDED.get(dataset.embedded or "")
    return named or PurePath(dataset.folder or "").name


def hub_id(name: str) -> str | None:
    """`name` if it can be a repository on the Hub and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).is_dir() else name


def markdown_table(table: Table, align: str) -> str:
    """`table` in Markdown. align: l or r for each column, the last one for those that follow too."""
    rules = ["---:" if align[min(i, len(align) - 1)] == "r" else "---" for i in range(len(table[0]))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (table[0], rules, *table[1:]))


def fenced(text: str, language: str = "") -> str:
    """`text` as a block of code, whatever it holds."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def plain(text: str) -> str:
    """One line of Markdown that shows `text` as it is, in a table too; *(empty)* where there is nothing."""
    return re.sub(r"([\\`*_{}\[\]<>|$~#&])", r"\\\1", " ".join(text.split())) or "*(empty)*"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
