"""The two tasks: what translation and image classification need that the other does not."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from hfcompress.crops import ResizedCrops
from hfcompress.data import Splits, is_local, label_names, load_images, load_translation, overlap
from hfcompress.errors import ResumeError
from hfcompress.evaluate import Progress, score_images, score_translation
from hfcompress.files import write_atomically
from hfcompress.networks import classifier, from_pretrained, tokenizer_of, translator
from hfcompress.pictures import Pictures
from hfcompress.results import DataFacts, Sample, Score
from hfcompress.schema import Augmentation, ImageData, Network, Recipe, TranslationData
from hfcompress.teacher import check_vocabularies
from hfcompress.tokenizer import encode_pairs, train_tokenizer
from hfcompress.trainer import CompressionMixin, CompressionTrainer, Seq2SeqCompressionTrainer
from hfcompress.trimming import trim_model, trim_tokenizer

logger = logging.getLogger(__name__)


class Task(ABC):
    """A recipe's data and networks. `prepare` loads and encodes; the rest may be called after it."""

    trainer: type[CompressionMixin]
    arguments: type[TrainingArguments]
    splits: Splits

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
        self.splits = load_translation(data, data_root)

    def prepare(self, folder: Path) -> DataFacts:
        self.tokenizer = self._trimmed(self._tokenizer(folder), folder / "trimmed")
        self.train = encode_pairs(self.splits.train, self.tokenizer, self.data, truncate=False)
        self.validation = encode_pairs(self.splits.validation, self.tokenizer, self.data, truncate=True)
        left_out = len(self.splits.train) - len(self.train)
        return DataFacts(_rows(self.splits), overlap(self.splits), left_out, is_local(self.data, self.data_root))

    def _tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        first = self.recipe.first
        if self.recipe.vocabulary is None:
            return from_pretrained(AutoTokenizer, tokenizer_of(first), first.revision)
        settings, wanted = folder / "settings", json.dumps(data_settings(self.recipe), sort_keys=True)
        if not settings.is_file():
            train_tokenizer(self.splits.train, self.data, self.recipe.vocabulary, folder)
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
        self.train = encode_pairs(pairs, self.tokenizer, self.data, truncate=False)

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
        self.splits = splits or load_images(data, data_root)
        self._pictures: dict[str, Pictures] = {}

    def prepare(self, folder: Path) -> DataFacts:
        return DataFacts(_rows(self.splits), local=is_local(self.data, self.data_root))

    def build(self, network: Network, teacher: PreTrainedModel | None) -> PreTrainedModel:
        return classifier(network, self.data, label_names(self.splits), self.data_root, self.recipe.seed)

    def trainer_arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        processor = TimmWrapperImageProcessor(model.config.pretrained_cfg, model.config.architecture)
        seed, wanted = self.recipe.seed, self.data.augmentation
        cut = ResizedCrops(self.splits.train, processor, seed) if wanted.resized_crop else None
        return {
            "train_dataset": AugmentedImages(cut or self._read("train", processor), wanted, seed),
            "eval_dataset": self._read("validation", processor),
            "data_collator": _collate,
            "compute_metrics": _accuracy,
        }

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


class AugmentedImages(torch.utils.data.Dataset[dict[str, Any]]):
    """Training images, cropped and mirrored by draws that depend on (seed, epoch, row) alone.

    So a run resumed in the middle of an epoch sees what the uninterrupted one saw; `set_epoch` says which epoch it is.
    """

    def __init__(self, rows: Any, augmentation: Augmentation, seed: int) -> None:
        self.rows, self.augmentation, self.seed, self.epoch = rows, augmentation, seed, 0
        self._drawn: tuple[int, np.ndarray] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if isinstance(self.rows, ResizedCrops):
            self.rows.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows in one go, as torch's DataLoader asks for them."""
        together = isinstance(self.rows, (Pictures, ResizedCrops))
        found = self.rows.__getitems__(rows) if together else [self.rows[row] for row in rows]
        if not (self.augmentation.crop_padding or self.augmentation.flip):
            return found
        images = self._augment(torch.stack([item["pixel_values"] for item in found]), rows)
        return [{**item, "pixel_values": image} for item, image in zip(found, images.unbind())]

    def _augment(self, images: Tensor, rows: Sequence[int]) -> Tensor:
        top, left, mirrored = torch.from_numpy(self._draws()[:, list(rows)])
        padding, (height, width) = self.augmentation.crop_padding, images.shape[-2:]
        columns = torch.arange(width).expand(len(rows), -1)
        if self.augmentation.flip:
            columns = torch.where(mirrored[:, None] == 1, columns.flip(-1), columns)
        images = torch.nn.functional.pad(images, (padding,) * 4)
        y, x = top[:, None] + torch.arange(height), left[:, None] + columns
        every = torch.arange(len(rows))[:, None, None, None]
        channels = torch.arange(images.shape[1])[:, None, None]
        return images[every, channels, y[:, None, :, None], x[:, None, None, :]]

    def _draws(self) -> np.ndarray:
        """The window's top and left and whether it is mirrored, of every row in this epoch: [3, rows]."""
        if self._drawn is None or self._drawn[0] != self.epoch:
            generator, count = np.random.default_rng((self.seed, self.epoch)), len(self.rows)
            corners = generator.integers(0, 2 * self.augmentation.crop_padding + 1, (2, count))
            self._drawn = self.epoch, np.concatenate([corners, generator.integers(0, 2, (1, count))])
        return self._drawn[1]


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
    return {"data": asdict(data), "vocabulary": vocabulary, "seed": recipe.seed, **kept}


def _rows(splits: Splits) -> dict[str, int]:
    return {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)}


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
