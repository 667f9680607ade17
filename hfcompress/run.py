"""A recipe from data to compressed student, scored from its file in a fresh process.

teacher ──▶ student ──▶ post_training          stages/…: each trained once, resumed or reused
    └─────▶ compressed ──▶ student/            the file, config.json, tokenizer, README.md, pictures
             all four ──▶ `hfcompress evaluate` in a new process ──▶ results.json
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from hfcompress import checkpoint, report, teaching
from hfcompress.card import write_card
from hfcompress.compressor import Compressor
from hfcompress.errors import HFCompressError
from hfcompress.files import write_atomically
from hfcompress.loading import load as load_model
from hfcompress.measure import paired_tests, row_of, score_afresh
from hfcompress.networks import parameters
from hfcompress.output import MARKER, RECIPE, RESULTS, STAGES, VALIDATION, Output
from hfcompress.progress import quiet_libraries
from hfcompress.recipe import command_line, dump, load
from hfcompress.results import DataFacts, Results, Row, Sample, by_kind
from hfcompress.saving import dequantize
from hfcompress.schema import Network, Recipe
from hfcompress.stages import Stage, fingerprint, fingerprints, finished, found, slow_on, train, training_arguments
from hfcompress.students import cut_of
from hfcompress.tasks import Task, scoring_settings, task_of
from hfcompress.teacher import check
from hfcompress.teacher_cache import TeacherCache


class Run:
    """One recipe in one output folder.

    resume: go on with what is there; overwrite: delete it first; with neither, a folder that holds a run is refused.
    reuse_from: other runs' folders, whose stages are taken over where they were made with the same settings.
    validation: score on the validation split too, into validation.json (stage → metric → score).
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
        reuse_from: Sequence[Path] = (),
        validation: bool = False,
        command: str = "hfcompress run",
        console: Console | None = None,
    ) -> None:
        self.recipe, self.output, self.data_root = recipe, output, data_root
        self.reuse_from, self.command, self.wanted = reuse_from, command, fingerprints(recipe)
        self.validation, self.console = validation, console or Console()
        self._taught: nn.Module | TeacherCache | None = None
        # said outright: without a GPU it would take each of several processes for the only one
        cpu = recipe.training.get("use_cpu", not torch.accelerator.is_available())
        self.main = PartialState(cpu=cpu).is_main_process
        self.folder = Output(output, resume=resume, overwrite=overwrite, reuse_from=reuse_from)

    def run(self) -> Results:
        """All stages, scores, results.json, pictures and the card; prints the table."""
        self._say(f"{self.recipe.name}: {self.recipe.description}".rstrip(": "), style="bold")
        stages, facts = self.train(task_of(self.recipe, self.data_root))
        if not self.main:
            return Results((), self.recipe.seed, {}, {}, {})
        self.folder.keep(dump(self.recipe))  # resumed, it may score or describe otherwise than before
        results, samples = self._score(stages)
        self._publish(results, samples, stages, facts)
        report.print_table(results, self.console)
        self._say(f"the compressed student, its card and its pictures are in {self.output / 'student'}")
        return results

    def train(self, task: Task) -> tuple[dict[str, Stage], DataFacts]:
        """All stages, on the data of `task`; nothing is scored."""
        self.folder.claim(dump(self.recipe))
        facts = self._begin(task)
        stages = self._stages(task)
        PartialState().wait_for_everyone()
        return stages, facts

    def _begin(self, task: Task) -> DataFacts:
        """Vocabulary and tensors; then whether networks, rules and settings are possible, before any is trained."""
        try:
            with PartialState().main_process_first():
                facts = task.prepare(self.output / STAGES / "vocabulary")
            self._rehearse(task)
        except HFCompressError:
            self.folder.give_back()
            raise
        if facts.overlap:
            self._say(f"{facts.overlap:,} test rows are in the training split too: scores may be too high")
        return facts

    def _rehearse(self, task: Task) -> None:
        recipe = self.recipe
        teaching.foresee(recipe.distillation, self.data_root)
        networks = {"teacher": recipe.teacher, "student": recipe.student, "compressed": self._twin()}
        trained = {name: self._settings(network) for name, network in networks.items() if network is not None}
        arguments = [training_arguments(name, task, self.output, given) for name, given in trained.items()]
        for told in filter(None, dict.fromkeys(map(slow_on, arguments))):
            self._say(told)
        teacher = None
        if recipe.teacher is not None:
            done = finished("teacher", self.output / STAGES / "teacher", self.wanted["teacher"])
            teacher = load_model(done.folder) if done is not None else task.build(recipe.teacher, None)
        student = task.build(recipe.student, teacher)
        if teacher is not None:
            check(teacher, student)
        wish = recipe.compression
        Compressor(student, wish.rules, rate_weight=wish.rate_weight, target=wish.target)

    def _stages(self, task: Task) -> dict[str, Stage]:
        recipe = self.recipe
        network, teacher = recipe.teacher, None
        if network is not None:
            teacher = self._stage("teacher", task, network, lambda: task.build(network, None), {})

        def start() -> PreTrainedModel:
            """The student before any training; the same for both twins."""
            return task.build(recipe.student, load_model(teacher.folder) if teacher else None)

        extra: dict[str, Any] = {"distillation": recipe.distillation} if teacher else {}
        student = self._stage("student", task, recipe.student, start, extra, teacher)
        post = self._post_training(task, student)
        begin = (lambda: load_model(student.folder)) if recipe.compression.warm_start else start
        extra = {**extra, "compression": recipe.compression}
        twin = student if recipe.compression.taught_by_twin else None
        if twin is not None:
            extra = {**extra, "distillation": recipe.distillation}
        compressed = self._stage("compressed", task, self._twin(), begin, extra, teacher, twin)
        students = {"student": student, "post_training": post, "compressed": compressed}
        return {"teacher": teacher, **students} if teacher else students

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
        network: Network,
        build: Callable[[], PreTrainedModel],
        extra: dict[str, Any],
        teacher: Stage | None = None,
        twin: Stage | None = None,
    ) -> Stage:
        """The stage, trained unless it is there. What a teacher gives is the data's too, though a `twin` may teach."""
        folder, wanted = self.output / STAGES / name, self.wanted[name]
        if (before := self._found(name)) is not None:
            self._say(f"{name}: done before")
            return before
        model = build()

        def save(trainer: Any) -> None:
            if trainer.compressor is not None:
                trainer.save_compressed(folder)
            else:
                trainer.model.save_pretrained(folder)
            task.save_processing(folder)

        if self._used_as_it_is(name, network):
            return self._as_it_is(name, folder, model, task)
        if cut := cut_of(model):
            self._say(f"{name}: {cut}")
        taught = self._taught_by(teacher, task) if teacher is not None else None
        if twin is not None:
            taught = load_model(twin.folder)
        self._say(f"{name}: training {parameters(model):,} parameters")
        return train(name, folder, wanted, task, model, self._settings(network), save, teacher=taught, **extra)

    def _taught_by(self, teacher: Stage, task: Task) -> nn.Module | TeacherCache:
        """What students are trained with, asked for once; what other runs have had from the teacher is taken over."""
        if self._taught is None:
            place, shown = self.output / STAGES, self.console if self.main else None
            for name in teaching.FOLDERS:
                self._found(name)
            self._taught = teaching.prepare(self.recipe, task, teacher.folder, place, self.data_root, shown)
            for name in teaching.FOLDERS:
                if (place / name).is_dir():
                    self._mark(name)
        return self._taught

    def _found(self, name: str) -> Stage | None:
        others = [other / STAGES / name for other in self.reuse_from]
        return found(name, self.output / STAGES / name, self.wanted[name], others)

    def _used_as_it_is(self, name: str, network: Network) -> bool:
        """A teacher without settings for training; and a student that has weights, but neither those nor a teacher."""
        if network.training is not None:
            return False
        given = network.weights is not None or network.pretrained is not None
        return name == "teacher" or (name == "student" and self.recipe.teacher is None and given)

    def _as_it_is(self, name: str, folder: Path, model: PreTrainedModel, task: Task) -> Stage:
        if self.main:
            dequantize(model).save_pretrained(folder)  # a teacher may come from a compressed file
            task.save_processing(folder)
        return self._mark(name)

    def _post_training(self, task: Task, student: Stage) -> Stage:
        """The trained full-precision student, compressed as it is: the baseline."""
        if (before := self._found("post_training")) is not None:
            return before
        if self.main:
            folder, model = self.output / STAGES / "post_training", load_model(student.folder)
            checkpoint.save(model, folder, Compressor(model, self.recipe.compression.rules))
            task.save_processing(folder)
        return self._mark("post_training")

    def _mark(self, name: str) -> Stage:
        """A stage that took no training."""
        stage = Stage(name, self.output / STAGES / name, self.wanted[name], 0.0, [])
        if self.main:
            stage.mark()
        PartialState().wait_for_everyone()
        return stage

    def _score(self, stages: dict[str, Stage]) -> tuple[Results, list[Sample]]:
        """Every stage's folder, scored by a fresh process that has only the files."""
        self._say("scoring the files in a fresh process")
        folders = [stage.folder for stage in stages.values()]
        path, *known = (folder / STAGES / "scores.json" for folder in (self.output, *self.reuse_from))
        splits = ("test", "validation") if self.validation else ("test",)
        asked = scoring_settings(self.recipe, self.data_root), report.versions(), report.hardware()
        where = self.output / RECIPE, path, self.data_root
        scored = score_afresh(folders, *where, splits, settings=fingerprint(*asked), known=known)
        rows: list[Row] = []
        for name, stage in stages.items():
            rows.append(row_of(name, stage.folder, scored[str(stage.folder)]["scores"], rows))
        if self.validation:
            also = {name: scored[str(s.folder)]["also"]["validation"] for name, s in stages.items()}
            write_atomically(self.output / VALIDATION, json.dumps(also, indent=1).encode())
        seconds = {name: round(stage.seconds, 1) for name, stage in stages.items()}
        paired = paired_tests({n: scored[str(s.folder)] for n, s in stages.items()}, self.recipe.evaluation.bootstrap)
        results = Results(tuple(rows), self.recipe.seed, report.versions(), report.hardware(), seconds, paired)
        samples = [Sample(**s) for s in scored[str(stages["compressed"].folder)]["samples"]]
        return results, samples

    def _publish(self, results: Results, samples: Sequence[Sample], stages: dict[str, Stage], facts: DataFacts) -> None:
        folder = self.output / "student"
        source, ignored = stages["compressed"].folder, shutil.ignore_patterns(MARKER, "checkpoints")
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=ignored)
        parts = by_kind(checkpoint.sizes(checkpoint.read(folder)))
        report.plot_training({n: s.history for n, s in stages.items() if s.history}, folder / "training.png")
        report.plot_scores(results, folder / "scores.png")
        reference, compressed = results.reference, results.row("compressed")
        assert reference is not None and compressed is not None
        yardsticks = {reference.title: reference.bytes, "this student in int8 + gzip": compressed.int8_gzip_bytes}
        report.plot_sizes(parts, folder / "sizes.png", yardsticks)
        results.save(self.output / RESULTS)
        text = dump(self.recipe)
        write_card(folder, self.recipe, results, parts, samples, self.command, recipe_text=text, data=facts)

    def _say(self, text: str, style: str | None = None) -> None:
        if self.main:
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def run_file(
    path: Path,
    output: Path | None,
    overrides: Sequence[str] = (),
    data_root: Path | None = None,
    reuse_from: Sequence[Path] = (),
    **options: Any,
) -> list[Results]:
    """Run every recipe of a file: one into `output` itself, several into folders of it by their names."""
    quiet_libraries()
    recipes = load(path, overrides)

    def place(base: Path, recipe: Recipe) -> Path:
        return base if len(recipes) == 1 else base / recipe.name

    options = {**options, "data_root": data_root, "command": command_line("run", path, overrides, data_root)}
    output = output or Path("runs") / path.stem
    runs = [
        Run(recipe, place(output, recipe), reuse_from=[place(other, recipe) for other in reuse_from], **options)
        for recipe in recipes
    ]
    return [run.run() for run in runs]
