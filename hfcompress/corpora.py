"""Data that ships with a package, so that a recipe runs anywhere: handwritten digits, phrases of CLDR.

Both are the same on every machine and for every recipe's seed: draws come from SHA-256 of what is drawn.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from difflib import get_close_matches
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from datasets import ClassLabel, Dataset, Features, Image

from hfcompress.errors import DataError

T = TypeVar("T")
Spell = Callable[..., str]  # called with locale=, a babel.Locale: the phrase as that locale writes it

CURRENCIES = "AUD BRL CAD CHF CNY CZK DKK EUR GBP HKD HUF INR JPY KRW MXN NOK NZD PLN SEK TRY USD ZAR"
DATE_SKELETONS = ("yMMMEd", "yMMMM", "yMMMd", "MMMMd", "MMMEd", "yQQQQ")
DATE_INTERVALS = ("yMMMd", "yMMMEd", "yMMMM", "MMMd")
UNITS = """
    area-hectare area-square-kilometer area-square-meter concentr-percent digital-byte digital-gigabyte
    digital-megabyte duration-day duration-hour duration-minute duration-month duration-second duration-week
    duration-year energy-joule energy-kilowatt-hour frequency-hertz length-centimeter length-inch
    length-kilometer length-meter length-mile length-millimeter mass-gram mass-kilogram mass-pound mass-ton
    power-kilowatt power-watt speed-kilometer-per-hour speed-meter-per-second speed-mile-per-hour
    temperature-celsius temperature-fahrenheit volume-cubic-meter volume-liter volume-milliliter
"""
DAY = 24 * 60 * 60
SECONDS = {
    "second": 1,
    "minute": 60,
    "hour": 3600,
    "day": DAY,
    "week": 7 * DAY,
    "month": 30 * DAY,
    "year": 365 * DAY,
}


# ---------------------------------------------------------------------------------------------- digits


def digits() -> dict[str, Dataset]:
    """scikit-learn's 1,797 handwritten digits (8×8 pixels, grey levels 0..16 brought to 0..255).

    Columns `image` (PIL, mode L, 8×8) and `label` (ClassLabel "0".."9"). Stratified: validation has 20 and
    test 40 images of each digit, train the other 1,197. Raises DataError where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing("scikit-learn", "digits") from error
    import PIL.Image

    data = load_digits()
    pixels = (data.images * 255 / 16).round().astype("uint8")
    rows: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for digit in range(10):
        shuffled = sorted((data.target == digit).nonzero()[0], key=lambda row: _hash("digits", int(row)))
        rows["validation"] += shuffled[:20]
        rows["test"] += shuffled[20:60]
        rows["train"] += shuffled[60:]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(d) for d in range(10)])})
    splits = {}
    for split, chosen in rows.items():
        images = [PIL.Image.fromarray(pixels[row]) for row in sorted(chosen)]
        labels = [int(data.target[row]) for row in sorted(chosen)]
        splits[split] = Dataset.from_dict({"image": images, "label": labels}, features=features)
    return splits


# ------------------------------------------------------------------------------------------------ CLDR


@dataclass(frozen=True)
class _Phrase:
    """Something that any locale can spell. An `atom` (a single name) is in train: it cannot be guessed."""

    key: str  # what is meant, the same for all locales
    spell: Spell
    atom: bool = False


def cldr(source: str, target: str) -> dict[str, Dataset]:
    """Phrases as two locales write them, after the Unicode CLDR: columns `source` and `target` (str).

    Dates, times, intervals, relative times, numbers, amounts of money, measures, and lists of territories and
    languages; about 10,000 pairs for two well-covered locales. All single names are in train; of the rest, a
    twentieth each is validation and test, chosen by what is meant, so that all pairs of locales agree on it.
    No source sentence occurs twice, and no sentence of one split, on either side, is in another.

    `source`, `target`: locale codes such as "de" or "pt_BR". Raises DataError for a code that Babel does not
    know, for twice the same one, and where Babel is not installed.
    """
    try:
        import babel
    except ImportError as error:
        raise _missing("Babel", "cldr") from error
    locales = [_locale(babel, code) for code in (source, target)]
    if locales[0] == locales[1]:
        raise DataError(f"cldr: {source!r} and {target!r} are the same locale; give two languages.")
    rows: dict[str, list[tuple[int, str, str]]] = {"train": [], "validation": [], "test": []}
    seen: tuple[dict[str, str], dict[str, str]] = ({}, {})  # per side: sentence → the split that has it
    for phrase in sorted(_phrases(babel), key=lambda phrase: not phrase.atom):
        pair = _spell(phrase, locales)
        if pair is None or pair[0] in seen[0]:
            continue
        draw = 1.0 if phrase.atom else _hash("split", phrase.key) / 2**64
        split = "validation" if draw < 0.05 else "test" if draw < 0.1 else "train"
        if any(known.get(text, split) != split for known, text in zip(seen, pair)):
            continue
        for known, text in zip(seen, pair):
            known[text] = split
        rows[split].append((_hash("order", phrase.key), *pair))
    return {split: _shuffled(pairs) for split, pairs in rows.items()}


def _shuffled(pairs: list[tuple[int, str, str]]) -> Dataset:
    pairs = sorted(pairs)  # so that the first rows are of all kinds
    return Dataset.from_dict({"source": [s for _, s, _ in pairs], "target": [t for _, _, t in pairs]})


def _locale(babel: Any, code: str) -> Any:
    try:
        return babel.Locale.parse(code.replace("-", "_"))
    except (babel.UnknownLocaleError, ValueError) as error:
        known = babel.localedata.locale_identifiers()
        names = {name.lower(): code for code, name in babel.Locale("en").languages.items() if code in known}
        near = [names[name] for name in get_close_matches(code.lower(), names, n=1, cutoff=0.8)]
        near += get_close_matches(code.replace("-", "_"), known, n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise DataError(f"cldr: {code!r} is not one of the {len(known)} locales of Babel{hint}.") from error


def _spell(phrase: _Phrase, locales: list[Any]) -> tuple[str, str] | None:
    """The phrase in both locales, or None where one of them has no data for it."""
    try:
        source, target = (phrase.spell(locale=locale).strip() for locale in locales)
    except (LookupError, ValueError):  # Babel's answers to a name, unit or pattern that is not there
        return None
    return (source, target) if source and target else None


def _phrases(babel: Any) -> Iterator[_Phrase]:
    return chain(_names(babel), _dates(), _times(), _numbers(), _measures(), _lists(babel))


def _names(babel: Any) -> Iterator[_Phrase]:
    for table, codes in (
        ("territories", _territories(babel)),
        ("languages", _languages(babel)),
        ("currencies", CURRENCIES.split()),
    ):
        for code in codes:
            yield _Phrase(f"{table} {code}", partial(_name, table, code), atom=True)


def _dates() -> Iterator[_Phrase]:
    from babel.dates import format_date, format_datetime, format_interval, format_skeleton

    for style, count in (("full", 700), ("long", 700), ("medium", 300)):
        for i in range(count):
            day = _day(style, i)
            yield _Phrase(f"date {style} {day}", partial(format_date, day, style))
    for skeleton in DATE_SKELETONS:
        for i in range(150):
            day = _day(skeleton, i)
            yield _Phrase(f"date {skeleton} {day}", partial(format_skeleton, skeleton, day, fuzzy=False))
    for style in ("medium", "long"):
        for i in range(250):
            moment = datetime.combine(_day("moment", style, i), _clock("moment", style, i))
            yield _Phrase(f"moment {style} {moment}", partial(format_datetime, moment, style))
    for skeleton in DATE_INTERVALS:
        for i in range(150):
            start = _day("interval", skeleton, i)
            longest = 20 if skeleton == "MMMd" or i % 2 else 400  # without a year, never longer than one
            end = start + timedelta(days=1 + _below(longest, skeleton, i))
            spell = partial(format_interval, start, end, skeleton, fuzzy=False)
            yield _Phrase(f"interval {skeleton} {start} {end}", spell)


def _times() -> Iterator[_Phrase]:
    from babel.dates import format_time, format_timedelta

    for style, count in (("short", 500), ("medium", 200)):
        for i in range(count):
            clock = _clock(style, i)
            yield _Phrase(f"time {style} {clock}", partial(format_time, clock, style))
    for unit, seconds in SECONDS.items():
        for count in (*range(1, 31), *range(35, 100, 5)):
            for sign in (1, -1):
                delta = timedelta(seconds=sign * count * seconds)
                spell = partial(format_timedelta, delta, threshold=1, add_direction=True)
                yield _Phrase(f"relative {unit} {sign * count}", spell)


def _numbers() -> Iterator[_Phrase]:
    from babel.numbers import format_compact_decimal, format_currency, format_decimal, format_percent

    for i in range(500):
        number = _below(10 ** (3 + i % 6), "number", i) / 10 ** (i % 3)
        yield _Phrase(f"number {number}", partial(format_decimal, number))
    for i in range(150):
        share = _below(1000, "percent", i) / 1000
        yield _Phrase(f"percent {share}", partial(format_percent, share, decimal_quantization=False))
    for i in range(300):
        big = (1 + _below(9999, "compact", i)) * 10 ** (2 + i % 8)
        yield _Phrase(f"compact {big}", partial(format_compact_decimal, big, format_type="long", fraction_digits=1))
    for kind in ("name", "standard"):
        for code in CURRENCIES.split():
            for i in range(22):
                amount = _below(10 ** (1 + i % 6), kind, code, i) / (1 if i % 2 else 100)
                spell = partial(format_currency, amount, code, format_type=kind)
                yield _Phrase(f"money {kind} {code} {amount}", spell)


def _measures() -> Iterator[_Phrase]:
    from babel.units import format_unit

    for unit in UNITS.split():
        for i in range(20):
            number = _below(1000, unit, i) / 10 if i % 4 == 0 else 1 + _below((12, 100, 2000)[i % 3], unit, i)
            yield _Phrase(f"measure {unit} {number}", partial(format_unit, number, unit))
    for i in range(500):
        drawn = [("measures", i, k) for k in range(2 + i % 2)]
        parts = [partial(format_unit, 1 + _below(60, *draw), _pick(UNITS.split(), *draw)) for draw in drawn]
        yield _Phrase(f"measures {[part.args for part in parts]}", partial(_list, parts, "standard"))


def _lists(babel: Any) -> Iterator[_Phrase]:
    for table, codes, count in (
        ("territories", _territories(babel), 1200),
        ("languages", _languages(babel), 800),
    ):
        for i in range(count):
            chosen = dict.fromkeys(_pick(codes, table, i, k) for k in range(2 + i % 3))
            style = "or" if i % 4 == 0 else "standard"
            spell = partial(_list, [partial(_name, table, code) for code in chosen], style)
            yield _Phrase(f"{table} {style} {list(chosen)}", spell)


def _name(table: str, code: str, *, locale: Any) -> str:
    name: str = getattr(locale, table)[code]
    return name


def _list(parts: Sequence[Spell], style: str, *, locale: Any) -> str:
    from babel.lists import format_list

    text: str = format_list([spell(locale=locale) for spell in parts], style=style, locale=locale)
    return text


def _territories(babel: Any) -> list[str]:
    nowhere = {"ZZ", "XA", "XB"}  # unknown, and two made up for tests
    return sorted(code for code in babel.Locale("en").territories if len(code) == 2 and code not in nowhere)


def _languages(babel: Any) -> list[str]:
    """The two-letter languages in which Babel itself can write."""
    return sorted({code for code in babel.localedata.locale_identifiers() if len(code) == 2})


# Draws that never change:


def _hash(*what: object) -> int:
    """A uniform 64-bit integer, a function of `what` alone."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "big")


def _below(n: int, *what: object) -> int:
    return _hash("below", *what) % n


def _pick(items: list[T], *what: object) -> T:
    return items[_below(len(items), *what)]


def _day(*what: object) -> date:
    return date(1950, 1, 1) + timedelta(days=_below(100 * 365, "day", *what))


def _clock(*what: object) -> time:
    return time(*divmod(_below(24 * 60, "clock", *what), 60))


def _missing(package: str, corpus: str) -> DataError:
    need = f"The embedded corpus {corpus!r} needs {package}, which is not installed"
    return DataError(f"{need}: pip install 'hfcompress[quickstart]'")
