"""The small networks of the papers' tables, as timm models: LeNets for MNIST, Polino's plain networks for CIFAR-10.

Images are [n, in_chans, img_size, img_size]; each network ends in `num_classes` logits.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from hfcompress.cifar import SmallNetwork

_MNIST = {"input_size": (1, 28, 28), "num_classes": 10, "pool_size": None, "crop_pct": 1.0}
_CIFAR = {"input_size": (3, 32, 32), "num_classes": 10, "pool_size": None, "crop_pct": 1.0, "classifier": "out"}


class _Plain(SmallNetwork):
    """What the networks below share: Xavier's initial weights."""

    def _start(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class LeNet300(_Plain):
    """LeNet-300-100 (LeCun et al. 1998): dense layers of 300 and 100 units with ReLU. 266,610 parameters."""

    def __init__(self, num_classes: int = 10, in_chans: int = 1, img_size: int = 28) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 100
        self.fc1 = nn.Linear(in_chans * img_size**2, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes) if num_classes else nn.Identity()
        self._start()

    def forward_features(self, x: Tensor) -> Tensor:
        """[n, in_chans · img_size²]."""
        return x.flatten(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = F.relu(self.fc2(F.relu(self.fc1(x))))
        return x if pre_logits else self.fc3(x)


class LeNet5(_Plain):
    """LeNet-5 as Caffe ships it: 20 and 50 filters of 5×5 without padding, each pooled, then 500 units with ReLU.

    431,080 parameters. Caffe has no ReLU after the convolutions; `convolution_relu` puts one there.
    """

    def __init__(
        self, num_classes: int = 10, in_chans: int = 1, img_size: int = 28, convolution_relu: bool = False
    ) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.convolution_relu = num_classes, 500, convolution_relu
        self.conv1 = nn.Conv2d(in_chans, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        side = ((img_size - 4) // 2 - 4) // 2
        self.fc1 = nn.Linear(50 * side**2, 500)
        self.fc2 = nn.Linear(500, num_classes) if num_classes else nn.Identity()
        self._start()

    def forward_features(self, x: Tensor) -> Tensor:
        """[n, 50, (img_size − 12) / 4, (img_size − 12) / 4]."""
        for convolution in (self.conv1, self.conv2):
            x = F.max_pool2d(convolution(x), 2)
            x = F.relu(x) if self.convolution_relu else x
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = F.relu(self.fc1(x.flatten(1)))
        return x if pre_logits else self.fc2(x)


class PolinoNet(_Plain):
    """The plain networks of Polino, Pascanu and Alistarh 2018 for CIFAR-10 (appendix A.1; their published code).

    Each layer is convolution ("same" padding, bias) or dense → ReLU → batch norm → 2×2 max pooling where `pooled`
    lists its index → dropout of `dropout`'s probability for its index; dense layers go on counting after the
    convolutions. `logits_relu`: a ReLU on the logits, which the published code has.
    """

    def __init__(
        self,
        filters: Sequence[int],
        kernel: int,
        pooled: Sequence[int],
        dense: Sequence[int],
        dropouts: dict[int, float],
        dropout: bool = False,
        logits_relu: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int = 32,
    ) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.logits_relu = num_classes, dense[-1], logits_relu
        self.pooled = frozenset(pooled)
        self.dropouts = dict(dropouts) if dropout else {}
        widths = [in_chans, *filters]
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, kernel, padding=kernel // 2) for i, o in pairwise(widths))
        widths = [filters[-1] * (img_size // 2 ** len(self.pooled)) ** 2, *dense]
        self.dense = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.norms = nn.ModuleList([*map(nn.BatchNorm2d, filters), *map(nn.BatchNorm1d, dense)])
        self.out = nn.Linear(dense[-1], num_classes) if num_classes else nn.Identity()
        self._start()

    def forward_features(self, x: Tensor) -> Tensor:
        """[n, filters of the last convolution, side, side]."""
        for index, convolution in enumerate(self.convolutions):
            x = self._after(convolution(x), index)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.flatten(1)
        for index, layer in enumerate(self.dense, start=len(self.convolutions)):
            x = self._after(layer(x), index)
        if pre_logits:
            return x
        return F.relu(self.out(x)) if self.logits_relu else self.out(x)

    def _after(self, x: Tensor, index: int) -> Tensor:
        x = self.norms[index](F.relu(x))
        x = F.max_pool2d(x, 2) if index in self.pooled else x
        return F.dropout(x, self.dropouts[index], self.training) if index in self.dropouts else x


_ALONE = {1: 0.2, 3: 0.3, 4: 0.4}
"""A student's dropout when it is trained without a teacher; distilled it has none."""


def _student(filters: Sequence[int], dense: int) -> partial[PolinoNet]:
    return partial(PolinoNet, filters=filters, kernel=5, pooled=(1, 3), dense=(dense,), dropouts=_ALONE)


_TEACHER = partial(
    PolinoNet,
    filters=(76, 76, 126, 126, 148, 148, 148, 148),
    kernel=3,
    pooled=(1, 3, 7),
    dense=(1200, 1200),
    dropouts={1: 0.2, 3: 0.3, 7: 0.35, 8: 0.4, 9: 0.4},
    dropout=True,
)

ARCHITECTURES: dict[str, tuple[Callable[..., nn.Module], Mapping[str, Any]]] = {
    "lenet_300_100": (LeNet300, {**_MNIST, "classifier": "fc3"}),
    "lenet5_caffe": (LeNet5, {**_MNIST, "classifier": "fc2"}),
    "polino_teacher": (_TEACHER, _CIFAR),
    "polino_student1": (_student((75, 50, 50, 25), 500), _CIFAR),
    "polino_student2": (_student((50, 25, 25, 10), 400), _CIFAR),
    "polino_student3": (_student((25, 10, 10, 5), 300), _CIFAR),
}
"""Name → (what builds it, timm's configuration of it)."""
