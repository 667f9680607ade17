"""The rows of one split, from a local folder or from the Hub.

Split S of a folder is, in the folder itself or in its subfolder `data`, exactly one of

    S.parquet   S-00000-of-00003.parquet ...   S.jsonl   S.jsonl.gz   S.json   S.json.gz
    S.<language> for each language asked for: one sentence per line (also S.<language>.gz)

A line ends at "\\n" and nowhere else: sentences keep CR, VT, NEL, U+2028 and the like.
"""

import glob
import gzip
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars, enable_progress_bars, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.utils import are_progress_bars_disabled

from hfcompress.errors import DataError
from hfcompress.schema import Source

logger = logging.getLogger(__name__)

JSON_SUFFIXES = ("jsonl", "jsonl.gz", "json", "json.gz")
SHARD = re.compile(r"(?P<split>.+?)-(?P<index>\d+)(-of-(?P<total>\d+))?\.parquet")
BREAKS = ("\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")
"""Characters at which other programs end a line; here it ends at \\n only, as for `wc -l`."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LISTED = 12


def read_split(folder: Path, split: str, languages: tuple[str, ...] = ()) -> Dataset:
    """All columns of one split. Plain text gives one column per language.

    Raises DataError where the folder or the split is missing, given twice, incomplete or unreadable, and
    where text files have different line counts.
    """
    files = files_of(folder, split, languages)
    if files[0].name.endswith(".parquet"):
        return _read_parquet(files)
    if files[0].name.endswith(JSON_SUFFIXES):
        return _columns(list(read_records(files[0])), files[0])
    return _read_text(files, languages)


def report_breaks(name: str, lines: Iterable[str]) -> None:
    """Say how many of the lines hold what other programs take for their end."""
    counted = Counter(any(mark in line for mark in BREAKS) for line in lines)
    if odd := counted[True]:
        said = "%s: %d of %d lines hold CR, VT, NEL, U+2028 or the like: they end none."
        logger.warning(said, name, odd, counted.total())


def files_of(folder: Path, split: str, languages: tuple[str, ...] = ()) -> list[Path]:
    """The files of one split, all of one form. Raises DataError: none, more than one form, or some are missing."""
    if not folder.is_dir():
        raise DataError(_no_folder(folder))
    forms = {place: _forms(place, split, languages) for place in (folder, folder / "data") if place.is_dir()}
    found = [files for by_form in forms.values() for files in by_form]
    if not found:
        raise DataError(_no_split(folder, split, languages))
    if len(found) > 1:
        names = " and ".join(str(files[0].relative_to(folder)) for files in found)
        raise DataError(f"Split {split!r} is in {folder} more than once, as {names}: keep one of them.")
    return found[0]


def read_hub(data: Source, split: str) -> Dataset:
    """All columns of one split of the Hub's `data.hub`. Raises DataError where it cannot be loaded."""
    with told_of_hub(data, split):
        return _load(data.hub, data.config, revision=data.revision, split=data.hub_splits.get(split, split))


@contextmanager
def told_of_hub(data: Source, split: str) -> Iterator[None]:
    """Within: what `datasets` raises about a split on the Hub becomes a DataError."""
    try:
        yield
    except ConnectionError as error:
        copy = f"its copy {data.folder!r}" if data.folder else "a copy (named by 'folder' in the recipe)"
        raise DataError(
            f"Dataset {data.hub!r} cannot be reached on the Hub: {error}. Without network, give the folder "
            f"that holds {copy} with --data-root."
        ) from error
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(f"Split {split!r} of {data.hub!r} on the Hub cannot be loaded: {error}") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file (or .gz), ended by "\\n" only; a byte order mark is dropped.

    Raises DataError with the line number where a line is not UTF-8.
    """
    return list(lines_of(path))


def lines_of(path: Path) -> Iterator[str]:
    """The lines that `read_lines` gives, one at a time."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).removesuffix(b"\n").decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start} of the line).") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. Is it a whole file?") from error


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, or of one JSON array. Raises DataError with the line."""
    lines = read_lines(path)
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("["):
        records = parse("\n".join(lines), str(path))
        for row, record in enumerate(records):
            yield as_object(record, f"{path}: element {row}")
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield as_object(parse(line, f"{path}:{number}"), f"{path}:{number}")


def splits_in(folder: Path, languages: tuple[str, ...] = ()) -> list[str]:
    """Names of the splits whose files are in the folder, by the endings that `read_split` reads."""
    endings = ("parquet", "jsonl", "json", *languages)
    found = set()
    for place in (folder, folder / "data"):
        for path in place.iterdir() if place.is_dir() else ():
            name = path.name.removesuffix(".gz")
            if shard := SHARD.fullmatch(name):
                found.add(shard["split"])
            elif name.endswith(tuple(f".{ending}" for ending in endings)) and path.is_file():
                found.add(name.rpartition(".")[0])
    return sorted(found)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without the progress bars of `datasets`, inside."""
    noisy = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if noisy:
            enable_progress_bars()


# ------------------------------------------------------------------------------------------ finding files


def _forms(place: Path, split: str, languages: tuple[str, ...]) -> list[list[Path]]:
    """Every way in which the split is present at this place; each a list of files."""
    forms = [[path] for suffix in ("parquet", *JSON_SUFFIXES) if (path := place / f"{split}.{suffix}").is_file()]
    shards = {
        path: match
        for path in sorted(place.glob("*.parquet"))
        if (match := SHARD.fullmatch(path.name)) and match["split"] == split
    }
    if shards:
        _check_shards(shards, split)
        forms.append(list(shards))
    texts = [_text_file(place, split, language) for language in languages]
    present = [path for path in texts if path is not None]
    if present and len(present) < len(languages):
        missing = [f"{split}.{language}" for language, path in zip(languages, texts) if path is None]
        raise DataError(f"{place} has {present[0].name} but not {' or '.join(missing)}: put both sides there.")
    if present:
        forms.append(present)
    return forms


def _text_file(place: Path, split: str, language: str) -> Path | None:
    candidates = (place / f"{split}.{language}", place / f"{split}.{language}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _check_shards(shards: dict[Path, re.Match[str]], split: str) -> None:
    totals = {match["total"] for match in shards.values()}
    wanted = max(int(total or 0) for total in totals) or len(shards)
    if len(totals) > 1 or len(shards) != wanted:
        names = ", ".join(path.name for path in shards)
        raise DataError(f"Split {split!r} should have {wanted} parquet shards; found {len(shards)}: {names}.")


def _no_folder(folder: Path) -> str:
    parent = next(p for p in folder.absolute().parents if p.is_dir())
    there = sorted(path.name for path in parent.iterdir() if path.is_dir())
    listed = ", ".join(there[:_LISTED]) + (f" and {len(there) - _LISTED} more" if len(there) > _LISTED else "")
    return (
        f"No folder {folder} (in {parent}: {listed or 'no folders'}). "
        "Give the folder that holds it with --data-root, or its full path in the recipe."
    )


def _no_split(folder: Path, split: str, languages: tuple[str, ...]) -> str:
    found = splits_in(folder, languages)
    near = "".join(f" Did you mean {other!r}?" for other in get_close_matches(split, found, n=1))
    texts = f", or {' and '.join(f'{split}.{language}' for language in languages)}" if languages else ""
    return (
        f"No split {split!r} in {folder}: looked for {split}.parquet, {split}-*.parquet, {split}.jsonl[.gz], "
        f"{split}.json[.gz]{texts}. Splits found there: {', '.join(found) or 'none'}.{near}"
    )


# ------------------------------------------------------------------------------------------ reading files


def _read_parquet(files: list[Path]) -> Dataset:
    """Memory-mapped, through the cache of `datasets` (keyed by the files' names, sizes and times)."""
    try:
        return _load("parquet", data_files=[glob.escape(str(path)) for path in files], split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{files[0]}{' ...' * (len(files) > 1)} cannot be read as parquet: {cause}") from error


def _load(path: str | None, config: str | None = None, **arguments: Any) -> Dataset:
    """`load_dataset` of one split, without progress bars; a split of no rows is one, not an error."""
    try:
        with no_progress_bars():
            return load_dataset(path, config, **arguments)
    except ValueError as error:
        if "corresponds to no data" in str(error):
            return Dataset.from_dict({})
        raise


def _columns(records: list[dict[str, Any]], path: Path) -> Dataset:
    names = dict.fromkeys(name for record in records for name in record)
    try:
        return Dataset.from_dict({name: [record.get(name) for record in records] for name in names})
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: its rows do not make columns of one type each: {error}") from error


def _read_text(files: list[Path], languages: tuple[str, ...]) -> Dataset:
    sides = {language: read_lines(path) for language, path in zip(languages, files)}
    counts = {path: len(lines) for path, lines in zip(files, sides.values())}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{path} has {count:,} lines" for path, count in counts.items())
        raise DataError(f"Parallel text needs one line per pair: {told}. Lines end at '\\n' only.")
    return Dataset.from_dict(sides)


def parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error


def as_object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object with the columns' names, found {type(record).__name__}.")
    return record
