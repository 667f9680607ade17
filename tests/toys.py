"""A small network with everything a rule may meet, and data to train it on."""

from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.compressor import Compressor
from hfcompress.reparameterization import Reparameterization
from hfcompress.schema import Rule


class Toy(nn.Module):
    """Tied embedding and output layer, a convolution, norms, a frozen weight and one that is not used."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.unused = nn.Linear(8, 8)
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, length] → [n, length, 20]."""
        x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.inner(self.frozen(self.norm(x))))


def loss_of(model: nn.Module, step: int) -> Tensor:
    """A loss on this step's batch: predict the next token."""
    tokens = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(step))
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def compress(model: nn.Module, method: Reparameterization, pattern: str = "*", **settings: Any) -> Compressor:
    """One method on every weight of that name."""
    return Compressor(model, [Rule(method=method, pattern=pattern)], **settings)
