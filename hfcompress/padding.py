"""The padding row of an embedding that is also the output projection."""

import torch
from torch import nn


def hold_padding_row(model: nn.Module) -> None:
    """Keep the padding row of a tied embedding where it is.

    Untied, `padding_idx` sees to that; tied, the output projection's gradient moves it off zero, which greedy readers
    such as CTranslate2 take for granted.
    """
    names: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    held: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and module.weight.requires_grad:
            key = id(module.weight)
            if names[key] > 1 and key not in held:
                held.add(key)
                row = torch.tensor([module.padding_idx])
                module.weight.register_hook(lambda g, row=row: g.index_fill(0, row.to(g.device), 0.0))
