"""Which rule claims which weight of a model, by its name and by what it does there."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Protocol

from torch import nn

from hfcompress.errors import ConfigError
from hfcompress.reparameterization import Kind, Reparameterization

WRAPPER_PREFIX = "timm_model."
"""transformers' TimmWrapper holds its timm model under this name; files use timm's own names."""


class RuleLike(Protocol):
    """What the compressor reads of a rule (`hfcompress.Rule` is one)."""

    @property
    def pattern(self) -> str: ...
    @property
    def kinds(self) -> tuple[Kind, ...]: ...
    @property
    def method(self) -> Reparameterization: ...


def unsaved(model: nn.Module) -> set[str]:
    """Names that no file holds: computed at construction, as Marian's sinusoidal positions are."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def kind_of(module: nn.Module, leaf: str, parameter: nn.Parameter) -> Kind:
    """What the parameter called `leaf` does in `module`."""
    if leaf.endswith("bias"):
        return Kind.BIAS
    if isinstance(module, nn.Embedding):
        return Kind.EMBEDDING
    if isinstance(module, nn.Linear):
        return Kind.LINEAR
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return Kind.CONV
    if parameter.ndim <= 1 and "norm" in type(module).__name__.lower():
        return Kind.NORM
    return Kind.OTHER


def claim(model: nn.Module, rules: Sequence[RuleLike]) -> list[tuple[int, str, Kind, nn.Parameter]]:
    """(rule, name, kind, parameter) for every parameter some rule claims, each parameter once."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    modules, ignored = dict(model.named_modules()), unsaved(model)
    claims = []
    for name, parameter in model.named_parameters():
        names = aliases[id(parameter)]
        if ignored & set(names) or not parameter.is_floating_point():
            continue  # computed at construction, never saved (Marian's sinusoidal positions)
        owner, _, leaf = name.rpartition(".")
        kind = kind_of(modules[owner], leaf, parameter)
        first = {alias: _first_match(rules, alias, kind) for alias in names}
        picks = set(first.values()) - {None}
        if len(picks) > 1:
            listing = ", ".join(f"{alias} by rule {rule}" for alias, rule in first.items() if rule is not None)
            raise ConfigError(
                f"one tied weight is claimed by several rules: {listing}. Let one rule cover all its names"
            )
        claims += [(pick, name, kind, parameter) for pick in picks if pick is not None]
    for position, rule in enumerate(rules):
        if not any(pick == position for pick, *_ in claims):
            kinds = ", ".join(k.value for k in rule.kinds)
            examples = ", ".join(name.removeprefix(WRAPPER_PREFIX) for name, _ in list(model.named_parameters())[:3])
            raise ConfigError(
                f"rule {position} (pattern '{rule.pattern}', kinds {kinds}) claims no weight: none matches, or earlier "
                f"rules took them all. The model's weights are called {examples}, …"
            )
    return claims


def _first_match(rules: Sequence[RuleLike], name: str, kind: Kind) -> int | None:
    names = (name, name.removeprefix(WRAPPER_PREFIX))  # as in the model and as in the file
    return next(
        (i for i, r in enumerate(rules) if kind in r.kinds and any(fnmatchcase(n, r.pattern) for n in names)), None
    )
