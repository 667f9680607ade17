"""A training split that is read while it is trained on: where its rows come from, and which are held out of it.

The other splits are read whole. Where validation is held out of a stream, the hash of what is to be predicted from (a
source sentence, an image's bytes) decides, so that no process has to know all rows; the first of those are validation.
"""

import glob
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Features, Image, load_dataset, load_dataset_builder

from hfcompress.data import Splits, is_local, load_images, load_translation, reader
from hfcompress.errors import DataError
from hfcompress.passes import Pieces, Row
from hfcompress.schema import ImageData, TranslationData
from hfcompress.sources import (
    JSON_SUFFIXES,
    as_object,
    files_of,
    lines_of,
    no_progress_bars,
    parse,
    read_split,
    told_of_hub,
)

FIRST = 1000
"""Rows of a stream that are looked at before the first step: are its columns there, of the right types?"""
_HELD_OUT = "held out"
_FILE_ROWS = 10_000


@dataclass(frozen=True)
class Streamed:
    """The splits, of train only the first rows, and the whole of train as a stream.

    `rows` have columns source and target (str, neither blank), or image (bytes and path) and label (int).
    """

    splits: Splits
    rows: Pieces


def stream_translation(data: TranslationData, data_root: Path | None = None) -> Streamed:
    """Sentence pairs, as `load_translation` has them. Raises DataError."""
    raw, features = _open(data, data_root)
    split = _Train(data, data_root, raw.first(data.train_rows), features, partial(_pair, data), "source")
    return Streamed(load_translation(split.settings(), data_root, split.read), split.trained())


def stream_images(data: ImageData, data_root: Path | None = None, splits: Splits | None = None) -> Streamed:
    """Labelled images, as `load_images` has them; their labels have to be a ClassLabel. Raises DataError.

    splits: those to be streamed from, in place of what `data` names.
    """
    if splits is not None:
        return Streamed(splits, Pieces.of(_undecoded(splits.train, "image")))
    raw, features = _open(data, data_root)
    if features is None or not isinstance(features.get(data.label), ClassLabel):
        raise DataError(
            f"{data.label!r} of the streamed split {data.train!r} should be a ClassLabel: without one, its classes are "
            "known only once it has been read whole."
        )
    read = partial(_labelled, data, features[data.label].num_classes)
    split = _Train(data, data_root, raw.first(data.train_rows), features, read, "image")
    return Streamed(load_images(split.settings(), data_root, split.read), split.trained())


def first_pairs(rows: Pieces, count: int) -> Dataset:
    """The first pairs of a stream."""
    return Dataset.from_list(list(islice(iter(rows), count)))


def kept_in(folder: Path, rows: Pieces) -> Dataset:
    """All pairs of a stream, in a file of `folder` that the main process writes once; memory does not hold them."""
    path = folder / "train.parquet"
    if PartialState().is_main_process and not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        schema = pyarrow.schema({"source": pyarrow.string(), "target": pyarrow.string()})
        with pyarrow.parquet.ParquetWriter(unfinished, schema) as file:
            pairs = iter(rows)
            while some := list(islice(pairs, _FILE_ROWS)):
                file.write_table(pyarrow.Table.from_pylist(some, schema))
        unfinished.rename(path)
    PartialState().wait_for_everyone()
    return read_split(folder, "train")


# ------------------------------------------------------------------------------------------ where from


def _open(data: TranslationData | ImageData, data_root: Path | None) -> tuple[Pieces, Features | None]:
    """All rows of the training split with all their columns; and its features, where its form has any."""
    languages = (data.source, data.target) if isinstance(data, TranslationData) else ()
    image = data.image if isinstance(data, ImageData) else None
    if data.embedded is not None:
        whole = reader(data, data_root)(data.train)
        return Pieces.of(_undecoded(whole, image) if image else whole), whole.features
    if is_local(data, data_root):
        assert data.folder is not None
        files = files_of(Path(data_root or ".") / data.folder, data.train, languages)
        if files[0].name.endswith(JSON_SUFFIXES):
            return Pieces(1, lambda piece: _records(files[0])), None
        if not files[0].name.endswith(".parquet"):
            return Pieces(1, lambda piece: _lines(files, languages)), None
        found = load_dataset(
            "parquet", data_files=[glob.escape(str(path)) for path in files], split="train", streaming=True
        )
    else:
        with told_of_hub(data, data.train):
            name = _on_hub(data, data.train)
            found = load_dataset(data.hub, data.config, revision=data.revision, split=name, streaming=True)
    return Pieces.of(found.decode(False) if image else found), found.features


def _records(path: Path) -> Iterator[Row]:
    for number, line in enumerate(lines_of(path), 1):
        if line.lstrip().startswith("["):
            raise DataError(f"{path}: one JSON array cannot be streamed: write one object a line.")
        if line.strip():
            yield as_object(parse(line, f"{path}:{number}"), f"{path}:{number}")


def _lines(files: list[Path], languages: tuple[str, ...]) -> Iterator[Row]:
    try:
        for sentences in zip(*map(lines_of, files), strict=True):
            yield dict(zip(languages, sentences))
    except ValueError as error:
        raise DataError(f"{files[0]} and {files[1]} do not have one line per pair: {error}") from error


def _from_hub(data: TranslationData | ImageData, split: str) -> Dataset:
    """One split whole; `load_dataset` by itself would fetch all of the dataset's files."""
    name = _on_hub(data, split)
    with told_of_hub(data, split), no_progress_bars():
        builder = load_dataset_builder(data.hub, data.config, revision=data.revision)
        files = (builder.config.data_files or {}).get(name)
        if files is None:
            raise ValueError(f"there are {', '.join(map(str, builder.config.data_files or {}))}")
        return load_dataset(
            data.hub,
            data.config,
            revision=data.revision,
            data_files={name: [str(path) for path in files]},
            features=builder.info.features,
            split=name,
            verification_mode="no_checks",  # what is known of its splits is of all of them
        )


def _on_hub(data: TranslationData | ImageData, split: str) -> str:
    return data.hub_splits.get(split, split)


# ------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True)
class _Train:
    """The training split: its rows, all columns; what `row` makes of each (None: it is left out); their key."""

    data: TranslationData | ImageData
    data_root: Path | None
    raw: Pieces
    features: Features | None
    row: Callable[[Row], Row | None]
    key: str

    def trained(self) -> Pieces:
        """What is trained on."""

        def read(piece: int) -> Iterator[Row]:
            for raw in self.raw.read(piece):
                if (row := self.row(raw)) is not None and not self._is_held_out(row):
                    yield row

        return Pieces(self.raw.count, read)

    def settings(self) -> Any:
        """Where the splits are to be looked for, by `read`; all of train's limits are dealt with here."""
        data = replace(self.data, train_rows=None)
        if data.validation is not None:
            return data
        return replace(data, validation=_HELD_OUT, validation_rows=None, validation_fraction=0.0)

    def read(self, split: str) -> Dataset:
        """A split's name → its rows, the first ones of train; or those that are held out of it."""
        if split == self.data.train:
            return self._dataset(islice(iter(self.raw), FIRST))
        if split == _HELD_OUT:
            found = ((raw, self.row(raw)) for raw in self.raw)
            held_out = (raw for raw, row in found if row is not None and self._is_held_out(row))
            return self._dataset(islice(held_out, self.data.validation_rows))
        if self.data.embedded is not None or is_local(self.data, self.data_root):
            return reader(self.data, self.data_root)(split)
        return _from_hub(self.data, split)

    def _is_held_out(self, row: Row) -> bool:
        fraction = self.data.validation_fraction
        if self.data.validation is not None or not fraction:
            return False
        key = row[self.key] if self.key == "source" else row[self.key]["bytes"] or row[self.key]["path"]
        digest = hashlib.blake2b(key if isinstance(key, bytes) else str(key).encode(), digest_size=8).digest()
        return int.from_bytes(digest) < fraction * 2**64

    def _dataset(self, rows: Iterator[Row]) -> Dataset:
        return Dataset.from_list(list(rows), features=self.features)


def _pair(data: TranslationData, raw: Row) -> Row | None:
    """Source and target; None where one is blank."""
    names = ("source", "target") if data.embedded is not None else (data.source, data.target)
    held = raw if data.column is None or set(names) <= raw.keys() else raw.get(data.column) or {}
    sentences = [held.get(name) for name in names]
    if not all(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
        return None
    return dict(zip(("source", "target"), sentences))


def _labelled(data: ImageData, classes: int, raw: Row) -> Row:
    image, label = raw[data.image], raw[data.label]
    if label is None or not 0 <= label < classes:
        raise DataError(f"Split {data.train!r} has a label that is none of its {classes} classes: {label}.")
    return {"image": {"bytes": image, "path": None} if isinstance(image, bytes) else image, "label": label}


def _undecoded(rows: Dataset, column: str) -> Dataset:
    return rows.cast_column(column, Image(decode=False))
