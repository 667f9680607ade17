"""What a run found: the records behind results.json, the final table, the pictures and the model card."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, FiniteFloat, NonNegativeInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from hfcompress.checkpoint import Sizes
from hfcompress.errors import DataError
from hfcompress.files import write_atomically

TITLES: dict[str, str] = {
    "teacher": "teacher",
    "student": "student, full precision",
    "post_training": "student, compressed after training",
    "compressed": "student, trained compressed",
}
"""How the four rows are called in tables, in the order in which they are shown."""


@dataclass(frozen=True)
class Metric:
    """`name` as people write it, `hub` as the Hub does."""

    name: str
    hub: str
    unit: str = ""

    @property
    def heading(self) -> str:
        return f"{self.name} ({self.unit.strip()})" if self.unit else self.name


METRICS: dict[str, Metric] = {
    "bleu": Metric("BLEU", "sacrebleu"),
    "chrf": Metric("chrF", "chrf"),
    "accuracy": Metric("accuracy", "accuracy", unit=" %"),
}
"""The metrics of a row, the one that speaks for its task first."""

_CHECKED = ConfigDict(extra="ignore")  # a later version may say more


@checked(frozen=True, config=_CHECKED)
class Score:
    """One metric over `n` rows: `value` and its 95 % `interval` on a scale of 0 to 100; `signature` says how.

    An interval of no width means that none was taken.
    """

    value: FiniteFloat
    n: NonNegativeInt
    signature: str
    interval: tuple[FiniteFloat, FiniteFloat]

    @property
    def measured(self) -> bool:
        """Whether there is an interval."""
        return self.interval[0] < self.interval[1]

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2f} ({low:.1f}–{high:.1f})" if self.measured else f"{self.value:.2f}"

    def overlaps(self, other: "Score") -> bool:
        """Whether the two intervals have a point in common."""
        return self.interval[0] <= other.interval[1] and other.interval[0] <= self.interval[1]


@checked(frozen=True, config=_CHECKED)
class Row:
    """One model of the run. `bytes`: its weights on disk; `bits_per_weight`: 8 · bytes / parameters.

    `int8_gzip_bytes`: the same network's weights in int8, gzipped: the yardstick.
    """

    name: Literal["teacher", "student", "post_training", "compressed"]
    parameters: NonNegativeInt
    bytes: NonNegativeInt
    bits_per_weight: FiniteFloat
    int8_gzip_bytes: NonNegativeInt
    scores: dict[str, Score]

    @property
    def title(self) -> str:
        return TITLES[self.name]


@checked(frozen=True, config=_CHECKED)
class Paired:
    """Whether the compressed student's score differs from that of row `against`: paired bootstrap resampling.

    `difference`: the compressed student's minus the other's, in points; `p_value`: of no difference; `n`: rows scored;
    `resamples`: of those rows; `signature` says how.
    """

    against: Literal["teacher", "student", "post_training"]
    metric: str
    difference: FiniteFloat
    p_value: FiniteFloat
    n: NonNegativeInt
    resamples: NonNegativeInt
    signature: str


@checked(frozen=True, config=_CHECKED)
class Results:
    """All that a run measured; results.json is exactly this, with each row's ratio to the teacher beside it.

    `versions`: package → version; `hardware`: as `report.hardware()` gives it; `seconds`: stage → wall time; `paired`:
    of translation, the compressed student against each other row; results.json has the key where there are any.
    """

    rows: tuple[Row, ...]
    seed: int
    versions: dict[str, str]
    hardware: dict[str, Any]
    seconds: dict[str, FiniteFloat]
    paired: tuple[Paired, ...] = ()

    def row(self, name: str) -> Row | None:
        """The row of that name, or None where the run has none."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def reference(self) -> Row | None:
        """What sizes are compared with: the teacher or, without one, the full-precision student."""
        return self.row("teacher") or self.row("student")

    @property
    def metrics(self) -> list[str]:
        """The metrics that any row has, the one that speaks for the task first."""
        return [metric for metric in METRICS if any(metric in row.scores for row in self.rows)]

    def ratio_to_teacher(self, row: Row) -> float | None:
        """How many times smaller than the teacher `row` is on disk; None without a teacher."""
        teacher = self.row("teacher")
        return teacher.bytes / row.bytes if teacher and row.bytes else None

    def times_smaller(self, row: Row) -> float | None:
        """How many times smaller than the reference `row` is on disk; None without one."""
        return self.reference.bytes / row.bytes if self.reference and row.bytes else None

    def to_json(self) -> str:
        """The text of results.json: the same results give the same bytes."""
        document = asdict(self)
        for record, row in zip(document["rows"], self.rows):
            record["ratio_to_teacher"] = self.ratio_to_teacher(row)
        if not self.paired:
            del document["paired"]
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`; keys it does not know are passed over.

        Raises DataError: not JSON, or a field missing or of the wrong type, which is named.
        """
        try:
            return TypeAdapter(cls).validate_json(text, strict=True)
        except ValidationError as error:
            found = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'text'}: {e['msg']}" for e in error.errors()[:5])
            raise DataError(
                f"results: expected what a run writes into results.json, found {found}; run it again"
            ) from None

    def save(self, path: Path) -> None:
        """Write results.json: the old file or the new one is there at any moment, never a part of one."""
        write_atomically(path, self.to_json().encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises DataError as `from_json` does, OSError where there is no file."""
        return cls.from_json(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Part:
    """A part of the compressed file: all weights of one kind, or what lies around the weights.

    `values`: how many numbers it stores, None where it holds no weights; `content`: bytes by what they are.
    """

    name: str
    values: int | None
    content: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.content.values())


def by_kind(sizes: Sizes) -> tuple[Part, ...]:
    """The parts of a compressed file, largest first; their bytes add up to the file's, `sizes.total`."""
    kinds = sorted({tensor.kind for tensor in sizes.tensors})
    coding = {tensor.method for tensor in sizes.tensors if tensor.codes}
    codes = _apportion(sizes.stream, {k: sum(t.codes for t in sizes.tensors if t.kind == k) for k in kinds})
    around = _present({"tables": sizes.tables, "index": sizes.index, "header": sizes.header})
    parts = [Part("tables, index, header", None, around)]
    for kind in kinds:
        tensors = [t for t in sizes.tensors if t.kind == kind]
        content = {
            "codes": codes[kind],
            "scales, other arrays": sum(t.arrays for t in tensors if t.method in coding),
            "not coded": sum(t.arrays for t in tensors if t.method not in coding),
        }
        parts.append(Part(kind, sum(t.weights for t in tensors), _present(content)))
    return tuple(sorted(parts, key=lambda part: -part.bytes))


def _present(content: dict[str, int]) -> dict[str, int]:
    return {what: size for what, size in content.items() if size}


def _apportion(total: int, weights: dict[str, float]) -> dict[str, int]:
    """Whole numbers that add up to `total`, in proportion to `weights`, the last one taking what is left."""
    every = sum(weights.values()) or 1.0
    shares, before = dict.fromkeys(weights, 0), 0.0
    for name, weight in weights.items():
        shares[name] = round(total * (before + weight) / every) - round(total * before / every)
        before += weight
    if shares:
        shares[name] += total - sum(shares.values())
    return shares


@dataclass(frozen=True)
class Sample:
    """One row of the test split as the compressed student answers it.

    `score` is 0 … 100, higher is better: the sentence's chrF, or the probability given to the right label.
    """

    source: str
    reference: str
    output: str
    score: float


@dataclass(frozen=True)
class DataFacts:
    """What was found while the data was read. `rows`: split → rows used, the training split first.

    `overlap`: rows of the test split that the training split holds too; `left_out`: training pairs dropped as
    too long; None: not counted. `local`: read from a folder, so that a revision on the Hub was not checked.
    """

    rows: dict[str, int]
    overlap: int | None = None
    left_out: int | None = None
    local: bool = False


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of correct / n, in percent. Raises DataError: n < 1, or correct not in 0 … n."""
    if n < 1 or not 0 <= correct <= n:
        raise DataError(f"accuracy: expected 0 ≤ correct ≤ n and n ≥ 1, found {correct} of {n}; check the test split")
    z = 1.959963984540054
    p = correct / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    # at 0 and n the bound is 0 or 1 exactly, which rounding may overstep
    return 100 * (low if correct else 0.0), 100 * (high if correct < n else 1.0)


BYTES_IN = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def readable_bytes(count: int) -> str:
    """Three significant digits in decimal units: 999 B, 12.3 kB, 4.57 MB, 123 MB."""
    unit = next((unit for unit, size in BYTES_IN.items() if count < 999.5 * size), "GB")
    size = count / BYTES_IN[unit]
    digits = 0 if unit == "B" or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:.{digits}f} {unit}"
