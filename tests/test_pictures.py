"""Images as tensors: decoded once or each time, they are what the model's own processor makes of them."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from torch.utils.data import DataLoader
from transformers import TimmWrapperImageProcessor

from hfcompress.errors import DataError
from hfcompress.pictures import Pictures

IN = {"crop_pct": 1.0, "interpolation": "bicubic"}


def processor(size, channels=3, **changes):
    mean, std = [0.1, 0.5, 0.3][:channels], [0.7, 0.2, 0.4][:channels]
    config = {"input_size": [channels, size, size], "mean": mean, "std": std, **IN, **changes}
    return TimmWrapperImageProcessor(config, "test_resnet")


def rows(side, count=7, mode="RGB"):
    draw = np.random.default_rng(0)
    shape = (side, side) if mode == "L" else (side, side, 3)
    images = [PIL.Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]
    features = Features({"image": Image(), "label": ClassLabel(num_classes=3)})
    return Dataset.from_dict({"image": images, "label": [i % 3 for i in range(count)]}, features=features)


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
@pytest.mark.parametrize(
    ("side", "mode", "made"),
    [
        (8, "RGB", processor(8)),
        (8, "L", processor(8, channels=1)),
        (8, "RGB", processor(8, channels=1)),  # grey
        (8, "L", processor(8)),
        (13, "RGB", processor(8)),  # scaled
        (8, "RGB", processor(8, crop_pct=0.75)),  # scaled and cropped
        (5, "L", processor(8, channels=1, interpolation="bilinear")),
    ],
)
def test_rows_are_what_the_processor_makes_of_them(side, mode, made, in_memory):
    split = rows(side, mode=mode)
    found = Pictures(split, made, in_memory)
    assert len(found) == 7
    for i, row in enumerate(split):
        colours = "L" if made.data_config["input_size"][0] == 1 else "RGB"
        wanted = made(row["image"].convert(colours))["pixel_values"][0]
        assert found[i]["labels"] == row["label"] and torch.equal(found[i]["pixel_values"], wanted)


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_a_loader_asks_for_a_batch_at_once(in_memory):
    found = Pictures(rows(8), processor(8), in_memory)
    several = found.__getitems__([6, 0, 3])
    assert [row["labels"] for row in several] == [0, 0, 0]
    for row, i in zip(several, (6, 0, 3)):
        assert torch.equal(row["pixel_values"], found[i]["pixel_values"])
    assert found.__getitems__([]) == []
    batches = list(DataLoader(found, batch_size=4))
    assert [len(batch["labels"]) for batch in batches] == [4, 3]
    assert torch.equal(batches[1]["pixel_values"][2], found[6]["pixel_values"])


def test_a_split_is_kept_decoded_up_to_so_many_bytes():
    split, made = rows(8), processor(8)
    kept, read = (Pictures(split, made, 7 * 3 * 8 * 8 - one) for one in (0, 1))
    assert kept._pixels is not None and kept._pixels.dtype == torch.uint8 and read._pixels is None


def test_a_row_cannot_be_changed_by_who_reads_it():
    found = Pictures(rows(8), processor(8))
    before = found[0]["pixel_values"].clone()
    found[0]["pixel_values"].zero_()
    assert torch.equal(found[0]["pixel_values"], before)


def test_a_broken_image_is_named_by_its_row():
    content = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(content, "PNG")
    stored = [{"bytes": content.getvalue(), "path": None}] * 3 + [{"bytes": b"no image", "path": None}]
    split = Dataset.from_dict({"image": stored, "label": [0] * 4}).cast_column("image", Image())
    with pytest.raises(DataError, match="The image in row 3 cannot be read"):
        Pictures(split, processor(8))
    found = Pictures(split, processor(8), in_memory=0)
    assert found[2]["labels"] == 0
    with pytest.raises(DataError, match="The image in row 3 cannot be read"):
        found[3]
