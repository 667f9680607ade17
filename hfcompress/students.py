"""Students cut from a teacher: a subset of its layers, evenly spaced, with their weights."""

import copy

from torch import nn
from transformers import PreTrainedModel

from hfcompress.errors import ConfigError
from hfcompress.schema import Layers


def from_teacher(teacher: PreTrainedModel, layers: Layers) -> PreTrainedModel:
    """A copy of an encoder-decoder `teacher` with fewer layers; embeddings, norms and the kept layers carry over.

    Marian, BART, mBART, M2M100 and Pegasus name their layers alike. Raises ConfigError: more layers than the teacher
    has, or a teacher built otherwise.
    """
    student = copy.deepcopy(teacher).requires_grad_(True).train()
    config = student.config
    for side, wanted in (("encoder", layers.encoder_layers), ("decoder", layers.decoder_layers)):
        try:
            stack = student.get_submodule(f"model.{side}.layers")
        except AttributeError as error:
            raise ConfigError(f"{type(teacher).__name__} has no model.{side}.layers to choose from") from error
        assert isinstance(stack, nn.ModuleList)
        if wanted > len(stack):
            raise ConfigError(f"from_teacher asks for {wanted} {side} layers; the teacher has {len(stack)}")
        kept = evenly_spaced(len(stack), wanted)
        student.get_submodule(f"model.{side}").layers = nn.ModuleList(stack[i] for i in kept)
        setattr(config, f"{side}_layers", wanted)
    config.num_hidden_layers = config.encoder_layers
    for name, parameter in student.named_parameters():
        if name in set(getattr(student, "_keys_to_ignore_on_save", None) or ()):
            parameter.requires_grad_(False)
    return student


def evenly_spaced(available: int, wanted: int) -> list[int]:
    """`wanted` of 0 … available − 1, first and last among them; of one, the first."""
    if wanted == 1:
        return [0]
    return [round(i * (available - 1) / (wanted - 1)) for i in range(wanted)]
