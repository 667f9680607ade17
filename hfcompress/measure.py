"""What is measured of a folder of weights: its scores in a fresh process that has only the files, and its bytes."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfcompress.errors import HFCompressError
from hfcompress.evaluate import int8_gzip_bytes, paired_bleu, weight_bytes
from hfcompress.files import write_atomically
from hfcompress.loading import load
from hfcompress.networks import parameters
from hfcompress.output import MARKER
from hfcompress.results import Paired, Row, Score


def score_afresh(
    folders: Sequence[Path],
    recipe: Path,
    path: Path,
    data_root: Path | None,
    splits: Sequence[str] = ("test",),
    *,
    settings: str = "",
    known: Sequence[Path] = (),
) -> dict[str, Any]:
    """What `hfcompress evaluate` finds, a folder's path → what `scoring.score_all` says; kept in the file `path`.

    splits: of the data that the file `recipe` names. settings: all that scores depend on but the files of a folder.
    known: such files as `path`, perhaps of other runs; what they say of the very same files under the same settings is
    taken over. Raises HFCompressError: it failed.
    """
    keys = {str(folder): key_of(folder, settings, splits) for folder in folders}
    before = {found["key"]: found for file in (path, *known) for found in _read(file).values() if "key" in found}
    new = [folder for folder, key in keys.items() if key not in before]
    fresh = _evaluate(new, recipe, path, data_root, splits) if new else {}
    scored = {folder: {**(fresh.get(folder) or before[key]), "key": key} for folder, key in keys.items()}
    write_atomically(path, json.dumps(scored, ensure_ascii=False, indent=1).encode())
    return scored


def _evaluate(
    folders: Sequence[str], recipe: Path, path: Path, data_root: Path | None, splits: Sequence[str]
) -> dict[str, Any]:
    options = ["--recipe", str(recipe), "--json", str(path), *(f"--split={split}" for split in splits)]
    root = ["--data-root", str(data_root)] if data_root else []
    command = [sys.executable, "-m", "hfcompress", "evaluate", *folders, *options, *root]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise HFCompressError(f"scoring failed (exit code {done.returncode}); what it said stands above")
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def key_of(folder: Path, settings: str, splits: Sequence[str]) -> str:
    """The same for folders with the same files and settings, whatever they are called; marks and checkpoints aside."""
    digest = hashlib.sha256(json.dumps([settings, *splits]).encode())
    for file in sorted(file for file in folder.iterdir() if file.is_file() and file.name != MARKER):
        with file.open("rb") as opened:
            digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()


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
