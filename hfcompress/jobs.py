"""A command in a process of its own, watched from here."""

import os
import signal
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console


@dataclass
class Job:
    """A command; what it says goes to a log and to the console, each line after the job's name."""

    name: str
    command: list[str]
    log: Path
    console: Console
    process: subprocess.Popen[str] | None = None
    reader: threading.Thread | None = None
    said: list[str] = field(default_factory=list)  # the last lines

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C is for the sweep, which stops it once
        )
        self.reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self.reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with self.log.open("a", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                self.said = [*self.said[-50:], line.rstrip()]
                text = f"[{self.name}] {line.rstrip()}"
                self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def code(self) -> int | None:
        """The exit code; None as long as it runs."""
        assert self.process is not None and self.reader is not None
        found = self.process.poll()
        if found is not None:
            if found < 0:  # killed, which leaves what it had started itself: that holds the pipe open
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
            self.reader.join()
        return found

    def stop(self) -> None:
        """Have it stop: in a training with a checkpoint, elsewhere at once.

        By SIGTERM: the KeyboardInterrupt of a SIGINT is lost where a library on its way catches everything.
        """
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def error(self, code: int) -> str:
        """What was said last, as one line."""
        lines = [line for line in self.said if line.strip()]
        named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (named or lines or [f"exit code {code}, without a word"])[-1]
