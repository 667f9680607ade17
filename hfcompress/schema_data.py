"""What a recipe may say about its data: where the rows are, what is in them, and how training reads them."""

from dataclasses import field
from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Source:
    """Where rows come from: shipped with a package, on the Hub, or a local folder of the Hub's layout.

    `hub` and `folder` may both be given: the folder is read when `--data-root` is, the Hub otherwise.
    """

    embedded: Literal["digits", "cldr"] | None = None
    hub: str | None = None
    config: str | None = None  # of a Hub dataset that has several
    revision: str | None = None
    hub_splits: dict[str, str] = field(default_factory=dict)  # split as named below → its name on the Hub
    folder: str | None = None
    train: str = "train"
    validation: str | None = "validation"
    test: str = "test"
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)  # held out of train where validation is null
    train_rows: int | None = Field(default=None, ge=1)  # so many, spread evenly over the split; of a stream the first
    validation_rows: int | None = Field(default=None, ge=1)
    test_rows: int | None = Field(default=None, ge=1)
    # read the training split as it is trained on, in place of loading it whole; needs training's max_steps
    streaming: bool = False
    shuffle_buffer: int = Field(default=10_000, ge=1)  # a stream's next row is drawn from so many, in each process

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.embedded) == bool(self.hub or self.folder):
            raise ValueError("give either 'embedded', or 'hub' and/or 'folder'")
        if (self.validation is None) == (self.validation_fraction == 0) and not self.embedded:
            raise ValueError(
                "give either 'validation' (a split's name) or 'validation_fraction' with 'validation: null'"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TranslationData(Source):
    """Sentence pairs. `column` holds {language: sentence}; null when the languages are columns themselves."""

    source: str
    target: str
    column: str | None = "translation"
    # tokens, end of sentence included; longer training pairs are left out
    max_length: int = Field(default=128, ge=2)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Augmentation:
    """Of training images: a part of any size, scaled, as for ImageNet; a crop after padding by `crop_padding` pixels on
    each side, as for CIFAR-10; a mirror image half the time."""

    resized_crop: bool = False
    crop_padding: int = Field(default=0, ge=0)
    flip: bool = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageData(Source):
    """Labelled images, scaled to `size` pixels and normalised by `mean` and `std` per channel."""

    image: str = "image"
    label: str = "label"
    size: int = Field(ge=1)
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Vocabulary:
    """A joint SentencePiece vocabulary trained on both sides of the training split."""

    size: int = Field(ge=16)
    model: Literal["unigram", "bpe"] = "unigram"
