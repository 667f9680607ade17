"""Students cut from a teacher: some of its layers, narrower feed-forward layers, with the teacher's weights."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hfcompress.claims import unsaved
from hfcompress.errors import ConfigError
from hfcompress.schema import Layers

_KEY = "cut_from_teacher"
"""The entry of a student's config.json that says what it was cut from."""


@dataclass(frozen=True)
class Cut:
    """What became of a teacher. layers: indices of the teacher's; the pairs are (teacher's, student's)."""

    encoder_layers: tuple[int, ...]
    decoder_layers: tuple[int, ...]
    layers: tuple[int, int]  # the teacher's, of encoder and decoder
    ffn_dim: tuple[int, int]
    parameters: tuple[int, int]

    def __str__(self) -> str:
        sides = zip(("encoder", "decoder"), (self.encoder_layers, self.decoder_layers), self.layers)
        parts = [f"{side} layers {', '.join(map(str, kept))} of {n}" for side, kept, n in sides]
        if self.ffn_dim[0] != self.ffn_dim[1]:
            parts.append(f"{self.ffn_dim[1]} of {self.ffn_dim[0]} feed-forward units")
        return f"{'; '.join(parts)}; {self.parameters[1]:,} of {self.parameters[0]:,} parameters"


@dataclass(frozen=True)
class _Family:
    """How a family of models names its parts."""

    layers: str  # prefix of a side's layers
    inner: tuple[str, ...]  # the feed-forward layer's first projections, whichever it has
    outer: str  # and its last
    counts: tuple[str, str]  # config's fields: layers of encoder and decoder
    widths: tuple[str, ...]


_BART = _Family(
    "model.{}.layers.",
    ("fc1",),
    "fc2",
    ("encoder_layers", "decoder_layers"),
    ("encoder_ffn_dim", "decoder_ffn_dim"),
)
"""Marian, BART, mBART, M2M100 and NLLB, Pegasus."""
_T5 = _Family("{}.block.", ("wi", "wi_0", "wi_1"), "wo", ("num_layers", "num_decoder_layers"), ("d_ff",))
"""T5, mT5 and their like."""


def from_teacher(teacher: PreTrainedModel, layers: Layers) -> PreTrainedModel:
    """An encoder-decoder of the teacher's class; embeddings, norms, the layers and units kept have its weights.

    Ties are the teacher's. Of the feed-forward units, those stay whose incoming and outgoing weights have the largest
    product of norms. What was done is in the student's config, see `cut_of`. Raises ConfigError: layers or units that
    the teacher does not have, or a teacher built otherwise.
    """
    config, weights = copy.deepcopy(teacher.config), teacher.state_dict()
    family = _family(teacher, weights)
    chosen = []
    for side, wanted, field in zip(
        ("encoder", "decoder"), (layers.encoder_layers, layers.decoder_layers), family.counts
    ):
        path = family.layers.format(side)
        kept = _chosen(side, wanted, 1 + max(_numbers(weights, path)))
        weights = _with_layers(weights, path, kept)
        setattr(config, field, len(kept))
        chosen.append(tuple(kept))
    if family is _BART:
        config.num_hidden_layers = config.encoder_layers
    width = max(getattr(teacher.config, field) for field in family.widths)
    if layers.ffn_dim is not None:
        weights = _narrower(weights, family, layers.ffn_dim, config)
    student = type(teacher)(config).to(teacher.dtype)
    student.load_state_dict(weights)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    encoder, decoder = (getattr(teacher.config, field) for field in family.counts)
    cut = Cut(
        encoder_layers=chosen[0],
        decoder_layers=chosen[1],
        layers=(encoder, decoder),
        ffn_dim=(width, layers.ffn_dim or width),
        parameters=(_parameters(teacher), _parameters(student)),
    )
    setattr(student.config, _KEY, asdict(cut))
    return student


def cut_of(student: PreTrainedModel) -> Cut | None:
    """What `from_teacher` did, also after the student was saved and loaded; None for any other model."""
    record = student.config.to_dict().get(_KEY)
    if record is None:
        return None
    return Cut(**{name: tuple(value) for name, value in record.items()})


def evenly_spaced(available: int, wanted: int) -> list[int]:
    """`wanted` of 0 … available − 1, first and last among them; of one, the first."""
    if wanted == 1:
        return [0]
    return [round(i * (available - 1) / (wanted - 1)) for i in range(wanted)]


def _family(teacher: PreTrainedModel, weights: dict[str, Tensor]) -> _Family:
    for family in (_BART, _T5):
        if _numbers(weights, family.layers.format("encoder")) and _numbers(weights, family.layers.format("decoder")):
            return family
    looked = " or ".join(family.layers.format("encoder")[:-1] for family in (_BART, _T5))
    raise ConfigError(
        f"{type(teacher).__name__} has no {looked} to choose from: students are cut from Marian, BART, mBART, M2M100, "
        "NLLB, Pegasus, T5 and mT5"
    )


def _chosen(side: str, wanted: int | Sequence[int], available: int) -> list[int]:
    if isinstance(wanted, int):
        if wanted > available:
            raise ConfigError(f"from_teacher asks for {wanted} {side} layers; the teacher has {available}")
        return evenly_spaced(available, wanted)
    if list(wanted) != sorted(set(wanted)) or wanted[-1] >= available:
        raise ConfigError(
            f"from_teacher asks for {side} layers {list(wanted)}: give them in rising order, each once, out of "
            f"0 … {available - 1}"
        )
    return list(wanted)


def _numbers(weights: dict[str, Tensor], path: str) -> set[int]:
    return {int(name.removeprefix(path).partition(".")[0]) for name in weights if name.startswith(path)}


def _with_layers(weights: dict[str, Tensor], path: str, kept: Sequence[int]) -> dict[str, Tensor]:
    """`weights` with only the kept layers, renumbered; T5's first layer has the biases of positions for all layers."""
    left = {name: tensor for name, tensor in weights.items() if not name.startswith(path)}
    for new, old in enumerate(kept):
        prefix = f"{path}{old}."
        left |= {f"{path}{new}.{n.removeprefix(prefix)}": t for n, t in weights.items() if n.startswith(prefix)}
    return left | {n: t for n, t in weights.items() if n.startswith(f"{path}0.") and "relative_attention_bias" in n}


def _narrower(weights: dict[str, Tensor], family: _Family, width: int, config: PretrainedConfig) -> dict[str, Tensor]:
    """`weights` with `width` units in every feed-forward layer."""
    narrowed = dict(weights)
    for name, last in weights.items():
        block, _, leaf = name.rpartition(f".{family.outer}.")
        if leaf != "weight":
            continue
        units = last.shape[1]  # [model's width, units]
        if width > units:
            raise ConfigError(f"from_teacher asks for ffn_dim {width}; the teacher has {units} units in {block}")
        first = [n for part in family.inner for n in (f"{block}.{part}.weight", f"{block}.{part}.bias") if n in weights]
        strength = last.float().norm(dim=0)
        for inner in first:
            if inner.endswith("weight"):
                strength = strength * weights[inner].float().norm(dim=1)
        kept = torch.topk(strength, width).indices.sort().values
        narrowed[name] = last[:, kept]
        narrowed |= {inner: weights[inner][kept] for inner in first}
    for field in family.widths:
        setattr(config, field, width)
    return narrowed


def _parameters(model: PreTrainedModel) -> int:
    ignored: Any = unsaved(model)
    return sum(p.numel() for name, p in model.named_parameters() if name not in ignored)
