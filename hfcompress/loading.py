"""`load`: a model from a folder or repository, whichever of the two tasks it is for."""

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

import hfcompress.quantizer  # noqa: F401  (makes compressed folders readable)
from hfcompress import zoo


def load(model: Path | str, revision: str = "main", **options: Any) -> PreTrainedModel:
    """An ordinary dense model in eval mode, from a compressed or dense folder or Hub repository.

    options: from_pretrained's, such as dtype and device_map. Raises FormatError, IntegrityError: a compressed file that
    is damaged or of another model; OSError: nothing there.
    """
    config = AutoConfig.from_pretrained(model, revision=revision)
    loaded: PreTrainedModel = class_for(config).from_pretrained(model, revision=revision, **options)
    return loaded.eval()


def class_for(config: PretrainedConfig) -> Any:
    """The class of transformers that makes such networks: translators have an encoder and a decoder, others see."""
    zoo.register()  # our own small networks, which timm does not have
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForImageClassification
