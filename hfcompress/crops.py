"""Random parts of training images, resized to what a network reads: the usual augmentation for ImageNet.

Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TimmWrapperImageProcessor

from hfcompress.decoding import with_images
from hfcompress.pictures import mode_of

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_TRIES = 10


class ResizedCrop:
    """PIL image → float32 [channels, height, width]: a part of it, drawn, scaled and normalised as `processor` does."""

    def __init__(self, processor: TimmWrapperImageProcessor) -> None:
        _, self._height, self._width = processor.data_config["input_size"]
        self._mean, self._std = (
            torch.tensor(processor.data_config[name], dtype=torch.float32).view(-1, 1, 1) for name in ("mean", "std")
        )

    def __call__(self, image: PIL.Image.Image, generator: np.random.Generator) -> Tensor:
        left, top, width, height = part_of(image.size, generator)
        box = (left, top, left + width, top + height)
        cut = image.resize((self._width, self._height), PIL.Image.Resampling.BICUBIC, box=box)
        pixels = torch.from_numpy(np.asarray(cut, dtype=np.float32) / 255)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        return (pixels - self._mean) / self._std


class ResizedCrops(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows {"pixel_values": float32 [channels, height, width], "labels": int}: a part of 8 to 100 % of the image's
    area, its sides 3:4 to 4:3, scaled bicubically and normalised as `processor` does.

    What is cut out depends on (seed, epoch, row) alone; `epoch` is to be set. `split` has columns image and label.
    Raises DataError: an image that is missing or broken, named by its row, when it is read.
    """

    def __init__(self, split: Dataset, processor: TimmWrapperImageProcessor, seed: int) -> None:
        self.seed, self.epoch = seed, 0
        self._cut = ResizedCrop(processor)
        mode = mode_of(processor)
        self._images = with_images(split, lambda image: image.convert(mode))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows in one go, as torch's DataLoader asks for them."""
        found = self._images[list(rows)]
        return [
            {"pixel_values": self._cut(image, np.random.default_rng((self.seed, self.epoch, row))), "labels": label}
            for image, label, row in zip(found["pixel_values"], found["labels"], rows)
        ]


def part_of(size: tuple[int, int], generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height, in pixels, of a part of an image of `size` (width, height).

    Where ten draws do not fit into the image: the largest part in its middle whose sides are 3:4 to 4:3.
    """
    width, height = size
    for _ in range(_TRIES):
        area = generator.uniform(*AREA) * width * height
        ratio = math.exp(generator.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1)), w, h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h
