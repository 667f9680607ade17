"""The `hfcompress` command. Nothing heavy is imported before a command needs it.

Exit codes: 0 done, 2 the user's input is wrong, 3 a compressed file is corrupt, 130 interrupted, 1 anything else.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from hfcompress.errors import HFCompressError

_INTERRUPTED = "interrupted: the same 'hfcompress run' with --resume goes on from what was committed before"


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
    help="Compress small translation and image models while they train.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # what is wrong with a command line is then one line too
)
recipes_app = typer.Typer(help="Recipes that come with the package.", invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")

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


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Annotated[Optional[Path], typer.Option(help="Output folder [default: runs/NAME]")] = None,  # noqa: UP045
    data_root: DataRoot = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run in the output folder first.")] = False,
    reuse: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Another run's folder: take over its stages made with the same settings."),
    ] = None,
) -> None:
    """Train a teacher and a compressed student. Its file is scored; results and model card are written."""
    from hfcompress.recipe import find

    path = find(recipe)  # before what takes seconds to import

    from hfcompress.run import run_file

    run_file(
        path,
        output,
        overrides or (),
        data_root=data_root,
        resume=resume,
        overwrite=overwrite,
        reuse_from=reuse,
        console=_console(),
    )


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub repositories, compressed or dense.")],
    recipe: Annotated[str, typer.Option(help="The recipe whose test split and evaluation settings are used.")],
    name: Annotated[Optional[str], typer.Option(help="Which recipe, where the file holds several.")] = None,  # noqa: UP045
    data_root: DataRoot = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write scores and outputs here.")] = None,
) -> None:
    """Score models on a recipe's test split. They are loaded as plain transformers loads them."""
    from hfcompress.recipe import find, load

    recipes = load(find(recipe))  # before what takes seconds to import

    from hfcompress.scoring import score_all

    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
    scored = score_all(models, recipes, name, data_root, _console(stderr=True))
    if json_path is not None:
        json_path.write_text(json.dumps(scored, ensure_ascii=False, indent=1), encoding="utf-8")
        return
    table = Table("model", "metric", "score", "95 % interval", "rows", "signature")
    for model, found in scored.items():
        for metric, s in found["scores"].items():
            low, high = s["interval"]
            table.add_row(
                escape(model), metric, f"{s['value']:.2f}", f"{low:.2f} – {high:.2f}", str(s["n"]), s["signature"]
            )
    _console().print(table)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(exists=True, help="A compressed file, or a folder that holds one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show where a compressed file's bytes go. For every tensor: shape, method, bits per weight, bytes, share."""
    from hfcompress.checkpoint import read, sizes
    from hfcompress.inspection import print_sizes, record

    found = sizes(read(path))
    if as_json:
        print(json.dumps(record(found), indent=1))
    else:
        print_sizes(found, _console())


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


def _console(stderr: bool = False) -> Console:
    """Wide where there is no terminal: a file of its output then holds whole names."""
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 200
    return console
