"""Training images, cropped and mirrored by draws that can be repeated; and training rows as a stream prepares them."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TimmWrapperImageProcessor

from hfcompress.crops import ResizedCrop, ResizedCrops
from hfcompress.decoding import decode
from hfcompress.passes import SKIPPED, Row
from hfcompress.pictures import Pictures, mode_of, pixels
from hfcompress.schema import Augmentation


class AugmentedImages(torch.utils.data.Dataset[dict[str, Any]]):
    """Training images, cropped and mirrored by draws that depend on (seed, epoch, row) alone.

    So a run resumed in the middle of an epoch sees what the uninterrupted one saw; `set_epoch` says which epoch it is.
    """

    def __init__(self, rows: Any, augmentation: Augmentation, seed: int) -> None:
        self.rows, self.augmentation, self.seed, self.epoch = rows, augmentation, seed, 0
        self._drawn: tuple[int, np.ndarray] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if isinstance(self.rows, ResizedCrops):
            self.rows.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows in one go, as torch's DataLoader asks for them."""
        together = isinstance(self.rows, (Pictures, ResizedCrops))
        found = self.rows.__getitems__(rows) if together else [self.rows[row] for row in rows]
        if not (self.augmentation.crop_padding or self.augmentation.flip):
            return found
        images = self._augment(torch.stack([item["pixel_values"] for item in found]), rows)
        return [{**item, "pixel_values": image} for item, image in zip(found, images.unbind())]

    def _augment(self, images: Tensor, rows: Sequence[int]) -> Tensor:
        top, left, mirrored = torch.from_numpy(self._draws()[:, list(rows)])
        return shifted(images, top, left, mirrored if self.augmentation.flip else None, self.augmentation.crop_padding)

    def _draws(self) -> np.ndarray:
        """The window's top and left and whether it is mirrored, of every row in this epoch: [3, rows]."""
        if self._drawn is None or self._drawn[0] != self.epoch:
            generator, count = np.random.default_rng((self.seed, self.epoch)), len(self.rows)
            self._drawn = self.epoch, draws(generator, self.augmentation, count)
        return self._drawn[1]


class StreamedImages:
    """A stream's rows {"image": bytes and path, "label": int}, augmented by draws that depend on their place in it."""

    def __init__(self, processor: TimmWrapperImageProcessor, augmentation: Augmentation) -> None:
        self.augmentation, self._mode = augmentation, mode_of(processor)
        self._cut, self._whole = ResizedCrop(processor), pixels(processor)

    def __call__(self, rows: Iterator[Row], place: tuple[int, int, int], skip: int) -> Iterator[Row | None]:
        yield from (SKIPPED for _ in islice(rows, skip))
        for number, row in enumerate(rows, skip):
            yield {"pixel_values": self._tensor(row, np.random.default_rng((*place, number))), "labels": row["label"]}

    def _tensor(self, row: Row, generator: np.random.Generator) -> Tensor:
        image = decode(row["image"], lambda record: "the streamed training split").convert(self._mode)
        tensor = self._cut(image, generator) if self.augmentation.resized_crop else self._whole(image)
        if not (self.augmentation.crop_padding or self.augmentation.flip):
            return tensor
        top, left, mirrored = torch.from_numpy(draws(generator, self.augmentation, 1))
        flip = mirrored if self.augmentation.flip else None
        return shifted(tensor[None], top, left, flip, self.augmentation.crop_padding)[0]


def draws(generator: np.random.Generator, augmentation: Augmentation, count: int) -> np.ndarray:
    """The window's top and left and whether it is mirrored, of so many images: [3, count]."""
    corners = generator.integers(0, 2 * augmentation.crop_padding + 1, (2, count))
    return np.concatenate([corners, generator.integers(0, 2, (1, count))])


def shifted(images: Tensor, top: Tensor, left: Tensor, mirrored: Tensor | None, padding: int) -> Tensor:
    """A window of each image after padding by so many pixels on each side, mirrored where it is to be."""
    count, channels, height, width = images.shape
    columns = torch.arange(width).expand(count, -1)
    if mirrored is not None:
        columns = torch.where(mirrored[:, None] == 1, columns.flip(-1), columns)
    images = torch.nn.functional.pad(images, (padding,) * 4)
    y, x = top[:, None] + torch.arange(height), left[:, None] + columns
    every, planes = torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None]
    return images[every, planes, y[:, None, :, None], x[:, None, None, :]]
