"""The networks of ours that timm does not have, made known to it: transformers' TimmWrapper then builds them."""

from collections.abc import Callable, Mapping
from typing import Any

import timm
from timm.models import register_model
from torch import nn

from hfcompress import cifar, paper_networks

ARCHITECTURES: dict[str, tuple[Callable[..., nn.Module], Mapping[str, Any]]] = {
    **cifar.ARCHITECTURES,
    **paper_networks.ARCHITECTURES,
}
"""Name → (what builds it, timm's configuration of it)."""

_TIMMS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments of `timm.create_model` that are not the network's."""


def register() -> None:
    """Make the networks known to timm (once)."""
    for name, (build, config) in ARCHITECTURES.items():
        if not timm.is_model(name):
            register_model(_entry_point(name, build, config))


def _entry_point(name: str, build: Callable[..., nn.Module], config: Mapping[str, Any]) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **arguments: Any) -> nn.Module:
        if pretrained:
            raise ValueError(f"{name} has no published weights in timm")
        model = build(**{key: value for key, value in arguments.items() if key not in _TIMMS})
        vars(model)["pretrained_cfg"] = {**config, "architecture": name}  # timm reads it
        return model

    create.__name__ = name
    create.__module__ = __name__
    return create
