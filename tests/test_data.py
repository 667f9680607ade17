"""Splits from every kind of file, the embedded corpora, the Hub's layout; what is wrong in them is named."""

import gzip
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hfcompress.data import Splits, label_names, load_images, load_translation, overlap, stamps
from hfcompress.errors import DataError
from hfcompress.schema import ImageData, TranslationData
from hfcompress.sources import read_lines, splits_in

REAL = os.environ.get("HFCOMPRESS_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="HFCOMPRESS_DATA does not name the folder of datasets")
LINE_ENDS_OF_OTHERS = ["\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
ROWS = {
    "train": [(f"{i} Katzen{end}sehen", f"{i} cats{end}see") for i, end in enumerate(LINE_ENDS_OF_OTHERS)],
    "validation": [("Ein Hund", "A dog"), ("Zwei Hunde", "Two dogs")],
    "test": [("Ein Vogel, «Spatz»", 'A bird, "sparrow"'), ("0 Katzen\rsehen", "0 cats see")],
}


def translation(**settings):
    return TranslationData(**{"source": "de", "target": "en", "folder": ".", **settings})


def images(**settings):
    return ImageData(**{"folder": ".", "size": 8, **settings})


def records(rows):
    return [{"translation": {"de": de, "en": en, "fr": "?"}} for de, en in rows]


def json_lines(rows):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records(rows)).encode()


# -------------------------------------------------------------------------- every form a split may have


def write_parquet(folder, split, rows):
    Dataset.from_list(records(rows)).to_parquet(folder / f"{split}.parquet")


def write_shards(folder, split, rows):
    for i, part in enumerate((rows[:1], rows[1:])):
        Dataset.from_list(records(part)).to_parquet(folder / f"{split}-{i:05d}-of-00002.parquet")


def write_shards_in_data(folder, split, rows):
    (folder / "data").mkdir(exist_ok=True)
    write_shards(folder / "data", split, rows)


def write_json_lines(folder, split, rows):
    (folder / f"{split}.jsonl").write_bytes(json_lines(rows))


def write_json_lines_gz(folder, split, rows):
    (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(json_lines(rows)))


def write_json_lines_as_json(folder, split, rows):
    (folder / f"{split}.json").write_bytes(b"\xef\xbb\xbf" + json_lines(rows))


def write_json_array(folder, split, rows):
    (folder / f"{split}.json").write_text(json.dumps(records(rows), indent=1))


def write_text(folder, split, rows):
    for i, language in enumerate(("de", "en")):
        text = "".join(row[i] + "\n" for row in rows)
        (folder / f"{split}.{language}").write_bytes(text.encode())


def write_text_gz_without_last_line_end(folder, split, rows):
    for i, language in enumerate(("de", "en")):
        text = "\n".join(row[i] for row in rows)
        (folder / f"{split}.{language}.gz").write_bytes(gzip.compress(text.encode()))


WRITERS = [value for name, value in sorted(globals().items()) if name.startswith("write_")]


@pytest.mark.parametrize("write", WRITERS)
def test_every_form_gives_the_same_rows(write, tmp_path):
    for split, rows in ROWS.items():
        write(tmp_path, split, rows)
    splits = load_translation(translation(), tmp_path)
    for split, rows in ROWS.items():
        dataset = getattr(splits, split)
        assert dataset.column_names == ["source", "target"]
        assert list(zip(dataset["source"], dataset["target"])) == rows
    assert overlap(splits) == 1
    assert splits_in(tmp_path, ("de", "en")) == ["test", "train", "validation"]


def test_languages_may_be_columns(tmp_path):
    for split, rows in ROWS.items():
        flat = [{"de": de, "en": en, "id": 7} for de, en in rows]
        Dataset.from_list(flat).to_parquet(tmp_path / f"{split}.parquet")
    for column in (None, "translation"):
        splits = load_translation(translation(column=column), tmp_path)
        assert list(splits.test["target"]) == [en for _, en in ROWS["test"]]
    swapped = load_translation(translation(source="en", target="de"), tmp_path)
    assert list(swapped.test["target"]) == [de for de, _ in ROWS["test"]]


def test_a_folder_may_be_absolute_or_relative_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    for split, rows in ROWS.items():
        write_text(tmp_path / "corpus", split, rows)
    monkeypatch.chdir(tmp_path)
    for folder, root in (
        ("corpus", None),
        (str(tmp_path / "corpus"), None),
        (str(tmp_path / "corpus"), Path("/")),
    ):
        assert len(load_translation(translation(folder=folder), root).test) == 2


@pytest.mark.parametrize("name", ["a[b]*c", "Ä b", "x?y", "%20", "{x}"])
def test_a_folder_may_have_any_name(name, tmp_path):
    for write, split in zip((write_shards, write_parquet, write_text), ROWS):
        (tmp_path / name).mkdir(exist_ok=True)
        write(tmp_path / name, split, ROWS[split])
    splits = load_translation(translation(folder=name), tmp_path)
    assert list(splits.train["source"]) == [de for de, _ in ROWS["train"]]


def test_the_hubs_layout_is_read_by_datasets_itself(tmp_path):
    """`load_dataset` takes a folder where it takes a repository's name."""
    for split, rows in ROWS.items():
        write_parquet(tmp_path, split, rows)
    splits = load_translation(translation(folder=None, hub=str(tmp_path)))
    assert list(splits.train["source"]) == [de for de, _ in ROWS["train"]]
    with pytest.raises(DataError, match=r"Split 'dev' of .* cannot be loaded: .*validation"):
        load_translation(translation(folder=None, hub=str(tmp_path), validation="dev"))


lines = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n")), max_size=8)


@settings(max_examples=300, deadline=None)
@given(lines, st.booleans())
def test_lines_end_at_line_feeds_only(tmp_path_factory, texts, zipped):
    assume(not texts or not texts[0].startswith("\ufeff"))
    data = "".join(text + "\n" for text in texts).encode()
    path = tmp_path_factory.getbasetemp() / ("lines.de.gz" if zipped else "lines.de")
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert read_lines(path) == texts


# ------------------------------------------------------------------------------------- limits, held-out rows


def test_stamps_notice_a_changed_file(tmp_path):
    for split, rows in ROWS.items():
        write_text(tmp_path, split, rows)
    before = stamps(translation(), tmp_path)
    assert before == stamps(translation(), tmp_path) and len(before) >= len(ROWS)
    write_text(tmp_path, "test", ROWS["test"][:1])
    assert stamps(translation(), tmp_path) != before
    assert stamps(translation(folder=None, embedded="cldr"), None) == []


def test_row_limits_take_rows_from_the_whole_split(tmp_path):
    for split, rows in ROWS.items():
        write_text(tmp_path, split, rows)
    splits = load_translation(translation(train_rows=3, test_rows=1), tmp_path)
    count = len(ROWS["train"])
    assert list(splits.train["source"]) == [ROWS["train"][i][0] for i in (0, count // 3, 2 * count // 3)]
    assert (len(splits.validation), len(splits.test)) == (2, 1)
    assert len(load_translation(translation(train_rows=1000), tmp_path).train) == len(ROWS["train"])


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 300), st.sampled_from([0.01, 0.1, 0.34, 0.5]), st.integers(1, 40))
def test_held_out_rows_partition_train_and_share_no_source(tmp_path_factory, count, fraction, repeats):
    folder = tmp_path_factory.getbasetemp()
    rows = [(f"Satz {i // repeats}", f"sentence {i}") for i in range(count)]
    random.Random(1).shuffle(rows)
    write_text(folder, "all", rows)
    data = translation(train="all", test="all", validation=None, validation_fraction=fraction)
    held = max(1, round(count * fraction))
    try:
        splits = load_translation(data, folder)
    except DataError as error:
        assert "both must be more than none" in str(error)
        assert round(count * fraction) == 0 or count <= repeats * held
        return
    assert sorted([*splits.train["target"], *splits.validation["target"]]) == sorted(en for _, en in rows)
    assert not set(splits.train["source"]) & set(splits.validation["source"])
    assert held <= len(splits.validation) <= held * repeats
    assert list(load_translation(data, folder).validation["target"]) == list(splits.validation["target"])


# ---------------------------------------------------------------------------------- what is wrong with text


def good(folder, *splits):
    for split in splits:
        write_text(folder, split, ROWS[split])


def refused(data, folder, told):
    load = load_images if isinstance(data, ImageData) else load_translation
    with pytest.raises(DataError, match=told):
        load(data, folder)


def test_missing_places(tmp_path):
    (tmp_path / "multi30k").mkdir()
    refused(translation(folder="multi30"), tmp_path, r"No folder .*multi30 \(in .*: multi30k\).*--data-root")
    refused(translation(folder="multi30k"), tmp_path, r"No split 'train' .*Splits found there: none")
    good(tmp_path, "train", "test")
    refused(translation(), tmp_path, r"No split 'validation' .*validation.de and .*found there: test, train\.")


def test_without_network_the_remedy_is_data_root():
    code = """
from hfcompress.data import load_translation
from hfcompress.errors import DataError
from hfcompress.schema import TranslationData
for folder in (None, "multi30k"):
    try:
        load_translation(TranslationData(source="de", target="en", hub="a/b", folder=folder))
    except DataError as error:
        print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    bare, with_folder = done.stdout.splitlines()
    for told in (bare, with_folder):
        assert "Dataset 'a/b' cannot be reached on the Hub" in told and "--data-root" in told
    assert "a copy (named by 'folder' in the recipe)" in bare and "its copy 'multi30k'" in with_folder


def test_missing_columns(tmp_path):
    for split, rows in ROWS.items():
        write_json_lines(tmp_path, split, rows)
    refused(
        translation(target="es"),
        tmp_path,
        r"No 'es' in column 'translation' of split 'train'. Found: de, en, fr",
    )
    refused(translation(column="translations"), tmp_path, r"No 'translations' .*Did you mean 'translation'\?")
    refused(translation(column=None), tmp_path, r"No 'de' in the columns of split 'train'. Found: translation")


def test_columns_of_something_else(tmp_path):
    good(tmp_path, "validation", "test")
    (tmp_path / "train.jsonl").write_text('{"translation": {"de": 1, "en": "one"}}\n')
    refused(translation(), tmp_path, r"'de' in .*should be sentences \(strings\), found int64")
    (tmp_path / "train.jsonl").write_text('{"translation": "eins"}\n')
    refused(translation(), tmp_path, r"No 'de' in column 'translation'")
    (tmp_path / "train.jsonl").write_text('{"translation": {"de": 1, "en": "one"}}\n{"translation": 3}')
    refused(translation(), tmp_path, r"train\.jsonl: its rows do not make columns")


@pytest.mark.parametrize("blank", ["", "  ", "\u2028", None])
def test_gaps_are_left_out_of_train_and_refused_elsewhere(blank, tmp_path, caplog):
    for split, rows in ROWS.items():
        write_json_lines(tmp_path, split, rows)
    write_json_lines(tmp_path, "train", [*ROWS["train"][:2], ("Haus", blank), *ROWS["train"][2:]])
    with caplog.at_level(logging.WARNING):
        splits = load_translation(translation(), tmp_path)
    assert list(zip(splits.train["source"], splits.train["target"])) == ROWS["train"]
    assert f"left out 1 of {len(ROWS['train']) + 1} pairs with an empty side (first: row 2)" in caplog.text
    write_json_lines(tmp_path, "test", [("a", "b"), (blank, "c"), ("d", blank)])
    refused(translation(), tmp_path, r"Split 'test' has 2 of 3 pairs with an empty side \(first: row 1\)")
    write_json_lines(tmp_path, "train", [(blank, "a")])
    refused(translation(), tmp_path, r"Split 'train' has 1 of 1 pairs .*nothing to train on")


@pytest.mark.parametrize("write", WRITERS)
def test_empty_splits(write, tmp_path):
    good(tmp_path, "validation", "test")
    if write in (write_parquet, write_shards, write_shards_in_data):
        Dataset.from_dict({"de": [], "en": []}).to_parquet(tmp_path / "train.parquet")
    else:
        write(tmp_path, "train", [])
    refused(translation(), tmp_path, r"Split 'train' has no rows")


def test_different_line_counts(tmp_path):
    good(tmp_path, "train", "validation", "test")
    (tmp_path / "train.de").write_text("eins\nzwei\ndrei\n")
    refused(translation(), tmp_path, r"train\.de has 3 lines, .*train\.en has 9 lines")
    (tmp_path / "train.de").unlink()
    refused(translation(), tmp_path, r"has train\.en but not train\.de")


def test_a_split_given_twice(tmp_path):
    good(tmp_path, "train", "validation", "test")
    write_json_lines(tmp_path, "test", ROWS["test"])
    refused(translation(), tmp_path, r"Split 'test' is in .* more than once, as test\.jsonl and test\.de")


def test_incomplete_shards(tmp_path):
    write_shards(tmp_path, "train", ROWS["train"])
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    refused(translation(), tmp_path, r"'train' should have 2 parquet shards; found 1: train-00001-of-00002")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "train.jsonl",
            b'{"translation": {"de": "a", "en": "b"}}\n{"translation"\n',
            r"train\.jsonl:2: not JSON",
        ),
        ("train.jsonl", b'{"de": "a"}\n7\n', r"train\.jsonl:2: expected a JSON object .*found int"),
        ("train.json", b'[{"de": "a"}, "b"]', r"train\.json: element 1: expected a JSON object .*found str"),
        ("train.json", b'[{"de": "a"}', r"train\.json: not JSON"),
        ("train.json", b"[" * 200_000, r"train\.json: not JSON"),
        ("train.jsonl", b'{"de": "\\ud800", "en": "x"}', r"train\.jsonl: its rows do not make columns"),
        ("train.jsonl", b'{"de": "a"}\n{"de": "\xff"}', r"train\.jsonl:2: not UTF-8 .*at byte 8 of the line"),
        ("train.jsonl.gz", gzip.compress(b'{"de": "a"}' * 50)[:-9], r"train\.jsonl\.gz cannot be read"),
        ("train.jsonl.gz", b'{"de": "a"}', r"train\.jsonl\.gz cannot be read"),
        ("train.parquet", b"PAR1 not really", r"train\.parquet cannot be read as parquet"),
        ("train.parquet", b"", r"train\.parquet cannot be read as parquet"),
    ],
)
def test_broken_files_are_named(name, content, told, tmp_path):
    good(tmp_path, "validation", "test")
    (tmp_path / name).write_bytes(content)
    refused(translation(), tmp_path, told)


def test_an_embedded_corpus_of_the_other_task():
    refused(translation(folder=None, embedded="digits"), None, "'digits' is for a recipe's section 'images' only")
    refused(images(folder=None, embedded="cldr"), None, "'cldr' is for a recipe's section 'translation' only")
    refused(translation(folder=None, embedded="cldr", test="tests"), None, "Did you mean 'test'")


# ------------------------------------------------------------------------------------------ embedded and real


def test_embedded_corpora():
    pairs = load_translation(translation(folder=None, embedded="cldr", train_rows=100))
    assert (len(pairs.train), overlap(pairs)) == (100, 0)
    digits = load_images(images(folder=None, embedded="digits"))
    assert isinstance(digits, Splits) and len(digits.train) == 1197 and len(label_names(digits)) == 10


@needs_real
def test_multi30k():
    data = translation(folder="multi30k", validation="val", test="test_2016_flickr")
    splits = load_translation(data, Path(REAL))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (29000, 1014, 1000)
    assert splits.train[0]["target"] == "Two young, White males are outside near many bushes."
    assert overlap(splits) == 0


@needs_real
def test_opennmt_demo_has_one_gap_in_train(caplog):
    splits = load_translation(translation(folder="opennmt_demo_en_de", validation="val"), Path(REAL))
    assert len(splits.train) == 9999 and "left out 1 of 10000 pairs" in caplog.text
