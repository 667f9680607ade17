"""Students cut from a teacher: a subset of its layers, evenly spaced, with their weights."""

import copy

from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.errors import ConfigError
from hfcompress.schema import Layers


def from_teacher(teacher: PreTrainedModel, layers: Layers) -> PreTrainedModel:
    """An encoder-decoder like `teacher` with fewer layers; embeddings, norms and the kept layers have its weights.

    Marian, BART, mBART, M2M100 and Pegasus name their layers alike. Raises ConfigError: more layers than the teacher
    has, or a teacher built otherwise.
    """
    config = copy.deepcopy(teacher.config)
    weights = teacher.state_dict()
    for side, wanted in (("encoder", layers.encoder_layers), ("decoder", layers.decoder_layers)):
        path = f"model.{side}.layers."
        available = {int(name.removeprefix(path).partition(".")[0]) for name in weights if name.startswith(path)}
        if not available:
            raise ConfigError(f"{type(teacher).__name__} has no {path[:-1]} to choose from")
        if wanted > len(available):
            raise ConfigError(f"from_teacher asks for {wanted} {side} layers; the teacher has {len(available)}")
        kept = {f"{path}{old}.": f"{path}{new}." for new, old in enumerate(evenly_spaced(len(available), wanted))}
        weights = _renamed(weights, path, kept)
        setattr(config, f"{side}_layers", wanted)
    config.num_hidden_layers = config.encoder_layers
    student = type(teacher)(config).to(teacher.dtype)
    student.load_state_dict(weights)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def _renamed(weights: dict[str, Tensor], path: str, prefixes: dict[str, str]) -> dict[str, Tensor]:
    """`weights` whose names start with `path` under their new prefixes, without those that have none."""
    moved = {
        new + name.removeprefix(old): tensor
        for old, new in prefixes.items()
        for name, tensor in weights.items()
        if name.startswith(old)
    }
    return {**{name: tensor for name, tensor in weights.items() if not name.startswith(path)}, **moved}


def evenly_spaced(available: int, wanted: int) -> list[int]:
    """`wanted` of 0 … available − 1, first and last among them; of one, the first."""
    if wanted == 1:
        return [0]
    return [round(i * (available - 1) / (wanted - 1)) for i in range(wanted)]
