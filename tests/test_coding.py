"""Integers to bytes and back; how many bytes; which bytes are refused."""

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.coding import Symbols, rans
from hfcompress.coding.bits import BitReader, BitWriter, unzigzag, zigzag
from hfcompress.coding.classes import fit_classes, read_classes
from hfcompress.coding.contexts import SCALES, SIZES, Grid, prior_of, walk
from hfcompress.coding.decoder import Arrays, Place, Tables, check
from hfcompress.coding.plan import Plan, plan
from hfcompress.coding.pool import Histogram
from hfcompress.coding.rans import FEW, Decoder, Segment, encode, states_for
from hfcompress.coding.symbols import CONTEXTS, PLAIN, Form
from hfcompress.coding.tables import MAX_ALPHABET, TOTAL, Table, fit, normalise, read, write
from hfcompress.errors import FormatError

SHAPES = ((0,), (1,), (77,), (16, 20), (37, 11), (9, 4, 3, 3), (20, 1, 5, 5), (12, 7, 3), (1, 400))


@st.composite
def arrays(draw: st.DrawFn) -> Symbols:
    """Any length, alphabets of up to 2^24 values anywhere among 32-bit integers, some of them weights."""
    width = draw(st.sampled_from((1, 2, 3, 16, 200, 256, 257, 5000, 1 << 16, 1 << 24)))
    low = draw(st.integers(-(2**31), 2**31 - width))
    shape = draw(
        st.sampled_from(((0,), (1,), (77,), (16, 20), (37, 11), (9, 4, 3, 3), (20, 1, 5, 5), (12, 7, 3), (1, 400)))
    )
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, skew = prod(shape), draw(st.sampled_from((1, 4, 30)))  # the higher, the fewer large values
    values = low + np.floor(width * generator.random(n) ** skew).astype(np.int64)
    if n > 1 and draw(st.booleans()):
        values[:2] = low, low + width - 1
    return Symbols(values.astype(np.int32), shape if draw(st.booleans()) else None)


@st.composite
def planes(draw: st.DrawFn) -> np.ndarray:
    n, top = draw(st.integers(0, 300)), draw(st.sampled_from((1, 2, 8, 256)))
    return np.random.default_rng(n).integers(0, top, n).astype(np.uint8)


def places(chosen: Plan, given: list[Symbols], octets: list[np.ndarray]) -> tuple[list[Place], list[Place]]:
    of_symbols = [Place(s.values.size, form, s.shape or ()) for s, form in zip(given, chosen.forms)]
    return of_symbols, [Place(p.size, form) for p, form in zip(octets, chosen.planes)]


def opened(chosen: Plan, given: list[Symbols], octets: list[np.ndarray], stream: np.ndarray, **options: bool) -> Arrays:
    tables = Tables.read(chosen.tables)
    of_symbols, of_planes = places(chosen, given, octets)
    check([*of_symbols, *(p for p in of_planes if p.form.table != PLAIN)], tables, 16 * stream.size)
    return Arrays(of_symbols, of_planes, tables, stream, chosen.states, **options)


def bytes_of(given: list[Symbols]) -> int:
    chosen = plan(given, [])
    return chosen.stream(b"").nbytes + len(chosen.tables)


@given(st.lists(arrays(), max_size=6), st.lists(planes(), max_size=4), st.binary(max_size=4))
def test_round_trip(given: list[Symbols], octets: list[np.ndarray], freight: bytes) -> None:
    chosen = plan(given, octets)
    freight = freight[: 2 * chosen.states]
    found = opened(chosen, given, octets, chosen.stream(freight))
    for form, before, (after, _) in zip(chosen.planes, octets, found.planes):
        assert form.table == PLAIN or np.array_equal(before, after)
    for number, before in enumerate(given):
        after, _ = found.read(number)
        assert after.dtype == np.int32 and np.array_equal(before.values, after)
    assert found.finish() == freight.ljust(2 * chosen.states, b"\0")


def like_filters(shape: tuple[int, ...], step: float, seed: int = 0) -> Symbols:
    """Rounded weights whose rows and channels differ in scale, and whose neighbours in a kernel resemble each other."""
    generator = np.random.default_rng(seed)
    drawn = generator.laplace(size=shape)
    if len(shape) > 2:
        drawn[..., 1:] += 0.6 * drawn[..., :-1]
    drawn *= np.exp(0.5 * generator.normal(size=(shape[0], *[1] * (len(shape) - 1))))
    drawn *= np.exp(0.5 * generator.normal(size=(1, shape[1], *[1] * (len(shape) - 2))))
    return Symbols(np.rint(drawn / step).astype(np.int32).reshape(-1), shape)


@pytest.mark.parametrize("step", [4.0, 1.0, 0.1, 0.002])
def test_neighbours_make_weights_shorter(step: float) -> None:
    given = [like_filters((48, 32, 3, 3), step), like_filters((100, 64), step), like_filters((30, 20, 5), step)]
    chosen = plan(given, [])
    assert all(form.table == CONTEXTS for form in chosen.forms[:2]) or step < 1  # then tables are dear
    assert bytes_of(given) < (0.97 if step >= 1 else 1.005) * bytes_of([Symbols(s.values) for s in given])
    found = opened(chosen, given, [], chosen.stream(b""), measure=True)
    bits = 0.0
    for number, before in enumerate(given):
        after, spent = found.read(number)
        assert np.array_equal(before.values, after)
        bits += spent
    size = 8 * chosen.stream(b"").nbytes
    assert bits - 1 <= size <= 1.001 * bits + 64


def test_noise_is_left_to_tables() -> None:
    generator = np.random.default_rng(0)
    given = [Symbols(np.rint(generator.normal(0, 2, 64 * 576)).astype(np.int32), (64, 64, 3, 3)) for _ in range(3)]
    assert all(form.table >= 0 for form in plan(given, []).forms)
    assert bytes_of(given) <= 1.002 * sum(s.entropy() for s in given) / 8 + 60


@pytest.mark.parametrize("values", [[], [7], [-5] * 1000, [-(2**31), -(2**31) + 1], [2**31 - 1, 2**31 - (1 << 24)]])
def test_corners(values: list[int]) -> None:
    symbols = Symbols(np.array(values, dtype=np.int32))
    chosen = plan([symbols, symbols], [])
    found = opened(chosen, [symbols, symbols], [], chosen.stream(b""))
    assert [found.read(n)[0].tolist() for n in (0, 1)] == [values, values]
    if len(set(values)) <= 1:
        assert not chosen.segments  # what is certain costs nothing


def test_too_many_values_are_refused() -> None:
    with pytest.raises(FormatError, match=r"2\^24"):
        plan([Symbols(np.array([0, 1 << 24], dtype=np.int32))], [])


@pytest.mark.parametrize("n", [10_000, 1 << 20])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0, 15.0])
def test_size_is_the_entropy(n: int, spread: float) -> None:
    limit = 1.02 if n < 1 << 20 else 1.002 if spread > 10 else 1.001  # a hundred rare symbols want more than 14 bits
    symbols = Symbols(np.rint(np.random.default_rng(1).laplace(0, spread, n)).astype(np.int32))
    assert bytes_of([symbols]) <= limit * symbols.entropy() / 8


def test_entropy() -> None:
    assert Symbols(np.array([], dtype=np.int32)).entropy() == 0
    assert Symbols(np.array([3, 3, 3], dtype=np.int32)).entropy() == 0
    assert Symbols(np.array([0, 1, 2, 3] * 8, dtype=np.int32)).entropy() == pytest.approx(64)


def test_arrays_that_look_alike_share_a_table() -> None:
    generator = np.random.default_rng(0)
    given = [Symbols(np.rint(generator.normal(0, s, 3000)).astype(np.int32)) for s in [1.0] * 20 + [20.0] * 20]
    assert 2 <= len(Tables.read(plan(given, []).tables).shared) <= 4


def test_bytes_of_numbers_are_coded_where_that_is_shorter() -> None:
    numbers = np.random.default_rng(0).normal(1, 0.2, 4000).astype(np.float32).view(np.uint8).reshape(-1, 4)
    forms = plan([], [numbers[:, i] for i in range(4)]).planes
    assert [form.table == PLAIN for form in forms] == [True, True, False, False] or forms[3].table != PLAIN


# ---------------------------------------------------------------------------------------------------- its parts


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=400).filter(any), st.integers(-100, 100))
def test_tables_fit_counts_and_are_read_as_written(counts: list[int], first: int) -> None:
    table, written = fit(np.array(counts, dtype=np.int64), first)
    source = BitReader(written.to_bytes())
    assert read(source) == table
    source.finish()
    assert sum(table.frequencies) == TOTAL
    padded = np.zeros(len(counts), dtype=np.int64)
    padded[table.first - first :][: len(table.frequencies)] = table.frequencies
    assert ((padded > 0) == (np.array(counts) > 0)).all()


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=MAX_ALPHABET).filter(any))
def test_frequencies_sum_up(values: list[int]) -> None:
    frequencies = normalise(values)
    assert sum(frequencies) == TOTAL and all((f > 0) == (v > 0) for f, v in zip(frequencies, values))


@given(st.lists(st.tuples(st.integers(-(2**40), 2**40), st.integers(0, 8)), max_size=30))
def test_bits(numbers: list[tuple[int, int]]) -> None:
    out = BitWriter()
    for value, order in numbers:
        out.signed(value, order)
        assert unzigzag(zigzag(value)) == value
    source = BitReader(out.to_bytes())
    assert [source.signed(order) for _, order in numbers] == [value for value, _ in numbers]
    source.finish()


@given(st.binary(max_size=60))
def test_any_bytes_are_tables_or_refused(data: bytes) -> None:
    try:
        tables = Tables.read(data)
    except FormatError:
        return
    assert all(sum(table.frequencies) == TOTAL for table in tables.shared)


@settings(max_examples=40)
@given(st.integers(0, 2000), st.sampled_from((1, 2, 5, FEW, 64)), st.integers(2, 300), st.integers(0, 99))
def test_the_coder_at_any_number_of_states(n: int, states: int, k: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    tables = [fit(generator.integers(0, 50, k) + np.eye(1, k, k - 1, dtype=np.int64)[0], 0)[0] for _ in range(2)]
    segments, numbers = [], []
    for table in tables:
        frequencies = np.array(table.frequencies, dtype=np.uint32)
        numbers.append(generator.choice(np.flatnonzero(frequencies), n).astype(np.uint16))
        segments.append(Segment(frequencies, table.starts, numbers[-1]))
    freight = generator.integers(0, 1 << 16, states).astype(np.uint16)
    decoder = Decoder(encode(segments, states, freight), states)
    both = np.concatenate([table.lookup() for table in tables])
    first = tables[0].symbols()[decoder.take(tables[0].lookup(), 0, n)]
    second = tables[1].symbols()[decoder.take(both, np.full(n, TOTAL), n)]
    assert np.array_equal(first, numbers[0]) and np.array_equal(second, numbers[1])
    assert np.array_equal(decoder.finish(), freight)


def test_states_cost_little() -> None:
    """And those that carry something are cheaper."""
    assert [states_for(bits, 0) for bits in (0, 1e5, 1e6, 1e12)] == [1, 1, 16, 1 << 14]
    assert [states_for(bits, 10**6) for bits in (0, 1e5, 1e6, 1e12)] == [1, 4, 32, 1 << 14]


def test_classes_are_read_as_written() -> None:
    counts = np.random.default_rng(0).poisson(3, (SCALES * SIZES, 9))
    counts[: 20 * SIZES] = 0
    classes, written = fit_classes(counts, -4)
    source = BitReader(written.to_bytes())
    assert read_classes(source) == classes
    source.finish()


@given(st.integers(0, 10**6))
def test_a_prior_is_near_the_mean(mean: int) -> None:
    code = prior_of(np.array([mean, 0]))
    found = Grid(1, 1, 1, 1, code).mean
    assert 0 <= code < 128
    assert found <= max(128 * mean, 1) <= 1.125 * found or code == 127


@settings(max_examples=20)
@given(st.lists(st.sampled_from(((1, 3), (17, 5), (9, 2, 3, 3), (20, 1, 5), (8, 3, 1, 1))), min_size=1, max_size=4))
def test_a_walk_meets_every_symbol_once(shapes: list[tuple[int, ...]]) -> None:
    grids = [Grid.of(shape, 3) for shape in shapes]
    total = sum(grid.size for grid in grids)
    symbols, met = np.random.default_rng(0).integers(-3, 4, total), np.zeros(total, dtype=int)

    def visit(kind: np.ndarray, part: np.ndarray, position: np.ndarray) -> np.ndarray:
        met[position] += 1
        assert kind.min() >= -SCALES * SIZES and kind.max() < SCALES * SIZES
        return symbols[position]

    assert np.array_equal(walk(grids, visit), symbols) and (met == 1).all()


# ---------------------------------------------------------------------------------------------------- refusals


@given(
    st.lists(st.sampled_from(((16, 17), (33, 9), (19, 4, 3, 3), (20, 3, 5), (8, 60, 1, 1))), min_size=1, max_size=4),
    st.sampled_from((0.3, 1.0, 8.0, 90.0)),
    st.integers(0, 99),
)
@settings(max_examples=30)
def test_compiled_and_plain_contexts_are_the_same(shapes: list[tuple[int, ...]], step: float, seed: int) -> None:
    """The same classes, bytes, symbols and costs; needs numba to say anything."""
    pytest.importorskip("numba")
    given = [like_filters(shape, step, seed + number) for number, shape in enumerate(shapes)]
    compiled, results = rans.fast, []
    assert compiled is not None
    for fast in (compiled, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rans, "fast", fast)
            patch.setattr("hfcompress.coding.plan._WORTH", 2.0)  # contexts even where they do not pay
            chosen = plan(given, [])
            stream = chosen.stream(b"")
            found = opened(chosen, given, [], stream, measure=True)
            read = [found.read(number) for number in range(len(given))]
            found.finish()
            assert all(np.array_equal(values, s.values) for (values, _), s in zip(read, given))
            with pytest.raises(FormatError, match=r"truncated|does not end"):
                broken = opened(chosen, given, [], stream[:-1])
                for number in range(len(given)):
                    broken.read(number)
                broken.finish()
            results.append((chosen.forms, chosen.tables, stream.tobytes(), [bits for _, bits in read]))
    assert results[0] == results[1]


def written(values: list[int], first: int = 0) -> bytes:
    out = BitWriter()
    out.golomb(1)
    out.append(write(first, values, 0))
    out.fixed(0, 2)
    return out.to_bytes()


MALFORMED = {
    "begins or ends": written([5, 0]),
    "begins or ends ": written([0, 5]),
    "at most 4096": written([1] * 4097),
    "count of 49 bits": written([1 << 48, 1]),
    "32-bit": written([1, 1], 2**31 - 1),
    "32-bit ": written([1], -(2**31) - 1),
    "truncated": written([1 << 30, 1 << 30])[:-1],
    "more than is used": written([1, 1]) + b"\0\0",
    "malformed": bytes(30),
}


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed_tables_are_refused(message: str) -> None:
    with pytest.raises(FormatError, match=message.strip()):
        Tables.read(MALFORMED[message])


def test_streams_that_do_not_fit_are_refused() -> None:
    symbols = Symbols(np.arange(9000, dtype=np.int32) % 7)
    chosen = plan([symbols], [])
    stream = chosen.stream(b"")
    for wrong in (stream[:-1], np.append(stream, np.uint16(1)), stream[: 2 * chosen.states - 1], stream * 0):
        with pytest.raises(FormatError, match="stream"):
            found = opened(chosen, [symbols], [], wrong)
            found.read(0)
            found.finish()
    short = Plan(chosen.forms, (), chosen.tables, chosen.states, chosen.segments)
    with pytest.raises(FormatError, match="does not end"):
        found = opened(short, [Symbols(symbols.values[:-1])], [], stream)
        found.read(0)
        found.finish()


FORMS = {
    "does not exist": (Form(1), (9,)),
    "shift 14": (Form(0, shift=14), (9,)),
    "no weight": (Form(CONTEXTS), (9,)),
    "context classes": (Form(CONTEXTS), (3, 3)),
    "nothing uses": (Form(PLAIN), (9,)),
    "more symbols": (Form(0), (1 << 40,)),
    "more symbols ": (Form(0, shift=2), (1 << 20,)),
}


@pytest.mark.parametrize("message", FORMS)
def test_forms_that_do_not_fit_are_refused(message: str) -> None:
    form, shape = FORMS[message]
    both = [Place(9, Form(0)), Place(prod(shape), form, shape)]
    with pytest.raises(FormatError, match=message.strip()):
        check(both[1:] if message == "nothing uses" else both, Tables.read(written([1, 1])), 1 << 12)


def test_a_constant_array_takes_no_memory() -> None:
    tables = Tables((Table(-3, (TOTAL,)),), (None, None))
    stream = encode([], 1, np.zeros(1, dtype=np.uint16))
    values, bits = Arrays([Place(1 << 40, Form(0))], [], tables, stream, 1).read(0)
    assert values.size == 1 << 40 and values[12345] == -3 and bits == 0


def test_histograms_add_up() -> None:
    one, other = (Histogram.of(np.array(v)) for v in ([3, 5, 5], [-1, 3]))
    assert (one + other).first == -1 and (one + other).counts.tolist() == [1, 0, 0, 0, 2, 0, 2]
