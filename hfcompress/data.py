"""The three splits of a task, read from an embedded corpus, the Hub or a local folder, and checked.

A gap (a sentence that is None or blank) in validation or test is refused: it would change the score unseen.
In train, pairs with a gap are left out, and their number is logged.
"""

import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Image, concatenate_datasets

from hfcompress import corpora
from hfcompress.errors import DataError
from hfcompress.schema import ImageData, Source, TranslationData
from hfcompress.sources import no_progress_bars, read_hub, read_split

logger = logging.getLogger(__name__)

HELD_OUT_SEED = 0  # the same rows are held out whatever the recipe's seed

Read = Callable[[str], Dataset]


@dataclass(frozen=True)
class Splits:
    """Columns of each: `source` and `target` (str), or `image` (PIL when read) and `label` (ClassLabel)."""

    train: Dataset
    validation: Dataset
    test: Dataset


def load_translation(data: TranslationData, data_root: Path | None = None, read: Read | None = None) -> Splits:
    """Sentence pairs; `data_root` is the folder that holds `data.folder`. read: in place of reading from there.

    A split whose languages are columns themselves needs no `data.column`. Raises DataError where a split,
    column or language is missing, a split is empty, or validation or test has gaps.
    """
    read = read or reader(data, data_root)

    def pairs(split: str, rows: int | None = None) -> Dataset:
        return _spread(_pairs(read(split), data, split), rows)

    train = _without_gaps(pairs(data.train, data.train_rows), data.train)
    test = _complete(pairs(data.test, data.test_rows), data.test)
    if data.validation is not None:
        return Splits(train, _complete(pairs(data.validation, data.validation_rows), data.validation), test)
    return Splits(*_hold_out(train, data, _values(train, "source")), test)


def load_images(data: ImageData, data_root: Path | None = None, read: Read | None = None) -> Splits:
    """Labelled images; `data_root` is the folder that holds `data.folder`. read: in place of reading from there.

    Labels may be a ClassLabel, integers from 0, or names (then sorted); train's classes hold for all splits.
    Raises DataError where a split or column is missing, a split is empty, or a label is missing or out of
    range. Images are not decoded here; `decoding.with_images` names the row of a broken one.
    """
    read = read or reader(data, data_root)
    whole_train = _images(read(data.train), data, data.train)
    classes = _classes(whole_train, data.train)

    def labelled(split: str, rows: int | None = None) -> Dataset:
        return _labelled(_spread(_images(read(split), data, split), rows), classes, split)

    train = _labelled(_spread(whole_train, data.train_rows), classes, data.train)
    test = labelled(data.test, data.test_rows)
    if data.validation is not None:
        return Splits(train, labelled(data.validation, data.validation_rows), test)
    return Splits(*_hold_out(train, data, range(len(train))), test)


def is_local(data: Source, data_root: Path | None) -> bool:
    """Whether the rows are read from a folder: where one is named, and either `data_root` is given or no Hub id."""
    return data.folder is not None and (data_root is not None or data.hub is None)


def stamps(data: Source, data_root: Path | None) -> list[tuple[str, int, int]]:
    """Name, size and time of the folder's files, by which a change of them is noticed; none where no folder is read."""
    if not is_local(data, data_root):
        return []
    folder = Path(data_root or ".") / (data.folder or "")
    found = ((file, file.stat()) for file in sorted(folder.rglob("*")) if file.is_file())
    return [(file.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns) for file, stat in found]


def label_names(splits: Splits) -> list[str]:
    """Names of the classes, in the order of their labels."""
    return list(splits.train.features["label"].names)


def overlap(splits: Splits, among: Iterable[str] | None = None) -> int:
    """How many test pairs have a source sentence that is also in train, or else `among` these sentences."""
    known = set(_values(splits.train, "source") if among is None else among)
    return sum(sentence in known for sentence in _values(splits.test, "source"))


# ------------------------------------------------------------------------------------------ where from


def reader(data: TranslationData | ImageData, data_root: Path | None) -> Read:
    """A split's name → its rows."""
    languages = (data.source, data.target) if isinstance(data, TranslationData) else ()
    if data.embedded is not None:
        if (data.embedded == "cldr") != isinstance(data, TranslationData):
            task = "translation" if data.embedded == "cldr" else "images"
            raise DataError(f"The embedded corpus {data.embedded!r} is for a recipe's section {task!r} only.")
        splits = corpora.cldr(*languages) if languages else corpora.digits()
        return lambda split: _named(splits, split, f"the embedded corpus {data.embedded!r}")
    if is_local(data, data_root):
        assert data.folder is not None
        folder = Path(data_root or ".") / data.folder
        return lambda split: read_split(folder, split, languages)
    return lambda split: read_hub(data, split)


def _named(table: dict[str, Any], name: str, where: str) -> Any:
    if name not in table:
        near = "".join(f" Did you mean {other!r}?" for other in get_close_matches(name, table, n=1))
        raise DataError(f"No {name!r} in {where}. Found: {', '.join(table) or 'nothing'}.{near}")
    return table[name]


# ------------------------------------------------------------------------------------------ translation


def _pairs(rows: Dataset, data: TranslationData, split: str) -> Dataset:
    """Two columns of strings, `source` and `target`."""
    _not_empty(rows, split)
    if data.embedded is not None:
        return rows
    columns = {"source": data.source, "target": data.target}
    where = f"the columns of split {split!r}"
    if data.column is not None and not {data.source, data.target} <= set(rows.column_names):
        _named(rows.features, data.column, where)
        rows = rows.select_columns(data.column).flatten()
        rows = rows.rename_columns({name: name.removeprefix(f"{data.column}.") for name in rows.column_names})
        where = f"column {data.column!r} of split {split!r}"
    for name in columns.values():
        _named(rows.features, name, where)
        if (kind := _kind(rows, name)) not in ("string", "null"):
            raise DataError(f"{name!r} in {where} should be sentences (strings), found {kind}.")
    return _renamed(rows, columns)


def _gaps(pairs: Dataset) -> list[int]:
    """The rows with a side that is None or blank."""
    sides = zip(_values(pairs, "source"), _values(pairs, "target"))
    return [row for row, sentences in enumerate(sides) if not all(s and s.strip() for s in sentences)]


def _told(gaps: list[int], pairs: Dataset) -> str:
    return f"{len(gaps)} of {len(pairs)} pairs with an empty side (first: row {gaps[0]})"


def _without_gaps(pairs: Dataset, split: str) -> Dataset:
    gaps = _gaps(pairs)
    if not gaps:
        return pairs
    if len(gaps) == len(pairs):
        raise DataError(f"Split {split!r} has {_told(gaps, pairs)}: nothing to train on.")
    logger.warning("Split %r: left out %s.", split, _told(gaps, pairs))
    return pairs.select(sorted(set(range(len(pairs))) - set(gaps)))


def _complete(pairs: Dataset, split: str) -> Dataset:
    if gaps := _gaps(pairs):
        told = _told(gaps, pairs)
        raise DataError(f"Split {split!r} has {told}. Scores need every pair: fill or remove them.")
    return pairs


# ------------------------------------------------------------------------------------------ images


def _images(rows: Dataset, data: ImageData, split: str) -> Dataset:
    _not_empty(rows, split)
    if data.embedded is not None:
        return rows
    for name in (data.image, data.label):
        _named(rows.features, name, f"the columns of split {split!r}")
    rows = _renamed(rows, {"image": data.image, "label": data.label})
    if isinstance(rows.features["image"], Image):
        return rows
    kind = _kind(rows, "image")
    if kind != "binary" and not kind.startswith("struct<bytes: "):  # what Image() stores, without its name
        raise DataError(f"{data.image!r} of split {split!r} should hold images, found {kind}.")
    return rows.cast_column("image", Image())


def _classes(train: Dataset, split: str) -> ClassLabel:
    feature = train.features["label"]
    if isinstance(feature, ClassLabel):
        return feature
    _check_kind(train, split)
    found = {label for label in _values(train, "label") if label is not None}
    if all(isinstance(label, str) for label in found):
        return ClassLabel(names=sorted(found))
    return ClassLabel(names=[str(i) for i in range(1 + max(found))])


def _labelled(rows: Dataset, classes: ClassLabel, split: str) -> Dataset:
    """`rows` with labels in 0 .. classes - 1, of feature `classes`."""
    feature = rows.features["label"]
    if isinstance(feature, ClassLabel) and feature.names != classes.names:
        ours, theirs = next((a, b) for a, b in zip_longest(classes.names, feature.names) if a != b)
        raise DataError(f"Split {split!r} has other classes than train: {theirs!r} for {ours!r}.")
    _check_kind(rows, split)
    labels = _values(rows, "label")
    known = {*range(classes.num_classes), *classes.names}
    wrong = [row for row, label in enumerate(labels) if label not in known]
    if wrong:
        raise DataError(
            f"Split {split!r} has {len(wrong)} labels that are none of train's {classes.num_classes} classes "
            f"(first: row {wrong[0]}, {labels[wrong[0]]!r}). Correct or remove those rows."
        )
    with no_progress_bars():
        return rows if feature == classes else rows.cast_column("label", classes)


def _check_kind(rows: Dataset, split: str) -> None:
    kind = _kind(rows, "label")
    if kind != "string" and "int" not in kind:
        raise DataError(f"Labels of split {split!r} should be integers or names, found {kind}.")


# ------------------------------------------------------------------------------------------ rows


def _column(rows: Dataset, name: str) -> Any:
    """One column as an Arrow array, nothing decoded."""
    return rows.select_columns(name).with_format("arrow")[:].column(name)


def _kind(rows: Dataset, name: str) -> str:
    """Arrow's name of a column's type: "string", "int64", "double", ..."""
    return str(_column(rows, name).type).removeprefix("large_")


def _values(rows: Dataset, name: str) -> list[Any]:
    values: list[Any] = _column(rows, name).to_pylist()
    return values


def _renamed(rows: Dataset, columns: dict[str, str]) -> Dataset:
    """Only `columns` (new name → old name), whatever else the rows have."""
    parts = [rows.select_columns(old).rename_columns({old: new}) for new, old in columns.items()]
    return concatenate_datasets(parts, axis=1)


def _not_empty(rows: Dataset, split: str) -> None:
    if not len(rows):
        raise DataError(f"Split {split!r} has no rows.")


def _spread(rows: Dataset, limit: int | None) -> Dataset:
    """So many rows, evenly from first to last: files are often sorted, by class, by length, by origin."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(np.arange(limit) * len(rows) // limit)


def _hold_out(train: Dataset, data: Source, keys: Iterable[Any]) -> tuple[Dataset, Dataset]:
    """(rest of train, validation): `validation_fraction` of the rows, and all others with their keys."""
    by_row = list(keys)
    drawn = random.Random(HELD_OUT_SEED).sample(by_row, round(len(by_row) * data.validation_fraction))
    held = set(drawn)
    chosen = [row for row, key in enumerate(by_row) if key in held]
    rest = [row for row, key in enumerate(by_row) if key not in held]
    if not chosen or not rest:
        raise DataError(
            f"validation_fraction {data.validation_fraction} of {len(train)} training rows leaves "
            f"{len(rest)} to train on and {len(chosen)} to validate on: both must be more than none."
        )
    return train.select(rest), _spread(train.select(chosen), data.validation_rows)
