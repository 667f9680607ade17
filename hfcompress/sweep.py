"""`hfcompress sweep`: every cell of a sweep as a run of its own, then the table and the plot.

cells ──▶ `hfcompress run --validation`     cells/POINT/seed-N: one folder each
      └── stages made with the same settings are taken over from cells that have them
all of them ──▶ results.json, table.md, plot.png     written after every cell: a stopped sweep has them too
"""

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from rich.console import Console

from hfcompress.errors import ConfigError, Interrupted
from hfcompress.files import write_atomically
from hfcompress.jobs import Job
from hfcompress.output import MARKER, RECIPE, RESULTS, STAGES, VALIDATION
from hfcompress.recipe import command_line, dump
from hfcompress.signals import stop_signals_call
from hfcompress.stages import fingerprints
from hfcompress.sweep_report import plot, write_table
from hfcompress.sweep_results import SweepResults, cell_folder, error_file, gather
from hfcompress.sweep_schema import Cell, Plan

_INTERRUPTED = 130
_RUN = (sys.executable, "-m", "hfcompress", "run")
_PAUSE = 0.1  # seconds between two looks at the cells that are running


class SweepRun:
    """A plan in an output folder. resume: go on with the sweep that is there; only: run the points whose names match.

    jobs: how many cells run at once. Raises ConfigError: the folder is taken, or `only` matches nothing.
    """

    def __init__(
        self,
        plan: Plan,
        output: Path,
        *,
        data_root: Path | None = None,
        resume: bool = False,
        only: Sequence[str] = (),
        jobs: int = 1,
        command: str = "hfcompress sweep",
        console: Console | None = None,
    ) -> None:
        self.plan, self.output, self.data_root, self.jobs = plan, output, data_root, jobs
        self.command, self.console = command, console or Console()
        if output.exists() and not output.is_dir():
            raise ConfigError(f"{output} is a file: give --output a folder")
        if not resume and output.is_dir() and any(output.iterdir()):
            raise ConfigError(f"{output} is not empty: go on with its sweep with --resume, or name another --output")
        self.chosen = [c for c in plan.cells if not only or any(fnmatchcase(c.point.name, p) for p in only)]
        if not self.chosen:
            names = ", ".join(dict.fromkeys(cell.point.name for cell in plan.cells))
            raise ConfigError(f"--only {' '.join(only)}: no point's name matches; there are {names}")
        self._signal = 0

    def run(self) -> SweepResults:
        """Run what is not done yet, and write the table. Raises Interrupted: a signal came; cells keep their work."""
        waiting = [cell for cell in self.chosen if not self._done(cell)]
        count = len(self.chosen)
        done = before = count - len(waiting)
        self._say(f"{self.plan.sweep.title}: {count} cells" + (f", {before} of them done before" if before else ""))
        running: list[tuple[Cell, Job]] = []
        with self._stopping_on_signals(running):
            while (waiting and not self._signal) or running:
                for cell in self._ready(waiting, [cell for cell, _ in running]):
                    waiting.remove(cell)
                    running.append((cell, self._begin(cell)))
                for cell, job in list(running):
                    if self._over(cell, job):
                        running.remove((cell, job))
                        self.report()
                        done += self._done(cell)
                        self._say(f"[{cell.name}] {done} of {count} cells")
                time.sleep(_PAUSE)
        results = self.report()
        if self._signal:
            raise Interrupted("stopped by a signal; all work was saved: run the same command with --resume")
        return self.told(results)

    def told(self, results: SweepResults) -> SweepResults:
        """The results, once it is said where their table is."""
        self._say(f"the table is in {self.output / 'table.md'}")
        return results

    def report(self) -> SweepResults:
        """Write results.json, table.md and plot.png of what is there now."""
        results = gather(self.plan, self.output)
        results.save(self.output / RESULTS)
        write_table(results, self.command, self.output / "table.md")
        plot(results, self.output / "plot.png")
        return results

    def rehearse(self) -> int:
        """Build every point's networks and take two steps of each of its trainings; nothing is kept.

        Returns how many points failed.
        """
        failed = 0
        first = {cell.point.name: cell for cell in reversed(self.chosen)}
        for cell in reversed(first.values()):
            write_atomically(self._recipe(cell), dump(cell.recipe).encode())
            job = self._job(cell, [*_RUN, str(self._recipe(cell)), "--dry-run", *self._root()])
            job.start()
            with self._stopping_on_signals([(cell, job)]):
                while (code := job.code()) is None:
                    time.sleep(_PAUSE)
            if self._signal:
                raise Interrupted("stopped by a signal")
            failed += code != 0
            if code:  # of the others the job itself says that they can be run
                self._say(f"[{cell.name}] {job.error(code)}")
        return failed

    # -- cells ------------------------------------------------------------------------------------------

    def _done(self, cell: Cell) -> bool:
        """Whether it was run to its end with these very settings."""
        place = cell_folder(cell, self.output)
        if error_file(cell, self.output).is_file() or not all((place / f).is_file() for f in (VALIDATION, RESULTS)):
            return False
        return (place / RECIPE).is_file() and (place / RECIPE).read_text(encoding="utf-8") == dump(cell.recipe)

    def _ready(self, waiting: list[Cell], running: list[Cell]) -> list[Cell]:
        """Cells that can be begun: none waits for a stage that another is about to make for it."""
        found: list[Cell] = []
        for cell in waiting if not self._signal else []:
            others = [*running, *found]
            if len(others) < self.jobs and not any(self._makes_for(other, cell) for other in others):
                found.append(cell)
        return found

    def _makes_for(self, other: Cell, cell: Cell) -> bool:
        mine, others = fingerprints(cell.recipe), fingerprints(other.recipe)
        place = cell_folder(other, self.output) / STAGES
        shared = ["student"] if cell.recipe.teacher is None else ["teacher", "student"]
        return any(mine[stage] == others[stage] and not (place / stage / MARKER).is_file() for stage in shared)

    def _begin(self, cell: Cell) -> Job:
        place = cell_folder(cell, self.output)
        error_file(cell, self.output).unlink(missing_ok=True)
        (place / RESULTS).unlink(missing_ok=True)
        write_atomically(self._recipe(cell), dump(cell.recipe).encode())
        others = [cell_folder(c, self.output) for c in self.plan.cells if c.seed == cell.seed and c is not cell]
        reuse = [option for other in others if (other / STAGES).is_dir() for option in ("--reuse", str(other))]
        resume = ["--resume"] if (place / RECIPE).is_file() else []
        options = ["--validation", "--output", str(place), *resume, *reuse, *self._root()]
        run = [*_RUN, str(self._recipe(cell)), *options]
        job = self._job(cell, run)
        self._say(f"[{cell.name}] begun" if not resume else f"[{cell.name}] resumed")
        job.start()
        return job

    def _over(self, cell: Cell, job: Job) -> bool:
        """Whether the cell has come to an end, which is then noted in its folder."""
        code = job.code()
        if code is None:
            return False
        if code and code != _INTERRUPTED and not self._signal:
            write_atomically(error_file(cell, self.output), (job.error(code) + "\n").encode())
            self._say(f"[{cell.name}] failed: {job.error(code)}")
        elif code == _INTERRUPTED:
            self._signal = self._signal or signal.SIGINT
        return True

    def _job(self, cell: Cell, command: list[str]) -> Job:
        log = self.output / "logs" / f"{cell.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        return Job(cell.name, command, log, self.console)

    def _recipe(self, cell: Cell) -> Path:
        return self.output / "recipes" / f"{cell.name}.yaml"

    def _root(self) -> list[str]:
        return ["--data-root", str(self.data_root)] if self.data_root else []

    @contextmanager
    def _stopping_on_signals(self, running: list[tuple[Cell, Job]]) -> Iterator[None]:
        """Within: SIGINT and SIGTERM stop the cells, which commit a checkpoint; nothing new is begun."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._signal = number
            for _, job in running:
                job.stop()

        try:
            with stop_signals_call(stop):
                yield
        finally:
            for _, job in running:  # none is left but where something went wrong here
                job.stop()

    def _say(self, text: str) -> None:
        self.console.print(text, style="bold", markup=False, highlight=False, soft_wrap=True)


def run_sweep(
    plan: Plan,
    output: Path,
    command: tuple[Path, Sequence[str], Path | None],
    *,
    report: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> int:
    """What `hfcompress sweep` does; how many cells (of a dry run: points) failed. `command`: as `_command` takes it."""
    if dry_run:
        with TemporaryDirectory() as folder:
            return SweepRun(plan, Path(folder), **{**options, "resume": False}).rehearse()
    options = {**options, "resume": options["resume"] or report, "command": command_line("sweep", *command)}
    made = SweepRun(plan, output, **options)
    return (made.told(made.report()) if report else made.run()).failed
