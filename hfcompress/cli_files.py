"""The commands about files: compress, inspect, verify, export, push. Nothing heavy is imported before one is used."""

import json
import os
import re
import shlex
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from hfcompress.errors import ConfigError

commands = typer.Typer()

CompressedFolder = Annotated[Path, typer.Argument(help="A folder that 'hfcompress run' or 'compress' has written.")]


class Form(StrEnum):
    """What a compressed model can be exported to."""

    DENSE = "dense"
    FP16 = "fp16"
    CTRANSLATE2 = "ctranslate2"
    ONNX = "onnx"


def console(stderr: bool = False) -> Console:
    """Wide where there is no terminal: a file of its output then holds whole names."""
    made = Console(stderr=stderr)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = 200
    return made


@commands.command()
def compress(
    model: Annotated[str, typer.Argument(help="A transformers or timm folder, or a repository on the Hub.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    bits: Annotated[
        Optional[float],  # noqa: UP045  (typer reads the annotation)
        typer.Option(help="Mean bits for each weight of a matrix or kernel [default: 4]"),
    ] = None,
    target_bytes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Size of the whole file instead, as in 10MB or 1500000."),
    ] = None,
    method: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Another method than the entropy-coded grid, as in uniform: docs/methods.md."),
    ] = None,
    rules: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A YAML file with a list 'rules' as in a recipe's 'compression'."),
    ] = None,
    revision: Annotated[Optional[str], typer.Option(help="Of a repository.")] = None,  # noqa: UP045
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files in the output folder.")] = False,
) -> None:
    """Compress any translation or image model. No data, no training; the output is checked after writing."""
    given = {"--bits": bits, "--target-bytes": target_bytes, "--method": method, "--rules": rules}
    used = {name for name, value in given.items() if value is not None}
    if len(used) > 1 and used != {"--bits", "--method"}:
        raise ConfigError(f"{' and '.join(sorted(used))} contradict each other: give one")
    if bits is not None and not 0 < bits <= 16:
        raise ConfigError(f"--bits must be above 0 and at most 16, found {bits:g}")
    size = None if target_bytes is None else bytes_of(target_bytes)
    _check_output(output, overwrite, model)
    command = ["hfcompress", "compress", model, "--output", output.name]
    command += [part for name, value in given.items() if value is not None for part in (name, str(value))]
    if revision is not None:
        command += ["--revision", revision]

    from hfcompress.compress_command import run

    run(model, output, bits, size, method, rules, revision, shlex.join(command), console(), console(stderr=True))


@commands.command()
def inspect(
    path: Annotated[Path, typer.Argument(exists=True, help="A compressed file, or a folder that holds one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show where a compressed file's bytes go. For every tensor: method, bits per weight, entropy, bytes, share."""
    from hfcompress.checkpoint import read, sizes
    from hfcompress.inspection import entropies, print_sizes, record
    from hfcompress.verify import file_at

    reader = read(file_at(path))
    found, entropy = sizes(reader), entropies(reader)
    if as_json:
        print(json.dumps(record(found, entropy), indent=1))
    else:
        print_sizes(found, entropy, console())


@commands.command()
def verify(
    path: Annotated[Path, typer.Argument(exists=True, help="A compressed file, or a folder that holds one.")],
) -> None:
    """Check that a compressed file is whole. Digests, every weight's decoding, tables, names against config.json."""
    from hfcompress.verify import verify as check

    for line in check(path):
        _say(console(), line)
    console().print("the file is good", style="bold green")


@commands.command()
def export(
    folder: CompressedFolder,
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    to: Annotated[Form, typer.Option(help="What to write.")],
    quantization: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of CTranslate2, which rounds once more: int8, float16, …"),
    ] = None,
    sentences: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A text file: its lines are translated both ways to compare."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files in the output folder.")] = False,
) -> None:
    """Write a compressed model for other programs. What was written is run and compared with the original."""
    if quantization is not None and to is not Form.CTRANSLATE2:
        raise ConfigError("--quantization is CTranslate2's: give it with --to ctranslate2")
    _check_output(output, overwrite, str(folder))

    from hfcompress.export import export as write

    for line in write(folder, output, to.value, quantization=quantization, sentences=sentences):
        _say(console(), line)


@commands.command()
def push(
    folder: CompressedFolder,
    repository: Annotated[str, typer.Argument(help="Its name on the Hub, as in me/my-model.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository has to be made.")] = False,
    revision: Annotated[str, typer.Option(help="Branch; made where there is none.")] = "main",
) -> None:
    """Upload a compressed folder to the Hub in one commit. The file and the card are checked first."""
    from hfcompress.hub import push as upload

    say = partial(_say, console(stderr=True))
    print(upload(folder, repository, private=private, revision=revision, say=say))


def _say(out: Console, line: str) -> None:
    """As it is, on one line however long."""
    out.print(line, highlight=False, soft_wrap=True, markup=False)


def bytes_of(text: str) -> int:
    """10MB, 1.5 MiB, 900k or a plain number. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMG]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"--target-bytes: expected a size as 10MB, 1.5GiB or 1500000, found '{text}'")
    return round(float(match[1]) * (1024 if match[3] else 1000) ** " kmg".index(match[2].lower() or " "))


def _check_output(output: Path, overwrite: bool, source: str) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file: give --output a folder")
    if output.resolve() == Path(source).resolve():
        raise ConfigError(f"--output {output} is the folder that is read: name another one")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ConfigError(f"{output} is not empty: name another folder, or replace its files with --overwrite")
