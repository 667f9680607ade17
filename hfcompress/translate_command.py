"""What `hfcompress translate` does."""

import json
from itertools import chain
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer

from hfcompress.errors import ConfigError
from hfcompress.loading import load
from hfcompress.networks import from_pretrained
from hfcompress.progress import quiet_libraries
from hfcompress.schema import Sequences
from hfcompress.sources import read_split, report_breaks
from hfcompress.teaching import PAIRS, check_direction, make_dataset, monolingual
from hfcompress.translate import SUMMARY, Text


def run(
    model: str,
    data: Path,
    languages: tuple[str | None, str | None],
    split: str,
    settings: Sequences,
    least_bleu: float,
    output: Path,
    console: Console,
) -> None:
    """Translate, filter, write, and say what was left out.

    Raises ConfigError, DataError, ResumeError; TeacherError: BLEU on the first pairs is under `least_bleu`.
    """
    quiet_libraries()
    main = PartialState(cpu=not torch.accelerator.is_available()).is_main_process
    tokenizer, teacher = from_pretrained(AutoTokenizer, model), load(model)
    text = _pairs(data, split, languages) if data.is_dir() else monolingual(data)
    if text.references and least_bleu:
        pairs = Dataset.from_dict({"source": text.sources[:PAIRS], "target": text.references[:PAIRS]})
        bleu = check_direction(teacher, tokenizer, pairs, least_bleu)
        if main:
            console.print(f"the teacher: BLEU {bleu:.1f} on the first pairs", markup=False, highlight=False)
    kept = make_dataset(teacher, tokenizer, [text], settings, output, console if main else None)
    if main:
        found = json.loads((output / SUMMARY).read_text(encoding="utf-8"))["counts"]
        left_out = ", ".join(f"{count:,} {name}" for name, count in found.items() if count and name != "kept")
        console.print(f"{len(kept):,} pairs in {output}; left out: {left_out or 'none'}", markup=False, highlight=False)


def _pairs(folder: Path, split: str, languages: tuple[str | None, str | None]) -> Text:
    """Pairs of a folder, whose languages are columns, or keys of the column `translation`."""
    source, target = languages
    if source is None or target is None:
        raise ConfigError(f"{folder} holds pairs: name their languages with --source and --target")
    rows: Dataset = read_split(folder, split, (source, target))
    if "translation" in rows.column_names:
        rows = rows.select_columns("translation").flatten()
        rows = rows.rename_columns({name: name.removeprefix("translation.") for name in rows.column_names})
    missing = [name for name in (source, target) if name not in rows.column_names]
    if missing:
        raise ConfigError(f"split {split!r} of {folder} has no {' or '.join(missing)}: {', '.join(rows.column_names)}")
    full = rows.filter(lambda row: all(row[name] and row[name].strip() for name in (source, target)))
    report_breaks(f"{folder.name}/{split}", chain(full[source], full[target]))
    return Text(f"{folder.name}/{split}", full[source], full[target])
