"""`hfcompress translate`, a teacher's translations for students to read, and `compare`, translators side by side."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer

from hfcompress.cli_files import console

commands = typer.Typer()


class Engine(StrEnum):
    """What translates."""

    TRANSFORMERS = "transformers"
    CTRANSLATE2 = "ctranslate2"


@commands.command()
def translate(
    model: Annotated[str, typer.Argument(help="The teacher: a folder, or a repository on the Hub.")],
    data: Annotated[Path, typer.Argument(help="A text file of one sentence a line, or a folder of pairs.")],
    output: Annotated[Path, typer.Option(help="Folder for the dataset; a run that was stopped goes on in it.")],
    source: Annotated[Optional[str], typer.Option(help="The pairs' column or ending of the source.")] = None,  # noqa: UP045
    target: Annotated[Optional[str], typer.Option(help="And of the reference.")] = None,  # noqa: UP045
    split: Annotated[str, typer.Option(help="Which split of the pairs.")] = "train",
    beams: Annotated[int, typer.Option(min=1)] = 5,
    n_best: Annotated[int, typer.Option(min=1, help="The nearest to the reference of so many is taken.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Sentences at a time.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows after which what was done is kept.")] = 2000,
    worst: Annotated[float, typer.Option(min=0, max=1, help="Share left out by cross-entropy.")] = 0.05,
    least_score: Annotated[float, typer.Option(help="Least mean log-probability of a token.")] = -5.0,
    length_ratio: Annotated[float, typer.Option(min=1, help="Times the usual ratio of lengths.")] = 3.0,
    least_bleu: Annotated[float, typer.Option(min=0, help="The teacher's on the first 100 pairs; 0: any.")] = 5.0,
    engine: Annotated[Engine, typer.Option(help="What translates.")] = Engine.TRANSFORMERS,
) -> None:
    """Let a teacher translate sentences for its students. Several processes: torchrun -m hfcompress translate ..."""
    from pydantic import ValidationError

    from hfcompress.errors import ConfigError
    from hfcompress.schema import Filters, Sequences

    try:
        filters = Filters(worst=worst, least_score=least_score, length_ratio=length_ratio)
        settings = Sequences(
            beams=beams,
            n_best=n_best,
            engine=engine.value,
            batch_size=batch,
            max_new_tokens=max_new_tokens,
            shard_rows=shard_rows,
            filters=filters,
        )
    except ValidationError as error:
        raise ConfigError("; ".join(_told(detail["loc"], detail["msg"]) for detail in error.errors())) from error

    from hfcompress.translate_command import run

    run(model, data, (source, target), split, settings, least_bleu, output, console())


@commands.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs of translation recipes.")],
    output: Annotated[Path, typer.Option(help="Folder for table.md, plot.png and comparison.json.")],
    data_root: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder that holds the recipes' data folders; without it they come from the Hub."),
    ] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beside greedy translation, with so many beams.")] = 4,
    batch: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(min=1, help="Sentences at a time, for the timing [default: 1, 32]", show_default=False),
    ] = None,
    sentences: Annotated[int, typer.Option(min=1, help="Of the test set, for the timing.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Of the timing.")] = 5,
) -> None:
    """Compare teachers, students and files of translation runs.

    Bytes, BLEU, chrF, and speed on one thread of the CPU; each as transformers runs it and as CTranslate2 does in
    int8. Translations are kept: called again, it only times.
    """
    from hfcompress.compare import compare as measured

    measured(
        runs,
        output,
        data_root,
        beams=beams,
        batches=batch or [1, 32],
        sentences=sentences,
        rounds=rounds,
        console=console(),
    )
    console().print(f"the table is in {output / 'table.md'}", markup=False, highlight=False)


def _told(place: tuple[int | str, ...], message: str) -> str:
    """The option that a field is set by, where the message names none."""
    option = f"--{str(place[-1]).replace('_', '-')}: " if place else ""
    return option + message.removeprefix("Value error, ")
