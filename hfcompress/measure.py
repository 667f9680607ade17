"""What is measured of a folder of weights: its scores in a fresh process that has only the files, and its bytes."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfcompress.errors import HFCompressError
from hfcompress.evaluate import int8_gzip_bytes, paired_bleu, weight_bytes
from hfcompress.loading import load
from hfcompress.networks import parameters
from hfcompress.results import Paired, Row, Score


def score_afresh(
    folders: Sequence[Path], recipe: Path, path: Path, data_root: Path | None, splits: Sequence[str] = ("test",)
) -> dict[str, Any]:
    """What `hfcompress evaluate` finds, a folder's path → what `scoring.score_all` says; kept in the file `path`.

    splits: of the data that the file `recipe` names. Raises HFCompressError: it failed.
    """
    options = ["--recipe", str(recipe), "--json", str(path), *(f"--split={split}" for split in splits)]
    root = ["--data-root", str(data_root)] if data_root else []
    command = [sys.executable, "-m", "hfcompress", "evaluate", *map(str, folders), *options, *root]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise HFCompressError(f"scoring failed (exit code {done.returncode}); what it said stands above")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def row_of(name: str, folder: Path, scores: dict[str, Any], before: Sequence[Row]) -> Row:
    """The row of results of a stage's folder; `before`: those of the stages before it."""
    model, size = load(folder), weight_bytes(folder)
    count = parameters(model)
    # the yardstick of every student is the full-precision one: weights on a grid would gzip better
    twin = next((row for row in before if row.name == "student"), None)
    int8_gzip = int8_gzip_bytes(model) if twin is None else twin.int8_gzip_bytes
    return Row(name, count, size, 8 * size / count, int8_gzip, scores_of(scores))  # type: ignore[arg-type]


def scores_of(found: dict[str, Any]) -> dict[str, Score]:
    """Metric → score, from what `hfcompress evaluate --json` writes."""
    return {metric: Score(**{**score, "interval": tuple(score["interval"])}) for metric, score in found.items()}


def paired_tests(found: Mapping[str, Any], resamples: int) -> tuple[Paired, ...]:
    """The compressed student against each other stage, by all of their translations; none of image classifiers.

    found: stage → what `score_afresh` says of its folder; resamples: 0 for no test.
    """
    if "bleu" not in found["compressed"]["scores"]:
        return ()
    outputs = {name: [sample["output"] for sample in of["samples"]] for name, of in found.items()}
    references = [sample["reference"] for sample in found["compressed"]["samples"]]
    return paired_bleu(outputs.pop("compressed"), outputs, references, resamples)
