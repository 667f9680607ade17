"""More points for tensors whose gradients are larger: Polino, Pascanu, Alistarh 2018, section 4, for `Levels`.

gradient_norms(model, batches, loss) ──norms──▶ redistribute_points(model, rules, norms) ──▶ a rule for each tensor
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from glob import escape
from typing import TypeVar

import torch
from torch import Tensor, nn

from hfcompress.compressor import Compressor
from hfcompress.errors import ConfigError
from hfcompress.methods.levels import Levels, redistribute
from hfcompress.schema import Rule

Batch = TypeVar("Batch")


def gradient_norms(
    model: nn.Module, batches: Iterable[Batch], loss: Callable[[nn.Module, Batch], Tensor]
) -> dict[str, float]:
    """The 2-norm of every parameter's gradient, averaged over `batches` before the norm is taken (the paper: five).

    `loss`: a scalar of the model on one batch. The model is in eval mode meanwhile; its modes, gradients and batch-norm
    statistics are afterwards what they were. A parameter that the loss does not use has norm 0.

    Raises ConfigError: no batch.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in trained.values()]
    modes = {module: module.training for module in model.modules()}
    count = 0
    model.eval()
    try:
        for batch in batches:
            found = torch.autograd.grad(loss(model, batch), list(trained.values()), allow_unused=True)
            for total, gradient in zip(sums, found):
                if gradient is not None:
                    total += gradient
            count += 1
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise ConfigError("the norms of gradients were asked for on no batch at all: give at least one")
    return {name: total.norm().item() / count for name, total in zip(trained, sums)}


def redistribute_points(model: nn.Module, rules: Sequence[Rule], norms: Mapping[str, float]) -> tuple[Rule, ...]:
    """`rules` with those of `Levels` replaced by one for each tensor they claim, the points shared out by `norms`.

    All tensors of all these rules share one sum of points. A tied weight keeps its rule, and that rule's points: no
    pattern matches all names of a tie and no other. The model is not changed.

    Raises ConfigError: the rules do not fit the model, a claimed tensor has no norm.
    """
    own = [replace(rule, method=copy.copy(rule.method)) for rule in rules]  # told apart even where they are equal
    entries = Compressor(copy.deepcopy(model), own).entries
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {name for aliases in names.values() if len(aliases) > 1 for name in aliases}
    claimed = [[name for name, entry in entries.items() if entry.method is rule.method] for rule in own]
    points = {
        name: rule.method.points
        for rule, mine in zip(own, claimed)
        for name in mine
        if isinstance(rule.method, Levels) and name not in tied
    }
    shares = redistribute(norms, points)
    result: list[Rule] = []
    for rule, mine in zip(rules, claimed):
        if isinstance(rule.method, Levels):
            for name in mine:
                if name in shares:
                    method = replace(rule.method, points=shares[name])
                    result.append(replace(rule, method=method, pattern=escape(name)))
        if not isinstance(rule.method, Levels) or tied.intersection(mine):
            result.append(rule)
    return tuple(result)
