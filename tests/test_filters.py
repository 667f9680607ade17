"""What each filter takes, what it leaves, and that the counts add up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfcompress.filters import counts, judge, script
from hfcompress.schema import Filters

NONE = Filters(worst=0.0)
PAIR = ("Ein Hund läuft.", "A dog is running.")


def verdict(source, target, reference=None, score=-0.1, filters=NONE):
    """Among twenty ordinary pairs."""
    rows = [(*PAIR, PAIR[1], -0.1)] * 20 + [(source, target, reference, score)]
    return judge(*(list(column) for column in zip(*rows)), filters)[-1]


@pytest.mark.parametrize(
    ("source", "target", "reference", "score", "found"),
    [
        (*PAIR, None, -0.1, None),
        ("Hallo", "", "Hello", -0.1, "empty"),
        ("Hallo", " \u2028", "Hello", -0.1, "empty"),
        ("Das ist neu", "das ist neu ", "This is new", -0.1, "copy"),
        ("Das ist neu", "das ist neu ", None, -0.1, "copy"),
        ("Angela Merkel", "Angela Merkel", "Angela Merkel", -0.1, None),
        ("Ein Hund läuft.", "Собака бежит.", "A dog runs.", -0.1, "script"),
        ("Ein Hund läuft.", "狗在跑步狗在跑步", "A dog runs.", -0.1, "script"),
        ("1990 – 1994", "1990–1994!", "1990-1994", -0.1, None),
        ("Ein Hund läuft.", "A " * 60, "A dog runs.", -0.1, "length ratio"),
        ("Ein Hund läuft über die grüne Wiese und bellt laut.", "A.", "A dog", -0.1, "length ratio"),
        ("Ja", "Yes, I do", "Yes", -0.1, None),
        (*PAIR, PAIR[1], -5.1, "score"),
    ],
)
def test_filters(source, target, reference, score, found):
    assert verdict(source, target, reference, score) == found


def test_without_references_the_translations_say_what_is_usual():
    rows = [("Ein Hund läuft.", "Собака бежит.", None, -0.1)] * 20 + [(*PAIR, None, -0.1)]
    assert judge(*(list(column) for column in zip(*rows)), NONE) == [None] * 20 + ["script"]


@given(st.lists(st.floats(-4, 0), max_size=60), st.floats(0, 0.9))
def test_the_worst_are_the_least_likely_of_the_others(scores, worst):
    n = len(scores)
    reasons = judge([PAIR[0]] * n, [PAIR[1]] * n, [None] * n, scores, Filters(worst=worst))
    taken = [score for score, reason in zip(scores, reasons) if reason]
    left = [score for score, reason in zip(scores, reasons) if not reason]
    assert len(taken) == int(n * worst) and max(taken, default=-9) <= min(left, default=0)
    found = counts(reasons)
    assert sum(found.values()) == n and found["worst by cross-entropy"] == len(taken)


def test_scripts():
    assert script("Ab 1, я") == {"LATIN": 2, "CYRILLIC": 1}
    assert script("漢かカ") == {"CJK": 1, "HIRAGANA": 1, "KATAKANA": 1}
