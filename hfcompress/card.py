"""The model card of a compressed student: README.md, from what the run found and from nothing else.

    recipe ──┐
    results ─┼──▶ metadata, which huggingface_hub writes and checks ──┐
    parts ───┼──▶ sentences and tables (card_text.py) ────────────────┼──▶ model_card.md.j2 ──▶ README.md
    samples ─┘                                                        │
    pictures that lie in the folder ──────────────────────────────────┘

A section whose facts are missing is left out; nothing stands in for it.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

import hfcompress.card_text as say
from hfcompress.errors import HFCompressError
from hfcompress.files import write_atomically
from hfcompress.results import METRICS, DataFacts, Part, Results, Row, Sample
from hfcompress.schema import Recipe

TRAINING_PICTURE = "training.png"
SIZES_PICTURE = "sizes.png"
SCORES_PICTURE = "scores.png"
"""The pictures that a card shows where they lie in its folder."""
_PICTURES = (TRAINING_PICTURE, SIZES_PICTURE, SCORES_PICTURE)


def write_card(
    folder: Path,
    recipe: Recipe,
    results: Results,
    parts: Sequence[Part],
    samples: Sequence[Sample],
    command: str,
    *,
    recipe_text: str = "",
    data: DataFacts | None = None,
) -> Path:
    """Write `folder`/README.md and return its path.

    parts: of the compressed file (`results.by_kind`); samples: all answers on the test split, of which the
    worst and the middling are shown; command: what reproduces the run; recipe_text: the recipe as resolved,
    in YAML. The pictures training.png, scores.png and sizes.png are shown where they lie in the folder.

    Raises HFCompressError: no row for the compressed student, or parts that do not add up to its bytes.
    """
    row = results.row("compressed")
    if row is None:
        found = ", ".join(r.name for r in results.rows) or "no row"
        raise HFCompressError(f"model card: results need a row 'compressed', found {found}; run that stage")
    if parts and sum(part.bytes for part in parts) != row.bytes:
        raise HFCompressError(
            f"model card: the parts of the compressed file must add up to its {row.bytes} bytes, found "
            f"{sum(part.bytes for part in parts)}; take both from the same file"
        )
    text = (
        environment()
        .get_template("model_card.md.j2")
        .render(
            recipe=recipe,
            recipe_text=recipe_text.strip(),
            results=results,
            command=command,
            data=data,
            pictures={name for name in _PICTURES if (folder / name).is_file()},
            metadata=_metadata(recipe, results, row, data).to_yaml(),
            **_said(recipe, results, row, parts, samples),
        )
    )
    path = folder / "README.md"
    write_atomically(path, ModelCard(text).content.encode())  # refuses metadata that the Hub could not read
    return path


def _said(
    recipe: Recipe, results: Results, row: Row, parts: Sequence[Part], samples: Sequence[Sample]
) -> dict[str, Any]:
    """What the template puts into its sections, by the name it calls it."""
    sources = [sample.source for sample in samples if recipe.translation and "`" not in sample.source]
    return {
        "claim": say.claim(recipe, results, row),
        "scores": say.score_table(results),
        "signatures": say.signatures(results),
        "comparisons": list(say.comparisons(results, row)),
        "parts": say.part_table(parts, row) if parts else [],
        "making": list(say.making(recipe)),
        "rules": say.rule_table(recipe.compression.rules),
        "samples": say.sample_table(samples),
        "answers": len(samples),
        "worst": say.WORST,
        "example": sources[0] if sources else None,
        "dataset": say.dataset_of(recipe),
        "data_name": say.data_name(recipe),
        "hardware": say.hardware_words(results.hardware),
    }


def environment() -> Environment:
    """Where the templates of cards lie, and the filters they use."""
    environment = Environment(
        loader=PackageLoader("hfcompress"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML; `plain` escapes what comes from the data
    )
    environment.filters |= {
        "table": say.markdown_table,
        "duration": say.duration,
        "fenced": say.fenced,
        "literal": repr,
    }
    return environment


def _metadata(recipe: Recipe, results: Results, row: Row, data: DataFacts | None) -> ModelCardData:
    dataset = say.dataset_of(recipe)
    networks = [network for network in (recipe.student, recipe.teacher) if network is not None]
    base = next((hub for network in networks if (hub := say.hub_id(network.pretrained or ""))), None)
    languages = [recipe.translation.source, recipe.translation.target] if recipe.translation else []
    codes = [code.group() for name in languages if (code := re.match(r"[a-z]{2,3}(?=[-_]|$)", name))]
    metrics = [METRICS[metric].hub for metric in results.metrics if metric in row.scores]
    return ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        datasets=[dataset.hub] if dataset.hub else None,
        language=list(dict.fromkeys(codes)) or None,
        library_name="hfcompress",
        license=recipe.card.license,
        metrics=metrics or None,
        model_name=recipe.name,
        pipeline_tag=_task(recipe),
        tags=_tags(recipe),
        eval_results=_eval_results(recipe, results, row, data),
    )


def _task(recipe: Recipe) -> str:
    return "translation" if recipe.translation else "image-classification"


def _tags(recipe: Recipe) -> list[str]:
    bits = sorted({vars(rule.method)["bits"] for rule in recipe.compression.rules if "bits" in vars(rule.method)})
    tags = ["hfcompress", "compressed", *(["quantized"] if bits else []), *(f"{b}-bit" for b in bits)]
    return [*tags, "knowledge-distillation"] if recipe.teacher and recipe.distillation.soft else tags


def _eval_results(recipe: Recipe, results: Results, row: Row, data: DataFacts | None) -> list[EvalResult]:
    """This model's scores, then its size."""
    dataset = say.dataset_of(recipe)
    place: dict[str, Any] = {
        "task_type": _task(recipe),
        "dataset_type": dataset.hub or dataset.embedded or say.data_name(recipe),
        "dataset_name": say.data_name(recipe),
        "dataset_split": dataset.test,
        "dataset_revision": None if data and data.local else dataset.revision,
    }
    scored = [
        EvalResult(
            metric_type=METRICS[metric].hub,
            metric_value=round(row.scores[metric].value, 4),
            metric_name=METRICS[metric].heading,
            metric_args={"signature": row.scores[metric].signature},
            **place,
        )
        for metric in results.metrics
        if metric in row.scores
    ]
    size = EvalResult(metric_type="size_bytes", metric_value=row.bytes, metric_name="bytes on disk", **place)
    bits = round(row.bits_per_weight, 4)
    rate = EvalResult(metric_type="bits_per_weight", metric_value=bits, metric_name="bits per weight", **place)
    return [*scored, size, rate]
