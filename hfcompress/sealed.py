"""A safetensors file in which nothing can change unnoticed: digests of its arrays, and a header of one form only."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from hfcompress.errors import FormatError, IntegrityError

FORMAT, VERSION = "hfcompress", 1
MAX_HEADER = 1 << 14  # a dozen arrays; a header of a million empty ones costs seconds to read
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16"}
_DTYPES |= {"int8": "I8", "uint8": "U8"}
_NUMPY = {code: name for name, code in _DTYPES.items()}


def seal(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The file's bytes; the same arrays (one-dimensional) give the same bytes in any process."""
    little = {name: np.ascontiguousarray(a, dtype=a.dtype.newbyteorder("<")) for name, a in arrays.items()}
    bodies = {name: little[name].tobytes() for name in _order(little)}
    digests = {name: hashlib.sha256(body).hexdigest() for name, body in bodies.items()}
    return b"".join([_header(little, digests), *bodies.values()])


def unseal(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays, in the order in which they lie in the file.

    Raises FormatError: truncated, foreign, or of another version; IntegrityError: a byte differs from what was written.
    """
    length = int.from_bytes(data[:8], "little") if len(data) >= 8 else len(data)
    if len(data) < 8 + length:
        raise FormatError("not a whole safetensors file: truncated, or not a compressed file")
    if length > MAX_HEADER:
        raise FormatError("its header is longer than any that hfcompress writes: not a compressed file")
    try:
        entries = deserialize(data)
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError, RecursionError) as error:
        raise FormatError(f"not a whole safetensors file ({error}): truncated, or not a compressed file") from error
    if metadata.get("format") != FORMAT:
        raise FormatError(
            "a safetensors file, but not one that hfcompress wrote (its metadata has no format 'hfcompress')"
        )
    if metadata.get("version") != str(VERSION):
        raise FormatError(
            f"format version {metadata.get('version')}, this package reads version {VERSION}: upgrade hfcompress"
        )
    digests = {name: hashlib.sha256(entry["data"]).hexdigest() for name, entry in entries}
    for name, digest in digests.items():
        if digest not in metadata.get("sha256", ""):
            raise IntegrityError(
                f"the bytes of '{name}' are not those that were written (sha256 differs): download it again"
            )
    try:
        arrays = {name: np.frombuffer(entry["data"], dtype=_NUMPY[entry["dtype"]]) for name, entry in entries}
    except KeyError as error:
        raise IntegrityError(f"the file's header is not as it was written (dtype {error})") from error
    if _header(arrays, digests) != data[: 8 + length]:
        raise IntegrityError("the file's header is not as it was written: download it again")
    return arrays


def _header(arrays: Mapping[str, NDArray[Any]], digests: Mapping[str, str]) -> bytes:
    """Its length and itself, padded with spaces to a multiple of 8 bytes."""
    sums = json.dumps({name: digests[name] for name in sorted(digests)}, separators=(",", ":"))
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": str(VERSION), "sha256": sums}}
    start = 0
    for name in _order(arrays):
        array = arrays[name]
        end = start + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": [array.size], "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _order(arrays: Mapping[str, NDArray[Any]]) -> list[str]:
    """Widest first, so that every array lies aligned."""
    return sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
