"""Integers to bytes and back; how many bytes; which bytes are refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.coding import (
    MAX_ALPHABET,
    Decoder,
    Symbols,
    Table,
    encode,
    precision,
    tables_from_bytes,
    tables_to_bytes,
)
from hfcompress.errors import FormatError


@st.composite
def arrays(draw: st.DrawFn) -> Symbols:
    """Any length, any alphabet of up to 65,536 values anywhere among 32-bit integers."""
    width = draw(st.sampled_from((1, 2, 3, 16, 200, 256, 257, 5000, MAX_ALPHABET)))
    low = draw(st.integers(-(2**31), 2**31 - width))
    n = draw(st.integers(0, 300))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    skew = draw(st.sampled_from((1, 4, 30)))  # the higher, the fewer large values
    values = low + np.floor(width * generator.random(n) ** skew).astype(np.int64)
    if n > 1 and draw(st.booleans()):
        values[:2] = low, low + width - 1
    return Symbols(values.astype(np.int32))


def round_trip(given: list[Symbols]) -> list[Symbols]:
    coded = encode(given)
    decoder = Decoder(coded.stream.copy(), tables_from_bytes(tables_to_bytes(coded.tables)))
    result = [decoder.read(s.values.size, choice) for s, choice in zip(given, coded.choice)]
    decoder.finish()
    return result


@given(st.lists(arrays(), max_size=6))
def test_round_trip(given: list[Symbols]) -> None:
    for before, after in zip(given, round_trip(given), strict=True):
        assert after.values.dtype == np.int32
        assert np.array_equal(before.values, after.values)


@pytest.mark.parametrize(
    "values", [[], [7], [-5] * 1000, [-(2**31), -(2**31) + 1], [2**31 - 1, 2**31 - 65536], [0, 1] * 500]
)
def test_corners(values: list[int]) -> None:
    symbols = Symbols(np.array(values, dtype=np.int32))
    assert round_trip([symbols, symbols])[1].values.tolist() == values
    if len(set(values)) <= 1:
        assert encode([symbols]).stream.size == 0  # what is certain costs nothing


def test_too_many_values_are_refused() -> None:
    with pytest.raises(FormatError, match="65536"):
        encode([Symbols(np.array([0, 65536], dtype=np.int32))])


@settings(max_examples=30)
@given(st.sampled_from((2, 3, 16, 256, 4000)), st.floats(0.2, 20), st.integers(1, 4))
def test_size_is_the_entropy(k: int, spread: float, count: int) -> None:
    generator = np.random.default_rng(k)
    given = []
    for _ in range(count):
        values = np.clip(np.rint(generator.normal(k / 2, spread, 30_000)), 0, k - 1)
        given.append(Symbols(values.astype(np.int32)))
    coded = encode(given)
    entropy = sum(symbols.entropy() for symbols in given)
    ideal = sum(coded.tables[choice].bits(symbols) for symbols, choice in zip(given, coded.choice))
    assert 32 * coded.stream.size <= 1.0001 * ideal + 96
    tables = 8 * len(tables_to_bytes(coded.tables))
    # the entropy of each array, or of a table shared because that is smaller, which a small surplus cannot outweigh
    assert 32 * coded.stream.size + tables <= 1.001 * entropy + tables * 1.5 + 96


def test_four_bits_cost_their_entropy() -> None:
    given = [Symbols(np.clip(np.random.default_rng(i).normal(8, 3, 100_000), 0, 15).astype(np.int32)) for i in range(4)]
    coded = encode(given)
    total = 4 * coded.stream.size + len(tables_to_bytes(coded.tables))
    assert total <= sum(symbols.entropy() for symbols in given) / 8 * 1.001 + 256


def test_entropy() -> None:
    assert Symbols(np.array([], dtype=np.int32)).entropy() == 0
    assert Symbols(np.array([3, 3, 3], dtype=np.int32)).entropy() == 0
    assert Symbols(np.array([0, 1, 2, 3] * 8, dtype=np.int32)).entropy() == pytest.approx(64)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=400).filter(any), st.integers(-100, 100))
def test_table_fits_counts(counts: list[int], first: int) -> None:
    counted = np.array(counts, dtype=np.int64)
    table = Table.fit(counted, first)
    frequencies = np.array(table.frequencies)
    assert frequencies.sum() == 1 << precision(len(counts))
    assert ((frequencies > 0) == (counted > 0)).all()
    scaled = counted * (frequencies.sum() / counted.sum())
    if scaled[counted > 0].min() >= 1:
        assert np.abs(frequencies - scaled).max() <= 1


@given(st.lists(arrays(), max_size=4))
def test_tables_as_bytes(given: list[Symbols]) -> None:
    tables = encode(given).tables
    assert tables_from_bytes(tables_to_bytes(tables)) == tables
    assert len(set(tables)) == len(tables)


FULL = 1 << 14
MALFORMED = {
    "sums": Table(0, (FULL, 1)).to_bytes(),
    "sums ": Table(0, (FULL - 2, 1)).to_bytes(),
    "begins or ends": Table(0, (FULL, 0)).to_bytes(),
    "begins or ends ": Table(0, (0, FULL)).to_bytes(),
    "declares 0 symbols": bytes([0, 0]),
    "declares 65537": Table(0, (1,) * 65537).to_bytes(),
    "truncated": Table(0, (FULL // 2, FULL // 2)).to_bytes()[:-1],
    "truncated ": bytes([0, 2, 0x80]),
    "malformed": b"\xff" * 20,
    "32-bit": Table(2**31 - 1, (FULL // 2, FULL // 2)).to_bytes(),
    "32-bit ": Table(-(2**31) - 1, (FULL,)).to_bytes(),
}


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed_tables_are_refused(message: str) -> None:
    with pytest.raises(FormatError, match=message.strip()):
        tables_from_bytes(Table(5, (FULL,)).to_bytes() + MALFORMED[message])


@given(st.binary(max_size=60))
def test_any_bytes_are_tables_or_refused(data: bytes) -> None:
    try:
        tables = tables_from_bytes(data)
    except FormatError:
        return
    assert tables_from_bytes(tables_to_bytes(tables)) == tables


def test_streams_that_do_not_fit_are_refused() -> None:
    symbols = Symbols(np.arange(1000, dtype=np.int32) % 7)
    coded = encode([symbols])
    with pytest.raises(FormatError, match="zero word"):
        Decoder(np.append(coded.stream, np.uint32(0)), coded.tables)
    decoder = Decoder(coded.stream.copy(), coded.tables)
    with pytest.raises(FormatError, match="table 1 of 1"):
        decoder.read(1000, 1)
    decoder.read(999, 0)
    with pytest.raises(FormatError, match="more than its arrays"):
        decoder.finish()


def test_a_constant_array_takes_no_memory() -> None:
    decoder = Decoder(np.zeros(0, dtype=np.uint32), (Table(-3, (FULL,)),))
    values = decoder.read(1 << 40, 0).values
    assert values.size == 1 << 40 and values[12345] == -3
