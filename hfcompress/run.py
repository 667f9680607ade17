"""A recipe from data to compressed student, scored from its file in a fresh process.

teacher ──▶ student ──▶ post_training          stages/…: each trained once, resumed or reused
    └─────▶ compressed ──▶ student/            the file, config.json, tokenizer, README.md, pictures
             all four ──▶ `hfcompress evaluate` in a new process ──▶ results.json
"""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import PreTrainedModel

from hfcompress import checkpoint, report
from hfcompress.card import write_card
from hfcompress.compressor import Compressor
from hfcompress.errors import HFCompressError
from hfcompress.evaluate import int8_gzip_bytes, weight_bytes
from hfcompress.loading import load as load_model
from hfcompress.networks import parameters
from hfcompress.output import RECIPE, RESULTS, STAGES, Output
from hfcompress.progress import quiet_libraries
from hfcompress.recipe import SHIPPED, dump, load
from hfcompress.results import DataFacts, Results, Row, Sample, Score, by_kind
from hfcompress.schema import Network, Recipe
from hfcompress.stages import MARKER, Stage, fingerprint, finished, reuse, train, training_arguments
from hfcompress.tasks import Task, data_settings, task_of
from hfcompress.teacher import check


class Run:
    """One recipe in one output folder.

    resume: go on with what is there; overwrite: delete it first; with neither, a folder that holds a run is refused.
    reuse_from: another run's folder, whose stages are taken over where they were made with the same settings.
    Nothing in the output folder is touched before the data has been read. Raises ConfigError, DataError, TeacherError,
    ResumeError, Interrupted.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        *,
        data_root: Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
        reuse_from: Path | None = None,
        command: str = "hfcompress run",
        console: Console | None = None,
    ) -> None:
        self.recipe, self.output, self.data_root = recipe, output, data_root
        self.reuse_from, self.command = reuse_from, command
        self.console = console or Console()
        # said outright: without a GPU it would take each of several processes for the only one
        cpu = recipe.training.get("use_cpu", not torch.accelerator.is_available())
        self.main = PartialState(cpu=cpu).is_main_process
        self.folder = Output(output, resume=resume, overwrite=overwrite, reuse_from=reuse_from)

    def run(self) -> Results:
        """All stages, scores, results.json, pictures and the card; prints the table."""
        self._say(f"{self.recipe.name}: {self.recipe.description}".rstrip(": "), style="bold")
        task = task_of(self.recipe, self.data_root)
        self.folder.claim(dump(self.recipe))
        facts = self._begin(task)
        stages = self._stages(task)
        PartialState().wait_for_everyone()
        if not self.main:
            return Results((), self.recipe.seed, {}, {}, {})
        self.folder.keep(dump(self.recipe))  # resumed, it may score or describe otherwise than before
        results, samples = self._score(stages)
        self._publish(results, samples, stages, facts)
        report.print_table(results, self.console)
        self._say(f"the compressed student, its card and its pictures are in {self.output / 'student'}")
        return results

    def _begin(self, task: Task) -> DataFacts:
        """Vocabulary and tensors; then whether networks, rules and settings are possible, before any is trained."""
        try:
            with PartialState().main_process_first():
                facts = task.prepare(self.output / STAGES / "vocabulary")
            self._rehearse(task)
        except HFCompressError:
            self.folder.give_back()
            raise
        return facts

    def _rehearse(self, task: Task) -> None:
        recipe = self.recipe
        for name, network in (("teacher", recipe.teacher), ("student", recipe.student), ("compressed", self._twin())):
            training_arguments(name, task, self.output, self._settings(network))
        done = finished("teacher", self.output / STAGES / "teacher", self._fingerprint())
        teacher = load_model(done.folder) if done is not None else task.build(recipe.teacher, None)
        student = task.build(recipe.student, teacher)
        check(teacher, student)
        Compressor(student, recipe.compression.rules, rate_weight=recipe.compression.rate_weight)

    def _stages(self, task: Task) -> dict[str, Stage]:
        recipe = self.recipe
        wanted = self._fingerprint()
        teacher = self._stage("teacher", task, wanted, recipe.teacher, lambda: task.build(recipe.teacher, None), {})

        def start() -> PreTrainedModel:
            """The student before any training; the same for both twins."""
            return task.build(recipe.student, load_model(teacher.folder))

        distilled = {"distillation": recipe.distillation}
        wanted = fingerprint(teacher.fingerprint, asdict(recipe.student), asdict(recipe.distillation))
        student = self._stage("student", task, wanted, recipe.student, start, distilled, teacher)
        wanted = fingerprint(student.fingerprint, _rules(recipe))
        post = self._post_training(task, wanted, student)
        wanted = fingerprint(student.fingerprint, _rules(recipe), asdict(recipe.compression, dict_factory=_plain))
        begin = (lambda: load_model(student.folder)) if recipe.compression.warm_start else start
        extra = {**distilled, "compression": recipe.compression}
        compressed = self._stage("compressed", task, wanted, self._twin(), begin, extra, teacher)
        return {"teacher": teacher, "student": student, "post_training": post, "compressed": compressed}

    def _fingerprint(self) -> str:
        """Of the teacher, and so of all that follows from it."""
        return fingerprint(data_settings(self.recipe), asdict(self.recipe.teacher), self.recipe.training)

    def _twin(self) -> Network:
        """The student as it is trained compressed."""
        training = {**(self.recipe.student.training or {}), **(self.recipe.compression.training or {})}
        return Network(**{**vars(self.recipe.student), "training": training})

    def _settings(self, network: Network) -> dict[str, Any]:
        return {**self.recipe.training, **(network.training or {}), "seed": self.recipe.seed}

    def _stage(
        self,
        name: str,
        task: Task,
        wanted: str,
        network: Network,
        build: Callable[[], PreTrainedModel],
        extra: dict[str, Any],
        teacher: Stage | None = None,
    ) -> Stage:
        folder = self.output / STAGES / name
        found = finished(name, folder, wanted)
        if found is None and self.reuse_from is not None:
            found = reuse(name, self.reuse_from / STAGES / name, folder, wanted)
        if found is not None:
            self._say(f"{name}: done before")
            return found
        model = build()

        def save(trainer: Any) -> None:
            if trainer.compressor is not None:
                trainer.save_compressed(folder)
            else:
                trainer.model.save_pretrained(folder)
            task.save_processing(folder)

        if network.training is None and name == "teacher":
            return self._as_it_is(name, folder, wanted, model, task)
        if teacher is not None:
            extra = {**extra, "teacher": load_model(teacher.folder)}
        self._say(f"{name}: training {parameters(model):,} parameters")
        return train(name, folder, wanted, task, model, self._settings(network), save, **extra)

    def _as_it_is(self, name: str, folder: Path, wanted: str, model: PreTrainedModel, task: Task) -> Stage:
        if self.main:
            model.save_pretrained(folder)
            task.save_processing(folder)
        return self._mark(name, folder, wanted)

    def _post_training(self, task: Task, wanted: str, student: Stage) -> Stage:
        """The trained full-precision student, compressed as it is: the baseline."""
        folder = self.output / STAGES / "post_training"
        found = finished("post_training", folder, wanted)
        if found is not None:
            return found
        if self.main:
            model = load_model(student.folder)
            checkpoint.save(model, folder, Compressor(model, self.recipe.compression.rules))
            task.save_processing(folder)
        return self._mark("post_training", folder, wanted)

    def _mark(self, name: str, folder: Path, wanted: str) -> Stage:
        """A stage that took no training."""
        stage = Stage(name, folder, wanted, 0.0, [])
        if self.main:
            stage.mark()
        PartialState().wait_for_everyone()
        return stage

    def _score(self, stages: dict[str, Stage]) -> tuple[Results, list[Sample]]:
        """Every stage's folder, scored by a fresh process that has only the files."""
        path = self.output / STAGES / "scores.json"
        folders = [str(stage.folder) for stage in stages.values()]
        options = ["--recipe", str(self.output / RECIPE), "--json", str(path)]
        root = ["--data-root", str(self.data_root)] if self.data_root else []
        self._say("scoring the files in a fresh process")
        done = subprocess.run([sys.executable, "-m", "hfcompress", "evaluate", *folders, *options, *root], check=False)
        if done.returncode:
            raise HFCompressError(f"scoring failed (exit code {done.returncode}); what it said stands above")
        scored = json.loads(path.read_text(encoding="utf-8"))
        rows: list[Row] = []
        for name, stage in stages.items():
            rows.append(_row(name, stage, rows, scored[str(stage.folder)]["scores"]))
        seconds = {name: round(stage.seconds, 1) for name, stage in stages.items()}
        results = Results(tuple(rows), self.recipe.seed, report.versions(), report.hardware(), seconds)
        samples = [Sample(**s) for s in scored[str(stages["compressed"].folder)]["samples"]]
        return results, samples

    def _publish(self, results: Results, samples: Sequence[Sample], stages: dict[str, Stage], facts: DataFacts) -> None:
        folder = self.output / "student"
        ignored = shutil.ignore_patterns(MARKER, "checkpoints")
        shutil.copytree(stages["compressed"].folder, folder, dirs_exist_ok=True, ignore=ignored)
        parts = by_kind(checkpoint.sizes(checkpoint.read(folder)))
        curves = {name: stage.history for name, stage in stages.items() if stage.history}
        report.plot_training(curves, folder / "training.png")
        teacher, compressed = results.row("teacher"), results.row("compressed")
        assert teacher is not None and compressed is not None
        yardsticks = {"teacher": teacher.bytes, "this student in int8 + gzip": compressed.int8_gzip_bytes}
        report.plot_sizes(parts, folder / "sizes.png", yardsticks)
        results.save(self.output / RESULTS)
        write_card(
            folder,
            self.recipe,
            results,
            parts,
            samples,
            self.command,
            recipe_text=dump(self.recipe),
            data=facts,
        )

    def _say(self, text: str, style: str | None = None) -> None:
        if self.main:
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def run_file(
    path: Path,
    output: Path | None,
    overrides: Sequence[str] = (),
    data_root: Path | None = None,
    reuse_from: Path | None = None,
    **options: Any,
) -> list[Results]:
    """Run every recipe of a file: one into `output` itself, several into folders of it by their names."""
    quiet_libraries()
    recipes = load(path, overrides)

    def place(base: Path, recipe: Recipe) -> Path:
        return base if len(recipes) == 1 else base / recipe.name

    options = {**options, "data_root": data_root, "command": _command(path, overrides, data_root)}
    runs = [
        Run(
            recipe,
            place(output or Path("runs") / path.stem, recipe),
            reuse_from=place(reuse_from, recipe) if reuse_from else None,
            **options,
        )
        for recipe in recipes
    ]
    return [run.run() for run in runs]


def _command(path: Path, overrides: Sequence[str], data_root: Path | None) -> str:
    """What reproduces a run, for its card: no folder of this machine is named."""
    shipped = path.resolve().is_relative_to(SHIPPED)
    name = Path("recipes") / path.resolve().relative_to(SHIPPED) if shipped else Path(path.name)
    root = ["--data-root", "FOLDER"] if data_root else []
    return shlex.join(["hfcompress", "run", name.as_posix(), *overrides, *root])


def _row(name: str, stage: Stage, before: Sequence[Row], scores: dict[str, Any]) -> Row:
    model, size = load_model(stage.folder), weight_bytes(stage.folder)
    count = parameters(model)
    # the yardstick of every student is the full-precision one: weights on a grid would gzip better
    twin = next((row for row in before if row.name == "student"), None)
    int8_gzip = int8_gzip_bytes(model) if twin is None else twin.int8_gzip_bytes
    found = {metric: Score(**{**s, "interval": tuple(s["interval"])}) for metric, s in scores.items()}
    return Row(name, count, size, 8 * size / count, int8_gzip, found)  # type: ignore[arg-type]


def _rules(recipe: Recipe) -> list[Any]:
    return [[r.pattern, [k.value for k in r.kinds], repr(r.method)] for r in recipe.compression.rules]


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {k: v for k, v in items if k != "rules"}
