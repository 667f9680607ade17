"""The two tasks: what translation and image classification need that the other does not."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from hfcompress.data import Splits, is_local, label_names, load_images, load_translation, overlap, with_images
from hfcompress.errors import ResumeError
from hfcompress.evaluate import Progress, pixels, score_images, score_translation
from hfcompress.files import write_atomically
from hfcompress.networks import classifier, from_pretrained, tokenizer_of, translator
from hfcompress.results import DataFacts, Sample, Score
from hfcompress.schema import Augmentation, ImageData, Network, Recipe, TranslationData
from hfcompress.teacher import check_vocabularies
from hfcompress.tokenizer import encode_pairs, train_tokenizer
from hfcompress.trainer import CompressionMixin, CompressionTrainer, Seq2SeqCompressionTrainer


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
    def score(self, model: str, progress: Progress | None) -> tuple[dict[str, Score], list[Sample]]:
        """Scores of a folder on the test split."""


class Translation(Task):
    """Sentence pairs, a seq2seq network, BLEU and chrF."""

    trainer = Seq2SeqCompressionTrainer
    arguments = Seq2SeqTrainingArguments

    def __init__(self, recipe: Recipe, data: TranslationData, data_root: Path | None) -> None:
        self.recipe, self.data, self.data_root = recipe, data, data_root
        self.splits = load_translation(data, data_root)

    def prepare(self, folder: Path) -> DataFacts:
        self.tokenizer = self._tokenizer(folder)
        self.train = encode_pairs(self.splits.train, self.tokenizer, self.data, truncate=False)
        self.validation = encode_pairs(self.splits.validation, self.tokenizer, self.data, truncate=True)
        left_out = len(self.splits.train) - len(self.train)
        return DataFacts(_rows(self.splits), overlap(self.splits), left_out, is_local(self.data, self.data_root))

    def _tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        teacher = self.recipe.teacher
        if self.recipe.vocabulary is None:
            return from_pretrained(AutoTokenizer, tokenizer_of(teacher), teacher.revision)
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

    def build(self, network: Network, teacher: PreTrainedModel | None) -> PreTrainedModel:
        if network.pretrained is not None and network is not self.recipe.teacher:
            own = from_pretrained(AutoTokenizer, network.pretrained, network.revision)
            check_vocabularies(self.tokenizer, own)
        return translator(network, self.tokenizer, self.data.max_length, self.recipe.seed, teacher)

    def trainer_arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        return {
            "train_dataset": self.train,
            "eval_dataset": self.validation,
            "data_collator": DataCollatorForSeq2Seq(self.tokenizer, model=model),
            "processing_class": self.tokenizer,
        }

    def save_processing(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def score(self, model: str, progress: Progress | None) -> tuple[dict[str, Score], list[Sample]]:
        return score_translation(model, self.splits.test, self.recipe.evaluation, progress)


class Images(Task):
    """Labelled images, a timm network, accuracy."""

    trainer = CompressionTrainer
    arguments = TrainingArguments

    def __init__(self, recipe: Recipe, data: ImageData, data_root: Path | None) -> None:
        self.recipe, self.data, self.data_root = recipe, data, data_root
        self.splits = load_images(data, data_root)

    def prepare(self, folder: Path) -> DataFacts:
        return DataFacts(_rows(self.splits), local=is_local(self.data, self.data_root))

    def build(self, network: Network, teacher: PreTrainedModel | None) -> PreTrainedModel:
        return classifier(network, self.data, label_names(self.splits), self.data_root, self.recipe.seed)

    def trainer_arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        processor = TimmWrapperImageProcessor(model.config.pretrained_cfg, model.config.architecture)
        rows = {
            name: with_images(split, pixels(processor))
            for name, split in (("train", self.splits.train), ("validation", self.splits.validation))
        }
        return {
            "train_dataset": AugmentedImages(rows["train"], self.data.augmentation, self.recipe.seed),
            "eval_dataset": rows["validation"],
            "data_collator": _collate,
            "compute_metrics": _accuracy,
        }

    def save_processing(self, folder: Path) -> None:
        """Nothing: config.json holds what the image processor needs."""

    def score(self, model: str, progress: Progress | None) -> tuple[dict[str, Score], list[Sample]]:
        return score_images(model, self.splits.test, self.recipe.evaluation, progress)


class AugmentedImages(torch.utils.data.Dataset[dict[str, Any]]):
    """Training images, cropped and mirrored by draws that depend on (seed, epoch, row) alone.

    So a run resumed in the middle of an epoch sees what the uninterrupted one saw; `set_epoch` says which epoch it is.
    """

    def __init__(self, rows: Any, augmentation: Augmentation, seed: int) -> None:
        self.rows, self.augmentation, self.seed, self.epoch = rows, augmentation, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        item = self.rows[row]
        return {**item, "pixel_values": self._augment(item["pixel_values"], row)}

    def _augment(self, image: Tensor, row: int) -> Tensor:
        draw = np.random.default_rng((self.seed, self.epoch, row))
        padding = self.augmentation.crop_padding
        if padding:
            top, left = draw.integers(0, 2 * padding + 1, size=2)
            height, width = image.shape[-2:]
            image = torch.nn.functional.pad(image, (padding,) * 4)[:, top : top + height, left : left + width]
        return image.flip(-1) if self.augmentation.flip and draw.random() < 0.5 else image


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
    return {"data": asdict(data), "vocabulary": vocabulary, "seed": recipe.seed}


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
