"""Which of a teacher's translations students are not to see, and why."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from hfcompress.schema import Filters

Mask = NDArray[np.bool_]


def judge(
    sources: Sequence[str],
    targets: Sequence[str],
    references: Sequence[str | None],
    scores: Sequence[float],
    settings: Filters,
) -> list[str | None]:
    """For every translation the first filter that it fails, or None where it stays.

    scores: mean log-probability of a token under the teacher, in nats. What is usual in the corpus (its script, its
    ratio of lengths) is that of the references or, where there are none, of the translations themselves. `worst`: that
    share of what the other filters leave, by cross-entropy.
    """
    usual = [r for r in references if r] or list(targets)
    checks: list[tuple[str, Callable[[], Mask]]] = [
        ("empty", lambda: np.array([not target.strip() for target in targets], bool)),
        ("copy", lambda: _copies(sources, targets, references)),
        ("script", lambda: _foreign(targets, usual)),
        ("length ratio", lambda: _uneven(sources, targets, references, settings.length_ratio)),
        ("score", lambda: np.array(scores) < settings.least_score),
    ]
    reasons: list[str | None] = [None] * len(targets)
    for name, check in checks if targets else ():
        for i in np.flatnonzero(check()).tolist():
            reasons[i] = reasons[i] or name
    left = sorted((i for i, reason in enumerate(reasons) if reason is None), key=lambda i: (scores[i], i))
    for i in left[: int(len(left) * settings.worst)]:
        reasons[i] = "worst by cross-entropy"
    return reasons


def counts(reasons: Iterable[str | None]) -> dict[str, int]:
    """How many each filter took, and how many stay."""
    found = Counter("kept" if reason is None else reason for reason in reasons)
    names = ("empty", "copy", "script", "length ratio", "score", "worst by cross-entropy", "kept")
    return {name: found[name] for name in names}


def script(text: str) -> Counter[str]:
    """How many letters of each script: LATIN, CYRILLIC, CJK …, by the first words of Unicode's names."""
    return Counter(unicodedata.name(c, "unnamed").partition(" ")[0] for c in text if c.isalpha())


def _copies(sources: Sequence[str], targets: Sequence[str], references: Sequence[str | None]) -> Mask:
    """A source repeated, except where the reference repeats it too: names, numbers."""

    def same(a: str, b: str | None) -> bool:
        return b is not None and a.strip().casefold() == b.strip().casefold()

    return np.array([same(s, t) and not same(s, r) for s, t, r in zip(sources, targets, references)], bool)


def _foreign(targets: Sequence[str], usual: Sequence[str]) -> Mask:
    """Most letters of a script that makes up less than a tenth of the language."""
    corpus: Counter[str] = sum((script(text) for text in usual[:10_000]), Counter())
    known = {name for name, count in corpus.items() if count >= corpus.total() / 10}

    def foreign(text: str) -> bool:
        letters = script(text)
        return sum(letters[name] for name in known) < letters.total() / 2

    return np.array([foreign(text) for text in targets], bool)


def _uneven(sources: Sequence[str], targets: Sequence[str], references: Sequence[str | None], most: float) -> Mask:
    """Length over the source's more than `most` times the usual or less than a part of it; five letters are free."""

    def ratio(source: str, target: str) -> float:
        return (len(target) + 5) / (len(source) + 5)

    known = [ratio(s, r) for s, r in zip(sources, references) if r]
    usual = median(known or [ratio(s, t) for s, t in zip(sources, targets)])
    found = np.array([ratio(s, t) for s, t in zip(sources, targets)]) / usual
    return (found > most) | (found < 1 / most)
