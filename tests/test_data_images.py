"""Labelled images: classes, bytes and pixels as they may be found in a dataset."""

import io
import os
import random
import warnings
from pathlib import Path

import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.data import label_names, load_images
from hfcompress.decoding import with_images
from hfcompress.errors import DataError
from hfcompress.schema import ImageData

REAL = os.environ.get("HFCOMPRESS_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="HFCOMPRESS_DATA does not name the folder of datasets")
SPLITS = ("train", "validation", "test")


def images(**settings):
    return ImageData(**{"folder": ".", "size": 8, **settings})


def refused(data, folder, told):
    with pytest.raises(DataError, match=told):
        load_images(data, folder)


def encoded(image, form="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def picture(shade, mode="L"):
    return PIL.Image.new(mode, (8, 8), shade)


PIXELS = [encoded(picture(shade)) for shade in range(6)]


def write_images(folder, split, labels, feature=None, pixels=PIXELS):
    """Parquet as the Hub has it; a ClassLabel is put on without checks, as a wrong file would have it."""
    label = Dataset.from_dict({"label": labels}).features["label"]
    features = Features({"image": ImageFeature(), "label": label})
    stored = Dataset.from_dict({"image": list(pixels), "label": labels}, features=features)
    features = Features({"image": ImageFeature(), "label": feature or label})
    table = stored.data.table.replace_schema_metadata(features.arrow_schema.metadata)
    Dataset(table).to_parquet(folder / f"{split}.parquet")


def write_all_images(folder, labels, feature=None):
    for split in SPLITS:
        write_images(folder, split, labels, feature)


@pytest.mark.parametrize(
    ("labels", "feature", "names"),
    [
        ([0, 1, 2, 0, 1, 2], ClassLabel(names=["cat", "dog", "eel"]), ["cat", "dog", "eel"]),
        ([0, 1, 2, 0, 1, 2], None, ["0", "1", "2"]),
        (["eel", "cat", "dog", "cat", "dog", "eel"], None, ["cat", "dog", "eel"]),
    ],
)
def test_labels_of_all_kinds_become_class_labels(labels, feature, names, tmp_path):
    write_all_images(tmp_path, labels, feature)
    splits = load_images(images(), tmp_path)
    assert label_names(splits) == names
    for split in (splits.train, splits.validation, splits.test):
        told = [names[label] for label in split["label"]]
        assert told == [label if isinstance(label, str) else names[label] for label in labels]
        assert split[3]["image"].getpixel((0, 0)) == 3


def test_train_rows_do_not_change_the_classes(tmp_path):
    write_all_images(tmp_path, [0, 1, 2, 3, 4, 5])
    splits = load_images(images(train_rows=2, test_rows=5), tmp_path)
    assert (len(splits.train), len(splits.test), len(label_names(splits))) == (2, 5, 6)


@pytest.mark.parametrize(
    ("labels", "feature", "told"),
    [
        (
            [0, 1, 2, 0, 1, 3],
            ClassLabel(num_classes=3),
            r"1 labels .*none of train's 3 classes \(first: row 5, 3\)",
        ),
        ([0, -1, 2, 0, -1, 2], ClassLabel(num_classes=3), r"2 labels .*\(first: row 1, -1\)"),
        ([0, 1, 2, None, 1, 2], ClassLabel(num_classes=3), r"1 labels .*\(first: row 3, None\)"),
        (
            [0, 1, 2, 0, 1, 2],
            ClassLabel(names=["cat", "dog", "eel"]),
            r"other classes than train: 'cat' for '0'",
        ),
        ([0, 1, 2, 0, 1, 2], ClassLabel(num_classes=4), r"other classes than train: '3' for None"),
        ([0.0, 1.0, 2.0, 0.0, 1.0, 2.0], None, r"integers or names, found double"),
        ([True, False] * 3, None, r"integers or names, found bool"),
        (["0", "1", "2", "0", "1", "two"], None, r"1 labels .*\(first: row 5, 'two'\)"),
        ([3, 0, 0, 0, 0, 0], None, r"1 labels .*\(first: row 0, 3\)"),
    ],
)
def test_wrong_labels_are_refused_with_their_row(labels, feature, told, tmp_path):
    write_all_images(tmp_path, [0, 1, 2, 0, 1, 2], ClassLabel(num_classes=3))
    write_images(tmp_path, "test", labels, feature)
    refused(images(), tmp_path, "Split 'test' .*" + told if "row" in told else told)


@pytest.mark.parametrize("labels", [[0.5] * 6, [True] * 6, [None] * 6, [-1, 0, 0, 0, 0, 0]])
def test_wrong_labels_of_train(labels, tmp_path):
    write_all_images(tmp_path, labels)
    refused(images(), tmp_path, "split 'train' should be integers or names|Split 'train' has 1 labels")


def test_wrong_columns_of_images(tmp_path):
    write_all_images(tmp_path, [0, 1, 2, 0, 1, 2])
    refused(images(image="img"), tmp_path, r"No 'img' in the columns of split 'train'. Found: image, label")
    refused(images(label="labels"), tmp_path, r"No 'labels' .*Did you mean 'label'")
    refused(images(image="label"), tmp_path, r"'label' of split 'train' should hold images")
    refused(images(label="image"), tmp_path, r"integers or names, found struct")


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        (Value("binary"), PIXELS),
        (Value("large_binary"), PIXELS),
        (
            {"bytes": Value("binary"), "path": Value("string")},
            [{"bytes": b, "path": "a.png"} for b in PIXELS],
        ),
        ({"bytes": Value("binary"), "path": Value("null")}, [{"bytes": b, "path": None} for b in PIXELS]),
    ],
)
def test_images_may_be_stored_without_the_name_of_their_type(kind, stored, tmp_path):
    features = Features({"jpeg": kind, "label": Value("uint8")})
    for split in SPLITS:
        rows = Dataset.from_dict({"jpeg": stored, "label": [0, 1] * 3}, features=features)
        rows.to_parquet(tmp_path / f"{split}.parquet")
    splits = load_images(images(image="jpeg"), tmp_path)
    assert [row["image"].getpixel((0, 0)) for row in splits.test] == list(range(6))


def test_images_are_decoded_when_read_in_whatever_mode(tmp_path):
    modes = [("CMYK", "JPEG"), ("P", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("I;16", "PNG"), ("RGBA", "WEBP")]
    pixels = [encoded(PIL.Image.new(mode, (8, 8)), form) for mode, form in modes]
    write_all_images(tmp_path, [0, 1] * 3)
    write_images(tmp_path, "test", [0, 1] * 3, None, pixels)
    splits = load_images(images(), tmp_path)
    seen = with_images(splits.test, lambda image: image.convert("RGB").size)[:]
    assert seen == {"pixel_values": [(8, 8)] * 6, "labels": [0, 1] * 3}
    assert [row["image"].mode for row in splits.test] == [mode for mode, _ in modes]


noise = PIL.Image.frombytes("RGB", (32, 32), random.Random(0).randbytes(32 * 32 * 3))


@pytest.mark.parametrize(
    "broken",
    [
        encoded(noise, "JPEG")[:-200],
        encoded(noise)[:-200],
        encoded(noise, "WEBP")[:-200],
        encoded(noise, "GIF")[:-200],
        encoded(noise)[:20] + b"\xff" * 4 + encoded(noise)[24:],
        b"GIF89a",
        b"no image",
        b"",
    ],
)
def test_a_broken_image_is_refused_with_its_row_when_read(broken, tmp_path):
    write_all_images(tmp_path, [0, 1] * 3)
    write_images(tmp_path, "test", [0, 1] * 3, None, [*PIXELS[:4], broken, PIXELS[5]])
    test = with_images(load_images(images(), tmp_path).test, lambda image: image.size)
    assert test[3]["labels"] == 1
    for read in (lambda: test[4], lambda: test[:], lambda: list(test), lambda: test.select([1, 4])[:]):
        with pytest.raises(DataError, match=r"The image in row 4 cannot be read"):
            read()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]), st.data())
def test_damaged_bytes_are_decoded_or_refused(form, data):
    content = bytearray(encoded(noise, form))
    for place in data.draw(st.lists(st.integers(0, 300), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    rows = Dataset.from_dict({"image": [{"bytes": content, "path": None}], "label": [0]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of metadata
        try:
            assert len(with_images(rows.cast_column("image", ImageFeature()), lambda image: image.size)[0]) == 2
        except DataError as error:
            assert "The image in row 0 cannot be read" in str(error)


def test_a_missing_image_is_refused_with_its_row(tmp_path):
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    rows = [{"image": None if i == 2 else {"bytes": PIXELS[i], "path": None}, "label": 0} for i in range(4)]
    for split in SPLITS:
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    test = with_images(load_images(images(), tmp_path).test, lambda image: image.size)
    with pytest.raises(DataError, match=r"The image in row 2 cannot be read: there is none"):
        list(test)


@needs_real
def test_cifar10_is_lazy():
    splits = load_images(images(folder="cifar10", image="img", validation=None, validation_fraction=0.1), Path(REAL))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (45000, 5000, 10000)
    assert label_names(splits)[0] == "airplane"
    decoded = []
    for image in with_images(splits.test, lambda image: decoded.append(1) or image.size)[-1:]["pixel_values"]:
        assert image == (32, 32)
    assert len(decoded) == 1  # one image, not ten thousand
