"""The `hfcompress` command in processes of its own, and what it leaves behind."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HFCOMPRESS = Path(sys.executable).with_name("hfcompress")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hfcompress.run", "hfcompress.scoring"])


@dataclass(frozen=True)
class Done:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one line that a wrong input is answered with."""
        assert self.code == 2, f"exit code {self.code}\n{self.err}"
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        return self.err


def installed(*arguments: object, program: tuple[str | Path, ...] = (HFCOMPRESS,)) -> Done:
    """The installed command, from the start."""
    done = subprocess.run(
        [*map(str, program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Done(done.returncode, done.stdout, done.stderr)


def hfcompress(said: Path, *arguments: object, **environment: str) -> Done:
    """The same in a process that has imported everything already; `said`: a folder for what it says."""
    files = said / "out", said / "err"
    process = start(files, *arguments, **environment)
    process.join(900)  # for machines that have other things to do
    assert process.exitcode is not None, "still running after a quarter of an hour"
    return Done(process.exitcode, *(file.read_text(encoding="utf-8") for file in files))


def start(files: tuple[Path, Path], *arguments: object, **environment: str):
    """As `hfcompress`, without waiting for its end."""
    given = files, [str(argument) for argument in arguments], environment
    process = PROCESSES.Process(target=_command, args=given)
    process.start()
    return process


def _command(files: tuple[Path, Path], arguments: list[str], environment: dict[str, str]) -> None:
    import torch

    from hfcompress import cli

    torch.set_num_threads(1)
    os.environ.pop("COLUMNS", None)  # set by readline, which pytest imports
    os.environ.update(environment)
    os.setpgrp()  # whoever kills it can kill what it has started too
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.exit(cli.main(arguments))


def tree(folder: Path) -> dict[str, str]:
    """Every file below: its path → the digest of what is in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
