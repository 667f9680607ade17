"""Which method stores which weight of a model that is compressed as it is: by default, by name, or by a file."""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked
from transformers import PreTrainedModel

from hfcompress.claims import kind_of
from hfcompress.errors import ConfigError
from hfcompress.methods import BY_NAME, Dense
from hfcompress.originals import saved_tensors
from hfcompress.recipe_checks import explain
from hfcompress.reparameterization import MATRICES, Kind, Reparameterization
from hfcompress.schema import STRICT, Rule
from hfcompress.yaml_lines import read, refuse


@checked(frozen=True, config=STRICT)
class RulesFile:
    """What `--rules` names."""

    rules: tuple[Rule, ...] = Field(min_length=1)


def default_rules(model: PreTrainedModel, method: Reparameterization) -> tuple[Rule, ...]:
    """`method` for matrices and kernels, float16 for norms, biases and the rest (float32 where that overflows)."""
    kinds = {name: kind for name, kind, _ in parameters(model)}
    matrices = tuple(kind for kind in MATRICES if kind in kinds.values())
    if not matrices:
        raise ConfigError(f"{type(model).__name__} has no matrix, embedding or convolution to compress")
    rules = [Rule(method=method, kinds=matrices)]
    most = torch.finfo(torch.float16).max
    for name, kind, parameter in parameters(model):
        if kind not in MATRICES and parameter.numel() and parameter.abs().max() > most:
            rules.append(Rule(method=Dense("float32"), pattern=_literally(name), kinds=(kind,)))
    others = tuple(kind for kind in Kind if kind in kinds.values() and kind not in MATRICES)
    if len(rules) - 1 < sum(kind in others for kind in kinds.values()):
        rules.append(Rule(method=Dense("float16"), kinds=others))
    return tuple(rules)


def rules_in(path: Path) -> tuple[Rule, ...]:
    """The rules of a YAML file: a list `rules` as in a recipe's `compression`. Raises ConfigError, with lines."""
    documents = read(path)
    if len(documents) > 1:
        raise ConfigError(f"{path}: {len(documents)} documents: a file of rules is one, with a list under 'rules'")
    try:
        return TypeAdapter(RulesFile).validate_json(json.dumps(documents[0].tree)).rules
    except ValidationError as error:
        refuse(explain(error, documents[0], root=RulesFile))
        raise


def method_called(name: str, bits: float | None) -> Reparameterization:
    """A method by its name, with so many bits where it has such a field. Raises ConfigError."""
    if name not in BY_NAME:
        raise ConfigError(f"no method '{name}': there are {', '.join(BY_NAME)}")
    if bits is None:
        return BY_NAME[name]()
    if "bits" not in {field.name for field in fields(BY_NAME[name])}:  # type: ignore[arg-type]
        raise ConfigError(f"--method {name} has no number of bits to set: leave --bits out, or write --rules")
    if bits != int(bits):
        raise ConfigError(f"--method {name} takes whole bits, found {bits:g}")
    made: Any = BY_NAME[name]
    method: Reparameterization = made(bits=int(bits))
    return method


def parameters(model: PreTrainedModel) -> Iterator[tuple[str, Kind, torch.nn.Parameter]]:
    """Those that a file holds, a tied one once."""
    modules = dict(model.named_modules())
    for name, tensor in saved_tensors(model):
        if isinstance(tensor, torch.nn.Parameter):
            owner, _, leaf = name.rpartition(".")
            yield name, kind_of(modules[owner], leaf, tensor), tensor


def _literally(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
