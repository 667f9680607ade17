"""Random parts of training images: where they are cut, what becomes of them, and that a resumed run sees the same."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from hypothesis import given
from hypothesis import strategies as st
from transformers import TimmWrapperImageProcessor

from hfcompress.crops import AREA, RATIO, ResizedCrops, part_of
from hfcompress.errors import DataError
from hfcompress.schema import Augmentation
from hfcompress.tasks import AugmentedImages


def split(sizes: list[tuple[int, int]]) -> Dataset:
    """Images that are redder to the right and greener to the bottom."""
    images = []
    for width, height in sizes:
        x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        images.append(PIL.Image.fromarray(np.stack([x, y, np.full_like(x, 99)], -1).astype(np.uint8)))
    features = Features({"image": Image(), "label": ClassLabel(num_classes=9)})
    return Dataset.from_dict({"image": images, "label": list(range(len(sizes)))}, features=features)


def processor() -> TimmWrapperImageProcessor:
    config = {"input_size": (3, 16, 24), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_pct": 1.0}
    return TimmWrapperImageProcessor(config, "resnet18")


@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 99))
def test_a_part_is_in_the_image_and_of_the_right_shape(width: int, height: int, seed: int) -> None:
    left, top, w, h = part_of((width, height), np.random.default_rng(seed))
    assert left >= 0 and top >= 0 and 0 < w <= width - left and 0 < h <= height - top
    if min(width, height) > 60 and width / height < 4 and height / width < 4:
        slack = 1.05  # sides are whole pixels
        assert RATIO[0] / slack < w / h < RATIO[1] * slack
        assert w * h / (width * height) > AREA[0] / slack


def test_parts_are_of_all_sizes() -> None:
    shares = [w * h / 90_000 for *_, w, h in (part_of((300, 300), np.random.default_rng(i)) for i in range(400))]
    assert min(shares) < 0.15 and max(shares) > 0.85 and 0.4 < np.mean(shares) < 0.6


def test_pixels_are_scaled_and_normalised() -> None:
    rows = ResizedCrops(split([(40, 30), (30, 50)]), processor(), seed=3)
    item = rows[1]
    assert item["labels"] == 1 and item["pixel_values"].shape == (3, 16, 24)
    assert item["pixel_values"].dtype == torch.float32
    red, green, blue = item["pixel_values"]
    assert torch.allclose(blue, torch.tensor((99 / 255 - 0.3) / 0.4))
    assert (red.diff(dim=1) >= 0).all() and (green.diff(dim=0) >= 0).all()
    left, top, w, h = part_of((30, 50), np.random.default_rng((3, 0, 1)))
    found = red.mean() * 0.2 + 0.5, green.mean() * 0.3 + 0.4
    assert found[0] == pytest.approx((left + w / 2 - 0.5) / 29, abs=0.02)
    assert found[1] == pytest.approx((top + h / 2 - 0.5) / 49, abs=0.02)


def test_epochs_differ_and_one_epoch_is_always_the_same() -> None:
    made = [AugmentedImages(ResizedCrops(split([(40, 30)]), processor(), 0), Augmentation(flip=True), 0) for _ in "ab"]
    first = made[0][0]["pixel_values"]
    for dataset in made:
        dataset.set_epoch(5)
    assert not torch.equal(first, made[0][0]["pixel_values"])
    assert torch.equal(made[0][0]["pixel_values"], made[1][0]["pixel_values"])


def test_a_broken_image_is_named() -> None:
    held = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(held, "png")
    rows = [{"bytes": held.getvalue(), "path": None}, {"bytes": held.getvalue()[:40], "path": None}]
    dataset = Dataset.from_dict({"image": rows, "label": [0, 1]}).cast_column("image", Image())
    with pytest.raises(DataError, match="The image in row 1 cannot be read"):
        ResizedCrops(dataset, processor(), 0)[1]
