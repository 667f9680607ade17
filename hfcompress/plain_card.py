"""The model card of a folder that `hfcompress compress` writes: sizes and weight errors; there are no scores."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import hfcompress.card_text as say
from hfcompress.card import environment
from hfcompress.compress import Outcome
from hfcompress.files import write_atomically
from hfcompress.originals import Original
from hfcompress.report import versions
from hfcompress.results import readable_bytes

_TRANSLATORS = ("marian", "m2m_100")  # other encoder–decoders may be for other tasks


def write_plain_card(folder: Path, original: Original, outcome: Outcome, command: str) -> Path:
    """Write `folder`/README.md and return its path. command: what wrote the folder."""
    config, name = original.model.config, folder.resolve().name
    channels = (getattr(config, "pretrained_cfg", None) or {}).get("input_size", [3])[0]
    text = (
        environment()
        .get_template("compressed_card.md.j2")
        .render(
            metadata=_metadata(name, original, outcome).to_yaml(),
            name=name,
            claim=_claim(outcome),
            origin=_origin(original),
            groups=_group_table(outcome),
            rules=say.rule_table(outcome.rules),
            step=outcome.step,
            translates=config.is_encoder_decoder,
            channels=channels,
            command=command,
            versions=versions(),
        )
    )
    path = folder / "README.md"
    write_atomically(path, ModelCard(text).content.encode())  # refuses metadata that the Hub could not read
    return path


def _metadata(name: str, original: Original, outcome: Outcome) -> ModelCardData:
    found: dict[str, Any] = original.metadata()
    config = original.model.config
    if not config.is_encoder_decoder:
        found["pipeline_tag"] = "image-classification"
    elif config.model_type in _TRANSLATORS:
        found.setdefault("pipeline_tag", "translation")
    return ModelCardData(
        base_model=original.hub_id,
        base_model_relation="quantized" if original.hub_id else None,
        library_name="hfcompress",
        model_name=name,
        tags=["hfcompress", "compressed", "quantized"],
        **found,
    )


def _claim(outcome: Outcome) -> str:
    size, before = outcome.sizes.total, outcome.before
    return (
        f"{readable_bytes(size)} on disk, {before / size:.1f} × smaller than the original's weights "
        f"({readable_bytes(before)}); matrices and kernels differ from it by "
        f"{100 * outcome.relative_error:.2f} % of their norm."
    )


def _origin(original: Original) -> str:
    if original.hub_id is None:
        return f"the folder `{Path(original.name).name}`"
    at = f", revision `{original.revision}`" if original.revision else ""
    return f"[{original.hub_id}](https://huggingface.co/{original.hub_id}){at}"


def _group_table(outcome: Outcome) -> say.Table:
    table = [["weights", "values", "bytes before", "bytes", "bits per value", "error"]]
    for group in outcome.groups:
        around = not group.weights
        bits, error = f"{group.bits_per_weight:.2f}", f"{100 * group.relative_error:.2f} %"
        numbers = [f"{group.weights:,}", f"{group.before:,}", f"{group.after:,.0f}", bits, error]
        table.append([group.name, *(["", "", f"{group.after:,.0f}", "", ""] if around else numbers)])
    sizes = outcome.sizes
    whole = [f"{sizes.weights:,}", f"{outcome.before:,}", f"{sizes.total:,}", f"{sizes.bits_per_weight:.2f}", ""]
    return [*table, ["**whole file**", *whole]]
