"""`load`: a model from a folder or repository, whichever of the two tasks it is for."""

from pathlib import Path

from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSeq2SeqLM, PreTrainedModel

import hfcompress.quantizer  # noqa: F401  (makes compressed folders readable)
from hfcompress import cifar


def load(model: Path | str, revision: str = "main") -> PreTrainedModel:
    """An ordinary dense model in eval mode, from a compressed or dense folder or Hub repository.

    Raises FormatError, IntegrityError: a compressed file that is damaged or of another model; OSError: nothing there.
    """
    cifar.register()
    config = AutoConfig.from_pretrained(model, revision=revision)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForImageClassification
    loaded: PreTrainedModel = auto.from_pretrained(model, revision=revision)
    return loaded.eval()
