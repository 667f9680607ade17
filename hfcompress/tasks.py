"""The two tasks: what translation and image classification need that the other does not."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainingArguments,
    TimmWrapperImageProcessor,
    TrainingArguments,
)

from hfcompress import losses
from hfcompress.augmentation import AugmentedImages, StreamedImages
from hfcompress.crops import ResizedCrops
from hfcompress.data import Splits, is_local, label_names, load_images, load_translation, overlap, stamps
from hfcompress.errors import ResumeError
from hfcompress.evaluate import Progress, score_images, score_translation
from hfcompress.files import write_atomically
from hfcompress.networks import classifier, from_pretrained, tokenizer_of, translator
from hfcompress.passes import Passes, Pieces, Prepare
from hfcompress.pictures import Pictures
from hfcompress.results import DataFacts, Sample, Score
from hfcompress.schema import ImageData, Network, Recipe, Source, TranslationData
from hfcompress.sources import report_breaks
from hfcompress.streams import first_pairs, kept_in, stream_images, stream_translation
from hfcompress.teacher import check_vocabularies
from hfcompress.tokenizer import StreamedPairs, encode_pairs, train_tokenizer
from hfcompress.trainer import CompressionMixin, CompressionTrainer, Seq2SeqCompressionTrainer
from hfcompress.trimming import trim_model, trim_tokenizer

logger = logging.getLogger(__name__)

VOCABULARY_PAIRS = 500_000
"""So many first pairs of a stream, a million sentences, are what a vocabulary is trained on."""


class Task(ABC):
    """A recipe's data and networks. `prepare` loads and encodes; the rest may be called after it."""

    trainer: type[CompressionMixin]
    arguments: type[TrainingArguments]
    splits: Splits
    stream: Pieces | None = None
    """The training rows where they are streamed; then `splits.train` has only the first of them."""

    @abstractmethod
    def prepare(self, folder: Path) -> DataFacts:
        """Load the splits, train or load what turns rows into tensors (kept in `folder`)."""

    @abstractmethod
    def build(self, network: Network, teacher: PreTrainedModel | None) -> PreTrainedModel:
        """A network of the recipe. Raises ConfigError, DataError, TeacherError."""

    @abstractmethod
    def trainer_arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        """Datasets, collator and metrics of the trainer of `model`."""

    @abstractmethod
    def save_processing(self, folder: Path) -> None:
        """The tokenizer beside a model's files; image processors are in config.json."""

    @abstractmethod
    def score(
        self, model: str, progress: Progress | None, split: str = "test"
    ) -> tuple[dict[str, Score], list[Sample]]:
        """Scores of a folder on the split test or validation."""

    def rows(self, split: str) -> Dataset:
        """The split test or validation."""
        return self.splits.test if split == "test" else self.splits.validation


class Translation(Task):
    """Sentence pairs, a seq2seq network, BLEU and chrF."""

    trainer = Seq2SeqCompressionTrainer
    arguments = Seq2SeqTrainingArguments

    def __init__(self, recipe: Recipe, data: TranslationData, data_root: Path | None) -> None:
        self.recipe, self.data, self.data_root = recipe, data, data_root
        if data.streaming:
            streamed = stream_translation(data, data_root)
            self.splits, self.stream = streamed.splits, streamed.rows
        else:
            self.splits = load_translation(data, data_root)

    def prepare(self, folder: Path) -> DataFacts:
        self.tokenizer = self._trimmed(self._tokenizer(folder), folder / "trimmed")
        self.validation = encode_pairs(self.splits.validation, self.tokenizer, self.data, truncate=True)
        local = is_local(self.data, self.data_root)
        if self.stream is not None:
            self.train: Any = self._passes(self.stream)
            return DataFacts(_rows(self.splits, streamed=True), local=local)
        self.train = encode_pairs(self.splits.train, self.tokenizer, self.data, truncate=False)
        report_breaks("training pairs", chain(self.splits.train["source"], self.splits.train["target"]))
        left_out = len(self.splits.train) - len(self.train)
        return DataFacts(_rows(self.splits), overlap(self.splits), left_out, local)

    def _tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        first = self.recipe.first
        if self.recipe.vocabulary is None:
            return from_pretrained(AutoTokenizer, tokenizer_of(first), first.revision)
        settings, wanted = folder / "settings", json.dumps(data_settings(self.recipe), sort_keys=True)
        if not settings.is_file():
            train = self.splits.train if self.stream is None else first_pairs(self.stream, VOCABULARY_PAIRS)
            train_tokenizer(train, self.data, self.recipe.vocabulary, folder)
            write_atomically(settings, wanted.encode())  # last: it says that the rest is there
        elif settings.read_text(encoding="utf-8") != wanted:
            raise ResumeError(
                f"the vocabulary in {folder} was made with other settings: change them back, or start anew with "
                "--overwrite"
            )
        return AutoTokenizer.from_pretrained(folder)

    def _trimmed(self, whole: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
        """The tokenizer of all networks, as the student's `trim_vocabulary` wants it; `kept` are its ids of old."""
        self.kept: list[int] | None = None
        layers = self.recipe.student.from_teacher
        if layers is None or not layers.trim_vocabulary:
            return whole
        mark = folder / "kept.json"
        if not mark.is_file():
            train = self.splits.train
            _, kept = trim_tokenizer(whole, list(train["source"]), list(train["target"]), folder)
            write_atomically(mark, json.dumps(kept).encode())  # last: it says that the rest is there
        self.kept = json.loads(mark.read_text(encoding="utf-8"))
        logger.warning("The vocabulary keeps %d of %d tokens (trim_vocabulary).", len(self.kept), len(whole))
        return AutoTokenizer.from_pretrained(folder)

    def build(self, network: Network, teacher: PreTrainedModel | None) -> PreTrainedModel:
        if network.pretrained is not None and network is not self.recipe.first:
            own = from_pretrained(AutoTokenizer, network.pretrained, network.revision)
            check_vocabularies(self.tokenizer, own)
        model = translator(network, self.tokenizer, self.data.max_length, self.recipe.seed, teacher)
        return trim_model(model, self.kept) if network.pretrained is not None and self.kept is not None else model

    def trainer_arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        return {
            "train_dataset": self.train,
            "eval_dataset": self.validation,
            "data_collator": DataCollatorForSeq2Seq(self.tokenizer, model=model),
            "processing_class": self.tokenizer,
        }

    def train_on(self, pairs: Dataset) -> None:
        """Let students be trained on these pairs (columns source and target) from now on."""
        if self.stream is not None:
            self.train = self._passes(Pieces.of(pairs))
        else:
            self.train = encode_pairs(pairs, self.tokenizer, self.data, truncate=False)

    def sentences(self, folder: Path) -> Dataset:
        """All training pairs, to be translated; those of a stream are kept in `folder`."""
        return self.splits.train if self.stream is None else kept_in(folder, self.stream)

    def _passes(self, rows: Pieces) -> Passes:
        return passes(rows, StreamedPairs(self.tokenizer, self.data.max_length), self.recipe.seed, self.data)

    def save_processing(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def score(
        self, model: str, progress: Progress | None, split: str = "test"
    ) -> tuple[dict[str, Score], list[Sample]]:
        return score_translation(model, self.rows(split), self.recipe.evaluation, progress)


class Images(Task):
    """Labelled images, a timm network, accuracy."""

    trainer = CompressionTrainer
    arguments = TrainingArguments

    def __init__(self, recipe: Recipe, data: ImageData, data_root: Path | None, splits: Splits | None = None) -> None:
        """splits: in place of those that `data` names."""
        self.recipe, self.data, self.data_root = recipe, data, data_root
        if data.streaming:
            streamed = stream_images(data, data_root, splits)
            self.splits, self.stream = streamed.splits, streamed.rows
        else:
            self.splits = splits or load_images(data, data_root)
        self._pictures: dict[str, Pictures] = {}

    def prepare(self, folder: Path) -> DataFacts:
        return DataFacts(_rows(self.splits, streamed=self.data.streaming), local=is_local(self.data, self.data_root))

    def build(self, network: Network, teacher: PreTrainedModel | None) -> PreTrainedModel:
        return classifier(network, self.data, label_names(self.splits), self.data_root, self.recipe.seed)

    def trainer_arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        processor = TimmWrapperImageProcessor(model.config.pretrained_cfg, model.config.architecture)
        return {
            "train_dataset": self._train(processor),
            "eval_dataset": self._read("validation", processor),
            "data_collator": _collate,
            "compute_metrics": _accuracy,
        }

    def _train(self, processor: TimmWrapperImageProcessor) -> Passes | AugmentedImages:
        seed, wanted = self.recipe.seed, self.data.augmentation
        if self.stream is not None:
            return passes(self.stream, StreamedImages(processor, wanted), seed, self.data)
        cut = ResizedCrops(self.splits.train, processor, seed) if wanted.resized_crop else None
        return AugmentedImages(cut or self._read("train", processor), wanted, seed)

    def _read(self, split: str, processor: TimmWrapperImageProcessor) -> Pictures:
        """A split as a network's processor prepares it, for all stages whose networks see images alike."""
        key = f"{split} {processor.data_config}"
        if key not in self._pictures:
            self._pictures[key] = Pictures(getattr(self.splits, split), processor)
        return self._pictures[key]

    def save_processing(self, folder: Path) -> None:
        """Nothing: config.json holds what the image processor needs."""

    def score(
        self, model: str, progress: Progress | None, split: str = "test"
    ) -> tuple[dict[str, Score], list[Sample]]:
        return score_images(model, self.rows(split), self.recipe.evaluation, progress, split)


def passes(rows: Pieces, prepare: Prepare, seed: int, data: Source) -> Passes:
    """This process' part of a stream, prepared while it is trained on."""
    state = PartialState()
    process = {"process": state.process_index, "processes": state.num_processes}
    return Passes(rows, prepare, seed=seed, buffer=data.shuffle_buffer, **process)


def task_of(recipe: Recipe, data_root: Path | None) -> Task:
    """The recipe's task, its splits loaded. Raises DataError."""
    if recipe.translation is not None:
        return Translation(recipe, recipe.translation, data_root)
    assert recipe.images is not None
    return Images(recipe, recipe.images, data_root)


def data_settings(recipe: Recipe) -> dict[str, Any]:
    """What of the recipe decides the tensors that networks are trained on."""
    data = recipe.translation or recipe.images
    assert data is not None
    vocabulary = asdict(recipe.vocabulary) if recipe.vocabulary else None
    trimmed = recipe.student.from_teacher is not None and recipe.student.from_teacher.trim_vocabulary
    kept = {"trim_vocabulary": True} if trimmed else {}
    # so that what was made before these keys were there is still found
    usual = {"streaming": False, "shuffle_buffer": 10_000, "validation_rows": None}
    said = {key: value for key, value in asdict(data).items() if key not in usual or value != usual[key]}
    return {"data": said, "vocabulary": vocabulary, "seed": recipe.seed, **kept}


def scoring_settings(recipe: Recipe, data_root: Path | None) -> dict[str, Any]:
    """What decides the scores of a file, but for machine and versions."""
    data = recipe.translation or recipe.images
    assert data is not None
    evaluation = asdict(recipe.evaluation)
    return {**data_settings(recipe), "evaluation": evaluation, "files": stamps(data, data_root)}


def _rows(splits: Splits, streamed: bool = False) -> dict[str, int]:
    counted = {} if streamed else {"train": len(splits.train)}
    return {**counted, "validation": len(splits.validation), "test": len(splits.test)}


def _collate(rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def _accuracy(prediction: Any) -> dict[str, float]:
    """In percent, over labels ≠ −100."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    counted = prediction.label_ids != losses.IGNORED
    return {"accuracy": 100 * float((logits.argmax(-1) == prediction.label_ids)[counted].mean())}
