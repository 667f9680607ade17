"""The `hfcompress` command. Nothing heavy is imported before a command needs it.

Exit codes: 0 done, 2 the user's input is wrong, 3 a compressed file is corrupt, 130 interrupted, 1 anything else.
"""

import json
import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from hfcompress.cli_files import commands
from hfcompress.cli_files import console as _console
from hfcompress.cli_translate import commands as translating
from hfcompress.errors import HFCompressError

_INTERRUPTED = "interrupted: the same command with --resume goes on from what was committed before"


class _Commands(TyperGroup):
    """Turns the package's errors into one message without a traceback, and into the exit code."""

    def invoke(self, ctx: Any) -> Any:
        errors = Console(stderr=True, soft_wrap=True)
        try:
            return super().invoke(ctx)
        except HFCompressError as error:
            if os.environ.get("HFCOMPRESS_DEBUG"):
                raise
            errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            errors.print(_INTERRUPTED, highlight=False)
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Commands,
    name="hfcompress",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # what is wrong with a command line is then one line too
)
recipes_app = typer.Typer(help="Recipes that come with the package.", invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(commands)
app.add_typer(translating)

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe file, or the name of one that 'hfcompress recipes' lists.")
]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer reads the annotation)
    typer.Argument(help="section.key=value, as in teacher.training.num_train_epochs=3", show_default=False),
]
DataRoot = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Folder that holds the recipe's data folders; without it they come from the Hub."),
]


_DRY = "Build everything and take two steps of each training, on random images where data is not there; keep nothing."


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"hfcompress {version('hfcompress')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compress small translation and image models while they train."""


class Split(StrEnum):
    """The splits that models are scored on."""

    TEST = "test"
    VALIDATION = "validation"


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Annotated[Optional[Path], typer.Option(help="Output folder [default: runs/NAME]")] = None,  # noqa: UP045
    data_root: DataRoot = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run in the output folder first.")] = False,
    reuse: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="Another run's folder: take over its stages made with the same settings."),
    ] = None,
    validation: Annotated[
        bool, typer.Option("--validation", help="Score on the validation split too, into validation.json.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=_DRY)] = False,
) -> None:
    """Train a teacher and a compressed student. Its file is scored; results and model card are written."""
    from hfcompress.recipe import find, load

    path = find(recipe)  # before what takes seconds to import

    if dry_run:
        from hfcompress.dry_run import dry_run as rehearse

        for checked in load(path, overrides or ()):
            rehearse(checked, data_root, _console())
        return

    from hfcompress.run import run_file

    run_file(
        path,
        output,
        overrides or (),
        data_root=data_root,
        resume=resume,
        overwrite=overwrite,
        reuse_from=reuse or (),
        validation=validation,
        console=_console(),
    )


@app.command()
def sweep(
    sweep: Annotated[str, typer.Argument(help="A sweep file, or the name of one that 'hfcompress recipes' lists.")],
    overrides: Overrides = None,
    output: Annotated[Optional[Path], typer.Option(help="Output folder [default: sweeps/NAME]")] = None,  # noqa: UP045
    data_root: DataRoot = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in the output folder.")] = False,
    only: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Run only the points of this name; * and ? match anything."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many runs at once.")] = 1,
    report: Annotated[bool, typer.Option("--report", help="Run nothing: write the table of what is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=_DRY)] = False,
) -> None:
    """Run a grid of recipes. Bytes and scores of all seeds are written into a table, and a plot."""
    from hfcompress.recipe import find
    from hfcompress.sweep_schema import load_sweep

    path = find(sweep)
    plan = load_sweep(path, overrides or ())

    from hfcompress.sweep import run_sweep

    folder, command = output or Path("sweeps") / path.stem, (path, overrides or (), data_root)
    options = {"data_root": data_root, "resume": resume, "only": only or (), "jobs": jobs, "console": _console()}
    if run_sweep(plan, folder, command, report=report, dry_run=dry_run, **options):
        raise typer.Exit(1)


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub repositories, compressed or dense.")],
    recipe: Annotated[str, typer.Option(help="The recipe whose data and evaluation settings are used.")],
    name: Annotated[Optional[str], typer.Option(help="Which recipe, where the file holds several.")] = None,  # noqa: UP045
    data_root: DataRoot = None,
    split: Annotated[
        Optional[list[Split]],  # noqa: UP045
        typer.Option(help="Which of the recipe's splits to score on [default: test]", show_default=False),
    ] = None,
    changes: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="section.key=value of the recipe, as in evaluation.beams=1"),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write scores and outputs here.")] = None,
) -> None:
    """Score models on a recipe's test or validation split. They are loaded as plain transformers loads them.

    All are checked before the first is scored; what was scored is written even if a later one fails.
    """
    from hfcompress.recipe import find, load

    recipes = load(find(recipe), changes or [])  # before what takes seconds to import

    from hfcompress.files import write_atomically
    from hfcompress.scoring import score_all

    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
    splits = [of.value for of in split or [Split.TEST]]
    scored: dict[str, dict[str, Any]] = {}
    try:
        for scored in score_all(models, recipes, name, data_root, _console(stderr=True), splits):
            if json_path is not None:
                write_atomically(json_path, json.dumps(scored, ensure_ascii=False, indent=1).encode())
    finally:  # what was scored before an error is shown too
        if json_path is None and scored:
            _print_scores(scored)


def _print_scores(scored: dict[str, dict[str, Any]]) -> None:
    table = Table("model", "metric", "score", "95 % interval", "rows", "signature")
    for model, found in scored.items():
        every = [found["scores"], *found.get("also", {}).values()]
        for metric, s in ((metric, s) for scores in every for metric, s in scores.items()):
            low, high = s["interval"]
            table.add_row(
                escape(model), metric, f"{s['value']:.2f}", f"{low:.2f} – {high:.2f}", str(s["n"]), s["signature"]
            )
    _console().print(table)


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the recipes that come with the package."""
    if context.invoked_subcommand is not None:
        return
    from hfcompress.recipe import available

    table = Table("recipe", "what it is")
    for entry in available():
        table.add_row(escape(entry.name), escape(entry.description))
    _console().print(table)


@recipes_app.command()
def show(recipe: RecipeArgument) -> None:
    """Print a recipe."""
    from hfcompress.recipe import find

    print(find(recipe).read_text(encoding="utf-8"), end="")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="hfcompress")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
