"""A split's images as the tensors that a network reads, decoded once where they fit into memory.

Decoding takes longer than a step of a small network; the decoded pixels of MNIST or CIFAR-10 are small.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TimmWrapperImageProcessor

from hfcompress.decoding import with_images

IN_MEMORY = 1 << 30
"""Bytes of decoded pixels (one each) up to which a split is kept decoded."""

_AT_ONCE = 1000


class Pictures(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows {"pixel_values": float32 [channels, size, size], "labels": int}, exactly as `processor` prepares them.

    `split` has columns image and label. Raises DataError: an image that is missing or broken, named by its row; at once
    where the split is kept decoded, when it is read where it is not.
    """

    def __init__(self, split: Dataset, processor: TimmWrapperImageProcessor, in_memory: int = IN_MEMORY) -> None:
        channels, height, width = processor.data_config["input_size"]
        self._mean, self._std = (
            torch.tensor(processor.data_config[name], dtype=torch.float32).view(-1, 1, 1) for name in ("mean", "std")
        )
        self._undecoded = with_images(split, pixels(processor))
        self._pixels: Tensor | None = None
        if len(split) * channels * height * width <= in_memory:
            self._pixels = torch.empty((len(split), channels, height, width), dtype=torch.uint8)
            self._labels = self._decode(with_images(split, _eight_bit(processor)))

    def _decode(self, rows: Dataset) -> list[int]:
        assert self._pixels is not None
        labels: list[int] = []
        for batch in rows.iter(_AT_ONCE):
            self._pixels[len(labels) : len(labels) + len(batch["labels"])] = torch.from_numpy(
                np.stack(batch["pixel_values"])
            )
            labels += batch["labels"]
        return labels

    def __len__(self) -> int:
        return len(self._undecoded)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows in one go, as torch's DataLoader asks for them."""
        if self._pixels is None:
            found = self._undecoded[list(rows)]
            return [
                {"pixel_values": image, "labels": label} for image, label in zip(found["pixel_values"], found["labels"])
            ]
        images = (
            self._pixels[torch.tensor(list(rows), dtype=torch.long)].float().div_(255).sub_(self._mean).div_(self._std)
        )
        return [{"pixel_values": image, "labels": self._labels[row]} for image, row in zip(images.unbind(), rows)]


def pixels(processor: TimmWrapperImageProcessor) -> Callable[[PIL.Image.Image], Tensor]:
    """PIL image → [channels, size, size], as `processor` prepares it, grey or in colour as its network expects."""
    mode = mode_of(processor)
    return lambda image: processor(image.convert(mode))["pixel_values"][0]


def _eight_bit(processor: TimmWrapperImageProcessor) -> Callable[[PIL.Image.Image], np.ndarray]:
    """PIL image → the bytes [channels, size, size] of which the processor makes its numbers."""
    mode, (_, height, width) = mode_of(processor), processor.data_config["input_size"]
    *before, normalise = processor.val_transforms.transforms
    assert type(normalise).__name__ == "Normalize"
    whole = processor.data_config["crop_pct"] == 1

    def read(image: PIL.Image.Image) -> np.ndarray:
        image = image.convert(mode)
        if whole and image.size == (width, height):
            array = np.asarray(image)
            return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        tensor: Any = image
        for transform in before:  # the last of them divides bytes by 255
            tensor = transform(tensor)
        return (tensor * 255).round().to(torch.uint8).numpy()

    return read


def mode_of(processor: TimmWrapperImageProcessor) -> str:
    """PIL's name for grey, where a network expects one channel, or for colour."""
    return "L" if processor.data_config["input_size"][0] == 1 else "RGB"
