"""Images decoded when they are read, as rows that networks are trained on; broken ones are named."""

import struct
from collections.abc import Callable
from typing import Any

import PIL.Image
from datasets import Dataset, Image

from hfcompress.errors import DataError

BROKEN_IMAGE = (  # what PIL's decoders raise
    *(OSError, SyntaxError, ValueError, TypeError, RuntimeError, LookupError, EOFError, struct.error),
    PIL.Image.DecompressionBombError,
)


def with_images(dataset: Dataset, transform: Callable[[Any], Any]) -> Dataset:
    """Rows become {"pixel_values": transform(PIL image), "labels": int}, when they are read.

    Reading an image that is missing, broken or cut short raises DataError with its row.
    """
    stored = dataset.cast_column("image", Image(decode=False))

    def read(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        images = [decode(record, lambda found: f"row {_row(found, stored)}") for record in rows["image"]]
        return {"pixel_values": [transform(image) for image in images], "labels": rows["label"]}

    return stored.with_transform(read)


def decode(record: dict[str, Any] | None, where: Callable[[Any], str]) -> Any:
    """The image that a record of bytes and path holds. Raises DataError, which tells `where` the record is."""
    try:
        if record is None:
            raise ValueError("there is none")
        return Image().decode_example(record)
    except BROKEN_IMAGE as error:
        path = f" ({record['path']})" if record and record["path"] else ""
        raise DataError(f"The image in {where(record)}{path} cannot be read: {error}. Repair or remove it.") from error


def _row(record: Any, stored: Dataset) -> int | None:
    return next((i for i, other in enumerate(stored.select_columns("image")) if other["image"] == record), None)
