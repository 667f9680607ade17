"""The ResNets for 32×32 images of He et al. 2016, "Deep Residual Learning", section 4.2, as timm models.

A 3×3 convolution, three stages of n blocks with 16, 32 and 64 filters, global average pooling, one linear layer:
6n + 2 layers. Shortcuts have no parameters (option A): every second pixel, missing filters filled with zeros.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONFIG = {
    "input_size": (3, 32, 32),
    "num_classes": 10,
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "classifier": "linear",
}


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride],
                (0, 0, 0, 0, self.added // 2, self.added - self.added // 2),
            )
        return F.relu(x + y)


class SmallNetwork(nn.Module):
    """timm's split into features and head."""

    num_classes: int
    num_features: int

    def forward_features(self, x: Tensor) -> Tensor:
        """Images → what the head reads."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise ValueError("these networks are too small for gradient checkpointing")


class CifarResNet(SmallNetwork):
    """`blocks` residual blocks a stage, `width` times the filters. [n, in_chans, h, w] → [n, num_classes]."""

    def __init__(self, blocks: int = 3, width: int = 1, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 64 * width
        self.conv1 = nn.Conv2d(in_chans, 16 * width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16 * width)
        self.layer1 = self._stage(16 * width, 16 * width, blocks, 1)
        self.layer2 = self._stage(16 * width, 32 * width, blocks, 2)
        self.layer3 = self._stage(32 * width, 64 * width, blocks, 2)
        self.linear = nn.Linear(64 * width, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = _Block(inputs, outputs, stride)
        return nn.Sequential(first, *(_Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward_features(self, x: Tensor) -> Tensor:
        """[n, 64 · width, h / 4, w / 4]."""
        return self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x.mean(dim=(2, 3))
        return pooled if pre_logits else self.linear(pooled)


ARCHITECTURES: dict[str, tuple[Callable[..., nn.Module], Mapping[str, Any]]] = {
    f"cifar_resnet{depth}": (partial(CifarResNet, blocks=(depth - 2) // 6), _CONFIG) for depth in (20, 32, 44, 56, 110)
}
"""Name → (what builds it, timm's configuration of it)."""
