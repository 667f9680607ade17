"""What `hfcompress compare` looks at: the networks of runs of translation recipes, each as two engines run it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from hfcompress.backends import Generate, converted_backend, converter, encode
from hfcompress.card_text import data_name
from hfcompress.comparison import CTRANSLATE2, TRANSFORMERS
from hfcompress.errors import ConfigError
from hfcompress.evaluate import weight_files
from hfcompress.measure import key_of
from hfcompress.networks import from_pretrained
from hfcompress.output import RECIPE, RESULTS, STAGES
from hfcompress.recipe import load
from hfcompress.results import Results, Row
from hfcompress.schema import Recipe, Sequences
from hfcompress.scoring import told_apart
from hfcompress.tasks import data_settings

Translate = Callable[[list[str]], list[str]]

_ROWS = ("hub", "config", "revision", "folder", "embedded", "test_rows")
"""Of a recipe's data, what decides which rows its test split has, beside its name."""


@dataclass(frozen=True)
class Side:
    """A network as an engine runs it. `folder` has its own files, `converted` those of CTranslate2.

    `key`: of its files; `student`: of the full-precision student's of its run.
    """

    test: str
    model: str
    engine: str
    folder: Path
    converted: Path | None
    parameters: int
    recipe: Recipe
    generation: GenerationConfig
    key: str
    student: str

    def translator(self, beams: int, threads: int = 0) -> Translate:
        """What translates sentences with so many beams."""
        settings = Sequences(beams=beams, n_best=1, max_new_tokens=self.recipe.evaluation.max_new_tokens)
        tokenizer = from_pretrained(AutoTokenizer, str(self.folder))
        if self.converted is not None:
            translate = converted_backend(self.converted, self.generation, tokenizer, settings, threads)
            return lambda sentences: [best for (best,) in translate(sentences)]
        model = from_pretrained(AutoModelForSeq2SeqLM, str(self.folder)).eval()
        generate = Generate(model, tokenizer, settings)
        return lambda sentences: [best for (best,) in generate(sentences, encode(model, tokenizer, sentences))]

    def files(self) -> list[Path]:
        """Of its weights."""
        return weight_files(self.folder) if self.converted is None else [self.converted / "model.bin"]


def sides_of(runs: Sequence[Path], root: Path) -> Iterator[Side]:
    """By test set and role. Each network by transformers, then by CTranslate2, for which it is converted in `root`.

    Raises ConfigError: a folder that is no finished run of a translation recipe, runs of different test sets that are
    called the same, CTranslate2 is not installed; DataError, FormatError: a network's files.
    """
    convert = converter()
    opened = [(run, *_open(run)) for run in dict.fromkeys(run.resolve() for run in runs)]
    for test in dict.fromkeys(_test(recipe) for _, recipe, _ in opened):
        own = [found for found in opened if _test(found[1]) == test]
        _check_alike(test, own)
        labels = _labels([run for run, _, _ in own])
        for role in ("teacher", "student", "compressed"):
            for place, (run, recipe, row, key) in enumerate(_networks(own, role)):
                title = f"{row.bits_per_weight:.2f} bits" if role == "compressed" else row.title
                several = place or (role == "compressed" and len(own) > 1)
                name = f"{title}, {labels[run]}" if several else title
                folder, converted = _folder(run, role), root / key
                model = from_pretrained(AutoModelForSeq2SeqLM, str(folder))
                list(convert(model, folder, converted, "int8", None))
                rest = row.parameters, recipe, model.generation_config, key, key_of(_folder(run, "student"), "", ())
                for engine, files in ((TRANSFORMERS, None), (CTRANSLATE2, converted)):
                    yield Side(test, name, engine, folder, files, *rest)


def _networks(runs: Sequence[tuple[Path, Recipe, Results]], role: str) -> Iterator[tuple[Path, Recipe, Row, str]]:
    """Those of that role, with the key of their files; one that several runs share comes once."""
    seen: set[str] = set()
    for run, recipe, results in runs:
        row = results.row(role)
        if row is not None and (key := key_of(_folder(run, role), "", ())) not in seen:
            seen.add(key)
            yield run, recipe, row, key


def _check_alike(test: str, runs: Sequence[tuple[Path, Recipe, Results]]) -> None:
    """Raises ConfigError: what the runs call by the same name are different rows."""
    first, *others = ((run, data_settings(recipe)["data"]) for run, recipe, _ in runs)
    for run, data in others:
        differing = [key for key in _ROWS if data.get(key) != first[1].get(key)]
        if differing:
            raise ConfigError(f"{first[0]} and {run} mean different rows by {test}: {', '.join(differing)} differ")


def _folder(run: Path, role: str) -> Path:
    return run / "student" if role == "compressed" else run / STAGES / role


def _labels(runs: Sequence[Path]) -> dict[Path, str]:
    """What tells the runs' folders apart, without what all of them end in (a sweep's `seed-0`)."""
    parts = {run: run.parts for run in runs}
    while len(runs) > 1 and len({own[-1] for own in parts.values()}) == 1:
        parts = {run: own[:-1] for run, own in parts.items()}
    short = {run: str(Path(*own)) for run, own in parts.items()}
    told = told_apart(list(short.values()))
    return {run: told[name] for run, name in short.items()}


def _open(run: Path) -> tuple[Recipe, Results]:
    if not (run / RESULTS).is_file() or not (run / RECIPE).is_file():
        raise ConfigError(f"{run} is no finished run: expected {RESULTS} and {RECIPE}, as `hfcompress run` leaves them")
    (recipe,) = load(run / RECIPE)
    if recipe.translation is None:
        raise ConfigError(f"{run} is a run of an image recipe; only translation is compared")
    if not _folder(run, "student").is_dir():
        raise ConfigError(f"{run} has lost {STAGES}/student, the full-precision student: run it again with --resume")
    return recipe, Results.load(run / RESULTS)


def _test(recipe: Recipe) -> str:
    data = recipe.translation
    assert data is not None
    return f"{data_name(recipe)} {data.source}→{data.target}, {data.test}"
