"""What a teacher does before students are trained: its check, its translations, what it says of every token."""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from rich.console import Console
from sacrebleu.metrics import BLEU
from torch import nn
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from hfcompress.backends import NO_CTRANSLATE2, Generate, ctranslate2_backend, encode
from hfcompress.data import overlap
from hfcompress.errors import ConfigError, TeacherError
from hfcompress.loading import load
from hfcompress.progress import bar
from hfcompress.schema import Distillation, Recipe, Sequences
from hfcompress.sources import read_lines, read_split, report_breaks
from hfcompress.tasks import Task, Translation
from hfcompress.teacher_cache import Process, TeacherCache, write
from hfcompress.translate import Text, finish, translate

logger = logging.getLogger(__name__)

FOLDERS = ("translations", "teacher_cache")
"""Of a run's stages: what a teacher was asked for, before any student."""
PAIRS = 100
"""So many pairs tell whether a teacher translates at all."""


def prepare(
    recipe: Recipe, task: Task, teacher: Path, stages: Path, data_root: Path | None, console: Console | None
) -> nn.Module | TeacherCache:
    """What students are trained with: the teacher of that folder, or its cache; `task` then has its translations.

    Shared out to all processes, kept in `stages`, resumed there. console: of the main process, for bars. Raises
    TeacherError: it is to translate, or is used as it is, and does not translate the first validation pairs.
    """
    model = load(teacher)
    wanted = recipe.distillation
    begun = any((stages / name).is_dir() for name in FOLDERS)
    if isinstance(task, Translation) and not begun and _must_translate(recipe):
        bleu = check_direction(model, task.tokenizer, task.splits.validation, wanted.least_bleu)
        if console is not None:
            console.print(f"teacher: BLEU {bleu:.1f} on the first validation pairs", highlight=False)
    if isinstance(task, Translation) and wanted.sequences is not None:
        train = task.sentences(stages / FOLDERS[0] / "sentences")
        texts = [Text("train", train["source"], train["target"])]
        if wanted.sequences.monolingual is not None:
            texts.append(monolingual((data_root or Path()) / wanted.sequences.monolingual))
            if found := overlap(task.splits, texts[-1].sources):
                said = "%d test sentences are in %s too: scores may be too high."
                logger.warning(said, found, texts[-1].origin)
        pairs = make_dataset(model, task.tokenizer, texts, wanted.sequences, stages / FOLDERS[0], console)
        pairs = pairs.select_columns(["source", "target"])
        own = train.select_columns(["source", "target"])
        task.train_on(concatenate_datasets([pairs, own]) if wanted.sequences.keep_pairs else pairs)
    if not isinstance(task, Translation) or wanted.cache is None:
        return model
    with Shown(console, "teacher's cache") as shown:
        model = model.to(PartialState().device)
        collator = DataCollatorForSeq2Seq(task.tokenizer, model=model)
        share = _share()
        folder = stages / FOLDERS[1]
        write(
            model,
            task.train,
            collator,
            folder,
            k=wanted.cache,
            temperature=wanted.temperature,
            process=share,
            progress=shown,
        )
    PartialState().wait_for_everyone()
    return TeacherCache(folder)


def _must_translate(recipe: Recipe) -> bool:
    """Whether the teacher's own translations are looked at first: students read them, or it was trained elsewhere."""
    wanted, network = recipe.distillation, recipe.teacher
    elsewhere = network is not None and network.training is None
    return wanted.least_bleu > 0 and (elsewhere or wanted.sequences is not None)


def foresee(wanted: Distillation, data_root: Path | None) -> None:
    """Whether what the teacher will be asked for can be done, before hours of training come to it.

    Raises ConfigError: a package is missing; DataError: a text that is to be translated cannot be read.
    """
    if wanted.sequences is None:
        return
    if wanted.sequences.engine == "ctranslate2" and importlib.util.find_spec("ctranslate2") is None:
        raise ConfigError(NO_CTRANSLATE2)
    if wanted.sequences.monolingual is not None:
        read_lines((data_root or Path()) / wanted.sequences.monolingual)


def make_dataset(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    settings: Sequences,
    folder: Path,
    console: Console | None = None,
) -> Dataset:
    """Translations of `texts`, filtered; the work is shared out to all processes of the launch."""
    backend = ctranslate2_backend(model, tokenizer, settings) if settings.engine == "ctranslate2" else None
    model = model.to(PartialState().device)
    with Shown(console, "translating") as shown:
        translate(model, tokenizer, texts, settings, folder, backend=backend, process=_share(), progress=shown)
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        finish(folder, settings)
    PartialState().wait_for_everyone()
    return read_split(folder, "train")


def check_direction(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, least: float) -> float:
    """The teacher's BLEU on the first 100 pairs of source and target. Raises TeacherError: it is under `least`."""
    pairs = pairs.select(range(min(PAIRS, len(pairs))))
    sources, references = list(pairs["source"]), list(pairs["target"])
    settings = Sequences(beams=1, n_best=1)
    model = model.to(PartialState().device).eval()
    backend, batches = Generate(model, tokenizer, settings), [sources[i : i + 25] for i in range(0, len(sources), 25)]
    found = [best[0] for batch in batches for best in backend(batch, encode(model, tokenizer, batch))]
    bleu, back, copied = (_bleu(*pair) for pair in ((found, references), (found, sources), (sources, references)))
    if bleu < least:
        hint = "they resemble the sources: is it a teacher of the other direction? " if back > max(bleu, least) else ""
        raise TeacherError(
            f"the teacher's translations of the first {len(sources)} pairs have BLEU {bleu:.1f}, under the least of "
            f"{least:g} (the sources themselves have {copied:.1f}); {hint}the first: {found[0]!r} for "
            f"{references[0]!r}. Take another teacher or tokenizer, or lower least_bleu"
        )
    return bleu


def monolingual(path: Path) -> Text:
    """The lines of a text file that are not blank. Raises DataError: it cannot be read, or is not UTF-8."""
    lines = read_lines(path)
    report_breaks(str(path), lines)
    full = [line for line in lines if line.strip()]
    if len(full) < len(lines):
        logger.warning("%s: left out %d of %d lines: they are blank.", path, len(lines) - len(full), len(lines))
    return Text(path.name, full)


class Shown:
    """A bar with what was done, and the tokens a second where they are told; nothing without a console."""

    def __init__(self, console: Console | None, title: str) -> None:
        self.console, self.title = console, title
        self.bar = bar(console) if console is not None else None
        self.note = ""

    def __enter__(self) -> "Shown":
        if self.bar is not None:
            self.bar.start()
            self.line = self.bar.add_task(self.title, total=None, note="")
        return self

    def __call__(self, done: int, total: int, speed: float | None = None) -> None:
        share = " of this process" if PartialState().num_processes > 1 else ""
        self.note = f"{done:,} of {total:,} rows{share}" + (f", {speed:,.0f} tokens/s" if speed else "")
        if self.bar is not None:
            self.bar.update(self.line, completed=done, total=total, note=f"{speed:,.0f} tokens/s" if speed else "")

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None and self.console is not None:
            self.bar.stop()
            if not self.console.is_terminal and self.note:
                self.console.print(f"{self.title}: {self.note}", markup=False, highlight=False)


def _share() -> Process:
    return Process(PartialState().process_index, PartialState().num_processes)


def _bleu(found: list[str], references: list[str]) -> float:
    return float(BLEU().corpus_score(found, [references]).score)
