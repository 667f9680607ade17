"""The embedded corpora are real, fixed and disjoint; dates of CLDR mean the same in German and English."""

import calendar
import datetime
import hashlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from babel.localedata import locale_identifiers
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from hfcompress.corpora import cldr, digits
from hfcompress.errors import DataError

SPLITS = ("train", "validation", "test")
MONTHS_DE = ["Januar", "Februar", "März", "April", "Mai", "Juni"]
MONTHS_DE += ["Juli", "August", "September", "Oktober", "November", "Dezember"]
MONTHS_EN = calendar.month_name[1:]
DAYS_EN = list(calendar.day_name)
NARROW_SPACE = "\u202f"


@pytest.fixture(scope="module")
def german():
    return cldr("de", "en")


def pairs(splits, split):
    return list(zip(splits[split]["source"], splits[split]["target"]))


def digest(splits):
    return hashlib.sha256(json.dumps([pairs(splits, split) for split in SPLITS]).encode()).hexdigest()


def python(code, **environment):
    """Runs `code` in a fresh Python; returns what it printed."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---------------------------------------------------------------------------------------------- digits


def test_digits_are_scikit_learns_each_once():
    splits = digits()
    assert {split: len(splits[split]) for split in SPLITS} == {"train": 1197, "validation": 200, "test": 400}
    found = sorted((row["label"], np.asarray(row["image"]).tobytes()) for split in SPLITS for row in splits[split])
    data = load_digits()
    pixels = (data.images * 255 / 16).round().astype("uint8")
    assert found == sorted((int(label), image.tobytes()) for label, image in zip(data.target, pixels))


def test_digits_are_grey_and_stratified():
    splits = digits()
    image = splits["test"][0]["image"]
    assert (image.mode, image.size) == ("L", (8, 8))
    assert splits["train"].features["label"].names == [str(digit) for digit in range(10)]
    assert np.bincount(splits["validation"]["label"]).tolist() == [20] * 10
    assert np.bincount(splits["test"]["label"]).tolist() == [40] * 10


def test_digits_have_the_same_splits_for_ever():
    label_bytes = bytes(label for split in SPLITS for label in digits()[split]["label"])
    assert hashlib.sha256(label_bytes).hexdigest()[:16] == "2830660f525287ed"


# ------------------------------------------------------------------------------------------------ CLDR


def laws(splits):
    """What holds for the corpus of any two locales."""
    sources = [source for split in SPLITS for source, _ in pairs(splits, split)]
    assert len(sources) == len(set(sources))
    for side in (0, 1):
        sentences = {split: {pair[side] for pair in pairs(splits, split)} for split in SPLITS}
        assert not sentences["train"] & sentences["test"]
        assert not sentences["train"] & sentences["validation"]
        assert not sentences["validation"] & sentences["test"]
    assert all(text == text.strip() != "" for split in SPLITS for pair in pairs(splits, split) for text in pair)


def test_cldr_has_thousands_of_pairs(german):
    counts = {split: len(german[split]) for split in SPLITS}
    assert 6000 <= sum(counts.values()) <= 12000 and counts["validation"] > 400 and counts["test"] > 400
    laws(german)


@settings(max_examples=4, deadline=None)
@given(st.lists(st.sampled_from(sorted(locale_identifiers())), min_size=2, max_size=2, unique=True))
def test_cldr_laws_hold_for_any_locales(codes):
    laws(cldr(*codes))


def test_cldr_spells_the_same_day(german):
    """German and English dates, read back without Babel, name the same day and its true weekday."""
    pattern = re.compile(r"(?P<weekday>\w+), (?P<day>\d+)\. (?P<month>\w+) (?P<year>\d{4})")
    read = [(pattern.fullmatch(s), t) for split in SPLITS for s, t in pairs(german, split)]
    read = [(match, text) for match, text in read if match and match["month"] in MONTHS_DE]
    assert len(read) > 600
    for match, text in read:
        month = MONTHS_DE.index(match["month"])
        day = datetime.date(int(match["year"]), month + 1, int(match["day"]))
        assert text == f"{DAYS_EN[day.weekday()]}, {MONTHS_EN[month]} {day.day}, {day.year}"


def test_cldr_spells_the_same_time(german):
    read = [(s, t) for split in SPLITS for s, t in pairs(german, split) if re.fullmatch(r"\d\d:\d\d", s)]
    assert len(read) > 300
    for source, target in read:
        hour, minute = map(int, source.split(":"))
        half = "AM" if hour < 12 else "PM"
        assert target == f"{hour % 12 or 12}:{minute:02d}{NARROW_SPACE}{half}"


def test_cldr_names_are_in_train_and_in_lists_of_test(german):
    """A model can know every word of a list in test: each name was in train by itself."""
    names = {source: target for source, target in pairs(german, "train")}
    assert names["Frankreich"] == "France" and names["Dänisch"] == "Danish"
    lists = [(s, t) for s, t in pairs(german, "test") if re.fullmatch(r"[^\d,]+, [^\d,]+ und [^\d,]+", s)]
    single = [(s, t) for s, t in lists if s.count(" und ") == 1 and t.count(", and ") == 1]
    assert len(single) > 20
    for source, target in single:
        german_names = re.split(", | und ", source)
        assert ", ".join(names[name] for name in german_names) == target.replace(", and ", ", ")


def test_cldr_does_not_depend_on_process_or_hash_seed(german):
    code = """
import hashlib, json
from hfcompress.corpora import cldr
splits = cldr("de", "en")
rows = [list(zip(splits[s]["source"], splits[s]["target"])) for s in ("train", "validation", "test")]
print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())
"""
    assert python(code, PYTHONHASHSEED="1") == digest(german)


def test_cldr_directions_share_their_splits(german):
    """What is test one way is not train the other way."""
    english = cldr("en", "de")
    assert not set(pairs(german, "test")) & {(s, t) for t, s in pairs(english, "train")}


def test_cldr_begins_with_all_kinds(german):
    first = [source for source, _ in pairs(german, "train")[:200]]
    assert any(source.startswith(("vor ", "in ")) for source in first)
    assert any(re.search(r"\d{4}$", source) for source in first)
    assert any(" und " in source for source in first)


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        (("german", "en"), "'german' is not one of the .* locales of Babel; nearest: de"),
        (("de", "en_UX"), "'en_UX'.*nearest: en_VU, en_US"),
        (("", "en"), "'' is not one of"),
        (("de", "../en"), "'../en' is not one of"),
        (("pt-BR", "pt_BR"), "are the same locale"),
    ],
)
def test_cldr_refuses(codes, told):
    with pytest.raises(DataError, match=told):
        cldr(*codes)


@pytest.mark.parametrize(("package", "call"), [("babel", "cldr('de', 'en')"), ("sklearn.datasets", "digits()")])
def test_a_missing_package_is_named_with_its_remedy(package, call):
    code = f"""
import sys
sys.modules[{package!r}] = None  # what the import system finds is: not there
from hfcompress import corpora
from hfcompress.errors import DataError
try:
    corpora.{call}
except DataError as error:
    print(error)
"""
    assert "pip install 'hfcompress[quickstart]'" in python(code)
