"""Dense models as they come, from a folder or the Hub, and the files beside their weights."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from hfcompress.claims import unsaved
from hfcompress.errors import ConfigError, DataError
from hfcompress.loading import class_for
from hfcompress.sealed import FORMAT

BESIDE = (
    *("tokenizer*", "*.spm", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("preprocessor_config.json", "processor_config.json", "normalizer.json", "generation_config.json", "labels*.txt"),
)
"""Names of tokenizer and processor files: the ones that a compressed folder takes over. None of them holds code."""
_METADATA = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")


@dataclass(frozen=True)
class Original:
    """A dense model, where it came from (`hub_id`: a repository, where it is one) and the folder of its files."""

    name: str
    hub_id: str | None
    revision: str | None
    model: PreTrainedModel
    files: Path

    def copy_files(self, folder: Path) -> list[str]:
        """Put the tokenizer's and processor's files into `folder`; their names."""
        return copy_beside(self.files, folder)

    def metadata(self) -> dict[str, Any]:
        """What its card says that holds for a compressed copy too: licence, languages, data, task."""
        card = self.files / "README.md"
        if not card.is_file():
            return {}
        try:
            said = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
        except ValueError:
            return {}  # no metadata that can be read: nothing is claimed
        return {key: said[key] for key in _METADATA if said.get(key)}


def load_original(name: str, revision: str | None = None) -> Original:
    """A transformers or timm model: a folder, a repository, or timm's spelling of these (`hf-hub:`, `local-dir:`).

    Raises DataError: nothing there that can be loaded; ConfigError: it is compressed already.
    """
    plain = name.removeprefix("hf-hub:").removeprefix("hf_hub:").removeprefix("local-dir:")
    if plain != name and "@" in plain and not Path(plain).exists():
        plain, _, revision = plain.partition("@")
    try:
        config = AutoConfig.from_pretrained(plain, revision=revision or "main")
        if (getattr(config, "quantization_config", None) or {}).get("quant_method") == FORMAT:
            raise ConfigError(
                f"'{name}' is compressed already: give the original, or make a dense copy of it with "
                "'hfcompress export --to dense'"
            )
        _mend(config)
        model = class_for(config).from_pretrained(plain, revision=revision or "main", config=config)
        return Original(name, *_origin(plain, revision), model.eval(), _files(plain, revision))
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, HFValidationError) as error:
        message = " ".join(str(error).split())[:300].rstrip(".")
        here = "a folder" if Path(plain).is_dir() else "no folder here"
        raise DataError(
            f"cannot load '{name}' ({here}) as a translation or image classification model: {message}. "
            "Give a folder that save_pretrained or timm's save_for_hf has written, or a Hub id and be online"
        ) from error


def copy_beside(source: Path, target: Path) -> list[str]:
    """Put the tokenizer's and processor's files of one folder into another; their names."""
    names = [path.name for path in sorted(source.iterdir()) if path.is_file()]
    taken = [name for name in names if any(fnmatchcase(name, pattern) for pattern in BESIDE)]
    target.mkdir(parents=True, exist_ok=True)
    for name in taken:
        shutil.copyfile(source / name, target / name)  # through the cache's symbolic links
    return taken


def saved_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a dense file holds, a tied one once."""
    ignored, persistent = unsaved(model), model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in persistent)]:
        if name not in ignored:
            yield name, tensor


def _mend(config: PretrainedConfig) -> None:
    """timm's save_for_hf writes the number of classes twice, which transformers' wrapper trips over."""
    if config.model_type == "timm_wrapper" and config.model_args:
        config.model_args.pop("num_classes", None)


def _origin(name: str, revision: str | None) -> tuple[str | None, str | None]:
    return (None, None) if Path(name).is_dir() else (name, revision)


def _files(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    wanted = [*BESIDE, "config.json", "README.md"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except LocalEntryNotFoundError as error:
        raise OSError(str(error)) from error
