"""Networks from a recipe: pretrained, from scratch, or cut from a teacher; always transformers models."""

import logging
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    set_seed,
)
from transformers.utils import cached_file

from hfcompress import zoo
from hfcompress.claims import unsaved
from hfcompress.errors import ConfigError, DataError
from hfcompress.schema import ImageData, Network
from hfcompress.students import from_teacher
from hfcompress.teacher import check_vocabularies

logger = logging.getLogger(__name__)


def translator(
    network: Network,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int,
    teacher: PreTrainedModel | None,
) -> PreTrainedModel:
    """A seq2seq model over `tokenizer`'s vocabulary. Raises ConfigError: unknown or impossible fields."""
    set_seed(seed)
    if network.timm is not None:
        raise ConfigError("a translation recipe cannot have a 'timm' network: give marian, pretrained or from_teacher")
    if network.pretrained is not None:
        model: PreTrainedModel = from_pretrained(AutoModelForSeq2SeqLM, network.pretrained, network.revision)
        return model
    if network.from_teacher is not None:
        if teacher is None:
            raise ConfigError("'from_teacher' needs a teacher")
        return from_teacher(teacher, network.from_teacher)
    config = _marian_config(network.marian or {}, tokenizer, max_length)
    try:
        return MarianMTModel(config)
    except ValueError as error:
        raise ConfigError(f"a Marian with these fields cannot be built: {error}") from error


def classifier(
    network: Network, data: ImageData, labels: list[str], data_root: Path | None, seed: int
) -> PreTrainedModel:
    """An image classifier over `labels`, inside transformers' TimmWrapper. Raises ConfigError, DataError."""
    set_seed(seed)
    if network.pretrained is not None:
        pretrained: PreTrainedModel = from_pretrained(
            AutoModelForImageClassification, network.pretrained, network.revision
        )
        check_classifier(network.pretrained, pretrained, labels)
        return pretrained
    if network.timm is None:
        raise ConfigError("an image recipe's network is 'timm' or 'pretrained'")
    zoo.register()
    if not timm.is_model(network.timm):
        near = timm.list_models(f"*{network.timm[:6]}*")[:5]
        raise ConfigError(f"timm has no architecture '{network.timm}'; near ones: {', '.join(near) or 'none'}")
    shape = {
        "input_size": [len(data.mean), data.size, data.size],
        "mean": list(data.mean),
        "std": list(data.std),
    }
    config = TimmWrapperConfig(
        architecture=network.timm,
        model_args=dict(network.arguments) or None,
        pretrained_cfg={**shape, "crop_pct": 1.0, "interpolation": "bicubic"},
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    try:
        model = TimmWrapperForImageClassification(config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"timm's {network.timm} does not take these arguments: {error}") from error
    if network.weights is not None:
        _load_weights(model, network.weights, data_root)
    else:
        _start_as_timm_does(model)
    return model


def tokenizer_of(network: Network) -> str:
    """Where a pretrained network's tokenizer is found: with the network."""
    assert network.pretrained is not None
    return network.pretrained


def check_tokenizers(teacher: nn.Module, tokenizer: Any) -> None:
    """Compare `tokenizer` with the teacher's own, which lies where the teacher was loaded from: a folder, or the cache.

    Says so where the teacher has none there; a teacher made in code was loaded from nowhere. Raises TeacherError: an id
    is another token; DataError: it cannot be read.
    """
    place = teacher.name_or_path if isinstance(teacher, PreTrainedModel) else ""
    if not place or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    try:
        cached_file(place, "tokenizer_config.json", local_files_only=True)
    except OSError:
        logger.warning("No tokenizer lies beside the teacher in %s: it is not compared with the student's.", place)
        return
    check_vocabularies(from_pretrained(AutoTokenizer, place), tokenizer)


def from_pretrained(auto: Any, name: str, revision: str | None = None) -> Any:
    """What `auto`, a class of transformers, makes of a folder or Hub id. Raises DataError: nothing it can load."""
    try:
        return auto.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError, SafetensorError) as error:
        message = str(error).strip().partition("\n")[0].rstrip(".")
        here = "a folder" if Path(name).is_dir() else "no folder here"
        raise DataError(
            f"cannot load '{name}' ({here}) by {auto.__name__}: {message}. "
            "Give a local folder, or a Hub id and be online"
        ) from error


def check_classifier(name: str, model: PreTrainedModel, labels: list[str]) -> None:
    """Raises DataError unless `model` is one of timm's with as many labels, and the same ones in the same order."""
    config = model.config
    if config.model_type != "timm_wrapper":
        raise DataError(f"{name} is a {type(model).__name__}; image recipes are for models of timm (TimmWrapper)")
    known = [config.id2label[i] for i in range(config.num_labels)]
    if len(known) != len(labels):
        raise DataError(f"{name} knows {len(known)} labels, the data has {len(labels)}")
    if known != labels and sorted(known) == sorted(labels):
        ours, theirs = next((a, b) for a, b in zip(labels, known) if a != b)
        raise DataError(f"{name} orders its labels otherwise than the data: {theirs!r} where the data has {ours!r}")


def _marian_config(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> MarianConfig:
    known = MarianConfig().to_dict().keys()
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise ConfigError(f"MarianConfig has no {', '.join(unknown)}; see transformers' documentation of MarianConfig")
    pad = tokenizer.pad_token_id
    given: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": pad,
        "decoder_start_token_id": pad,
        "eos_token_id": tokenizer.eos_token_id,
        "forced_eos_token_id": tokenizer.eos_token_id,
        "bad_words_ids": [[pad]],
        "max_position_embeddings": max(max_length, 128),
        "scale_embedding": True,
        "activation_function": "relu",
    }
    return MarianConfig(**{**given, **fields})


def _start_as_timm_does(model: PreTrainedModel) -> None:
    """Gives the network its own initial weights: transformers has drawn every layer's anew, all at one scale."""
    config = model.config
    own = timm.create_model(config.architecture, num_classes=config.num_labels, **(config.model_args or {}))
    model.timm_model.load_state_dict(own.state_dict())


def _load_weights(model: PreTrainedModel, weights: str, data_root: Path | None) -> None:
    path = (data_root or Path()) / weights
    if not path.is_file():
        raise DataError(f"no weights at {path}: give the folder that holds '{weights}' as --data-root")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise DataError(f"{path} cannot be read: {error}. Is it a whole safetensors file?") from error
    wanted = model.timm_model.state_dict()
    missing = {name for name in wanted.keys() - state.keys() if not name.endswith("num_batches_tracked")}
    problems = {
        "missing": missing,
        "unknown": state.keys() - wanted.keys(),
        "of another shape": {name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape},
    }
    if any(problems.values()):
        told = ", ".join(f"{len(names)} {what} (first {min(names)})" for what, names in problems.items() if names)
        raise DataError(f"{path} is of another network than {model.config.architecture}: weights {told}")
    model.timm_model.load_state_dict(state, strict=False)


def parameters(model: torch.nn.Module) -> int:
    """Trainable numbers, a tied weight once, sinusoidal positions not at all."""
    ignored = unsaved(model)
    return sum(p.numel() for name, p in model.named_parameters() if name not in ignored)
