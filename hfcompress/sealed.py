"""A safetensors file of one array of bytes, in which nothing can change unnoticed: one form of header, one digest."""

import hashlib
import json
import re

from hfcompress.errors import FormatError, IntegrityError

FORMAT, VERSION = "hfcompress", 1
MAX_HEADER = 1 << 14  # of a file that is not ours; a header of a million tensors costs seconds to read
_DIGEST = 32
_NAME = f"{FORMAT}-{VERSION}"


def seal(payload: bytes) -> bytes:
    """The file's bytes: header, SHA-256 of the payload, payload."""
    return b"".join([_header(_DIGEST + len(payload)), hashlib.sha256(payload).digest(), payload])


def unseal(data: bytes | memoryview) -> memoryview:
    """The payload.

    Raises FormatError: truncated, foreign, or of another version; IntegrityError: a byte differs from what was written.
    """
    view = memoryview(data)
    length = int.from_bytes(view[:8], "little")
    if len(view) >= 8 and length > MAX_HEADER:
        raise FormatError("its header is longer than any that hfcompress writes: not a compressed file")
    if len(view) < 8 + length:
        promised = "fewer than any file has" if len(view) < 8 else f"its header alone promises {8 + length:,}"
        raise FormatError(f"truncated, or not a compressed file: {len(view):,} bytes were found, {promised}")
    content = view[8 + length :]
    if view[: 8 + length] != _header(len(content)):
        _explain(bytes(view[: 8 + length]), len(view))
    if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
        raise IntegrityError("its bytes are not those that were written (sha256 differs): download it again")
    return content[_DIGEST:]


def _header(size: int) -> bytes:
    """Its length and itself, padded with spaces to a multiple of 8 bytes."""
    header = {_NAME: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _explain(header: bytes, found: int) -> None:
    """Raises what is wrong with a file of `found` bytes whose header, its length before it, is not as expected."""
    try:
        names = [str(name) for name in json.loads(header[8:]) if name != "__metadata__"]
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"not a safetensors file ({error}): damaged, or not a compressed file") from error
    form, _, version = names[0].rpartition("-") if len(names) == 1 else ("", "", "")
    if form != FORMAT:
        raise FormatError(f"a safetensors file, but not one that hfcompress wrote (its one array would be '{_NAME}')")
    if version != str(VERSION):
        raise FormatError(f"format version {version}, this package reads version {VERSION}: upgrade hfcompress")
    size = re.search(rb'"shape":\[(\d{1,19})\]', header)
    if size is None or header != _header(int(size[1])):
        raise IntegrityError("the file's header is not as it was written: damaged, download it again")
    promised = len(header) + int(size[1])
    told = f"{found:,} bytes were found, its header promises {promised:,}: download it again"
    if found < promised:
        raise FormatError(f"truncated: {told}")
    raise IntegrityError(f"something was added to it: {told}")
