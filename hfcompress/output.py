"""The output folder of a run: refused, claimed, or left as it was found."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from hfcompress.errors import ConfigError
from hfcompress.files import write_atomically

RESULTS, RECIPE, STAGES, VALIDATION = "results.json", "recipe.yaml", "stages", "validation.json"
MARKER = "stage.json"
"""In a stage's folder: it is finished."""


class Output:
    """A folder for one run. resume: go on with the run that is in it; overwrite: delete that; with neither, refuse it.

    reuse_from: other runs' folders that are to be read. Nothing is touched before `claim`. Raises ConfigError.
    """

    def __init__(self, path: Path, *, resume: bool, overwrite: bool, reuse_from: Sequence[Path]) -> None:
        self.path, self.overwrite = path, overwrite
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file: give --output a folder")
        self.fresh = not path.exists() or not any(path.iterdir())
        self._check(resume)
        for source in reuse_from:
            self._check_source(source)

    def claim(self, recipe: str) -> None:
        """Make it this run's, on all processes; `recipe` is kept in it unless there is one from before."""
        PartialState().wait_for_everyone()  # until all have seen it as it was
        if PartialState().is_main_process:
            if self.overwrite:
                self._empty()
            if not (self.path / RECIPE).exists():
                self.keep(recipe)
        PartialState().wait_for_everyone()

    def keep(self, recipe: str) -> None:
        """Write recipe.yaml."""
        write_atomically(self.path / RECIPE, recipe.encode())

    def give_back(self) -> None:
        """Nothing was trained: a folder that was new is left empty, for the corrected command."""
        if self.fresh and PartialState().is_main_process:
            self._empty()

    def _empty(self) -> None:
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _check(self, resume: bool) -> None:
        if resume and self.overwrite:
            raise ConfigError("--resume and --overwrite contradict each other: give one")
        if self.fresh:
            return
        if not any((self.path / name).exists() for name in (STAGES, RECIPE, RESULTS)):
            raise ConfigError(f"{self.path} holds other files than a run's: name another folder with --output")
        if not resume and not self.overwrite:
            raise ConfigError(
                f"{self.path} already holds a run: go on with --resume, replace it with --overwrite, "
                "or name another folder with --output"
            )

    def _check_source(self, source: Path) -> None:
        if not (source / STAGES).is_dir():
            raise ConfigError(f"--reuse {source}: there is no run in it (no folder '{STAGES}')")
        if self.overwrite and source.resolve() == self.path.resolve():
            raise ConfigError(f"--overwrite would delete the run that --reuse {source} is to take over")
