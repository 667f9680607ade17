"""YAML: scalars of version 1.2, strictness, places, and the round trip of whatever can be written."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfcompress.errors import ConfigError
from hfcompress.yaml_lines import Place, parse, read, write


def at_line(line: int, column: int) -> Place:
    return Place("f", line, column)


def one(text: str) -> Any:
    (document,) = parse(text, at_line)
    return document.tree


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E+2", 100.0),
        (".5", 0.5),
        ("-3.", -3.0),
        ("1_000", "1_000"),
        ("012", 12),
        ("0o17", 15),
        ("0x1F", 31),
        ("+7", 7),
        ("12:30", "12:30"),
        ("2024-01-31", "2024-01-31"),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("y", "y"),
        ("True", True),
        ("FALSE", False),
        ("~", None),
        ("Null", None),
        ("a:", {"a": None}),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("!!float 1", 1.0),
        ("[&x {a: 1}, *x]", [{"a": 1}, {"a": 1}]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = one(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "f:3: key 'a' is given twice, first at f:1; keep one of them"),
        ("a:\n  - {b: 1, b: 2}", "f:2: key 'b' is given twice, first at f:2; keep one of them"),
        ("a: 1\n2: 3", "f:2: a key must be text, found '2'; put it in quotes"),
        ("? [a]\n: 3", "f:1: a key must be text, found a collection"),
        ("a: !!python/name:os.system x", "f:1: tag '!!python/name:os.system' is refused: only plain values are read"),
        ("a: !!set {b}", "f:1: tag '!!set' is refused: only plain values are read"),
        ("a: !mine 3", "f:1: tag '!mine' is refused: only plain values are read"),
        ("a: !!int three", "f:1: 'three' is not what its tag '!!int' says"),
        ("a: .nan", "f:1: '.nan' is not a finite number"),
        ("a: -.inf", "f:1: '-.inf' is not a finite number"),
        ("a: 1e999", "f:1: '1e999' is not a finite number"),
        ("a: 9223372036854775808", "f:1: '9223372036854775808' does not fit into 64 bits"),
        ('a: "\\ud800"', "f:1: '\\ud800' holds half a surrogate pair"),
        ("a: {b: 1\nc: [", "f:2:2: expected ',' or '}', but got ':' (while parsing a flow mapping)"),
        ("a:\n\t- b", "f:2:1: found character '\\t' that cannot start any token (while scanning for the next token)"),
        ("a: b: c", "f:1:5: mapping values are not allowed here"),
        ("a: *b", "f:1:4: found undefined alias 'b'"),
        ("a: &a [*a]", "f:1:8: an alias within what it stands for"),
        ("a: &a b\nc: [" + "*a, " * 17 + "]", "f:2:69: more than 16 aliases"),
        ("[" * 40, "f:1:33: nested more than 32 deep"),
        ("a: b\n\n\x07", "f:3: character U+0007 is not allowed in YAML"),
        ('a: "\\UFFFFFFFF"', "f:1:7: the number in an escape or directive is out of range"),
    ],
)
def test_refusals_tell_line_and_reason(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(text, at_line)
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


def test_a_file_of_aliases_of_aliases_stays_small() -> None:
    lines = ["a0: &a0 [x, x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 6)]
    assert len(json.dumps(one("\n".join(lines)))) < 20_000


def test_every_value_has_its_place() -> None:
    (document,) = parse("a:\n  b: 1\n\nc:\n- d\n-\n  e: 2\n", at_line)
    lines = {address: place.line for address, place in document.places.items()}
    assert lines == {
        (): 1, ("a",): 1, ("a", "b"): 2, ("c",): 4, ("c", 0): 5, ("c", 1): 7, ("c", 1, "e"): 7,
    }  # fmt: skip
    assert document.place(("c", 1, "f", "g")).line == 7
    assert document.at("a", "b") == 1 and document.at("a", "b", "x") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ":1: the file is empty; a document was expected"),
        (b"# nothing but a comment\n", ":1: the file is empty; a document was expected"),
        (b"a: 1\nb: \xff", ":2: not UTF-8 text: byte 0xff"),
        (None, ": cannot be read: No such file or directory"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "f.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        read(path)
    assert str(refusal.value) == f"{path}{message}"


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(["no", "on", "1e5", "012", "0o7", "12:30", "~", "", ".inf", "<<", "=", "2024-01-31", "a: b"])
    | st.text("- #:'\"\n\t[{&*!|>%@`,?~.", max_size=8)
)
TREES = st.recursive(SCALARS, lambda items: st.lists(items, max_size=3) | st.dictionaries(st.text(), items, max_size=3))


@given(TREES)
def test_what_is_written_reads_back_equal(tree: Any) -> None:
    assert json.dumps(one(write(tree))) == json.dumps(tree)  # as text, so that 1, 1.0 and True differ


@given(st.text("ab:-[]{}&*!'\"#|>%, \n\t?01.~\\uUx", max_size=40) | st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        documents = parse(text, at_line)
    except ConfigError as refusal:
        assert all(line.startswith("f:") for line in str(refusal).split("\n"))
    else:
        json.dumps([document.tree for document in documents], allow_nan=False)
