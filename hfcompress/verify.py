"""`hfcompress verify`: is a compressed file whole, does it decode, and is it of the network beside it?"""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from hfcompress.checkpoint import FILE_NAME, read, sizes
from hfcompress.container import Reader
from hfcompress.errors import ConfigError, FormatError
from hfcompress.loading import class_for
from hfcompress.quantizer import check_model
from hfcompress.sealed import FORMAT


def file_at(path: Path) -> Path:
    """The compressed file at `path`, which is that file or its folder. Raises ConfigError: there is none."""
    file = path / FILE_NAME if path.is_dir() else path
    if file.is_file():
        return file
    found = "holds no" if path.is_dir() else "is neither such a folder nor a"
    raise ConfigError(f"{path} {found} {FILE_NAME}: give a folder that 'hfcompress run' or 'compress' has written")


def verify(path: Path) -> Iterator[str]:
    """Check everything about a compressed file that can be checked without the original; say what has been found.

    Raises ConfigError: no compressed file is there; FormatError, IntegrityError: it is damaged, or not of the network
    that config.json beside it describes.
    """
    file = file_at(path)
    reader = read(file)
    yield f"digests: {reader.size:,} bytes are those that were written, by {reader.tool}"
    try:
        yield _decoded(reader)
        yield _accounted(reader)
        yield _fits(reader, file.parent)
    except FormatError as error:
        raise type(error)(f"{file}: {error}") from error


def _decoded(reader: Reader) -> str:
    wanted, slots = reader.shapes(), {stored.slot.name for stored in reader.slots}
    values, seen = 0, set()
    for name, tensor in reader.tensors():
        if tuple(tensor.shape) != wanted[name]:
            raise FormatError(f"{name} decodes to {tuple(tensor.shape)} instead of {wanted[name]}")
        if name in slots and not tensor.isfinite().all():
            raise FormatError(f"{name} decodes to NaN or infinity")
        values += tensor.numel()
        seen.add(name)
    if seen != wanted.keys():
        raise FormatError(f"{', '.join(sorted(wanted.keys() - seen)[:5])} could not be decoded")
    return f"decoding: {len(seen):,} tensors with {values:,} values, every decoded weight finite"


def _accounted(reader: Reader) -> str:
    found = sizes(reader)
    around = found.tables + found.index + found.header
    arrays = sum(t.arrays for t in found.tensors)
    if found.total != reader.size or found.stream < 0 or around + arrays + found.stream != found.total:
        raise FormatError(f"its parts do not add up to its {reader.size:,} bytes")
    return f"tables: {found.tables:,} bytes; with codes, arrays, index and header they make up the file to the byte"


def _fits(reader: Reader, folder: Path) -> str:
    if not (folder / "config.json").is_file():
        return "network: there is no config.json beside the file, so its tensors' names were compared with nothing"
    model = skeleton(folder)
    check_model(model, reader)
    return f"network: names and shapes are those of the {type(model).__name__} that config.json describes"


def skeleton(folder: Path) -> PreTrainedModel:
    """The network that config.json describes, without memory for weights. Raises FormatError: it cannot be built."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
        quantization = getattr(config, "quantization_config", None) or {}
        if quantization.get("quant_method") != FORMAT:
            raise FormatError("its config.json does not say that the weights are compressed (quantization_config)")
        with torch.device("meta"):
            model: PreTrainedModel = class_for(config).from_config(config)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"config.json beside it describes no network that can be built ({reason})") from error
    model.tie_weights()
    return model
