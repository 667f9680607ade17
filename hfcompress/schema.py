"""What a recipe may say: frozen dataclasses, checked by pydantic; `recipe.py` reads them from YAML.

A recipe is one task (translation or image classification) run through four stages:

    teacher ──▶ student (full precision) ──▶ post_training (the student's weights, compressed as they are)
        └─────▶ compressed (the same student, trained with compressed weights)

With `teacher: null` there is no distillation: the student is trained on the labels alone, and is the reference.
"""

import json
from dataclasses import field
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    model_validator,
)
from pydantic.dataclasses import dataclass

from hfcompress.errors import ConfigError
from hfcompress.methods import BY_NAME
from hfcompress.reparameterization import Kind, Reparameterization
from hfcompress.schema_data import STRICT, ImageData, TranslationData, Vocabulary
from hfcompress.schema_data import Augmentation as Augmentation  # for those who import the schema
from hfcompress.schema_data import Source as Source
from hfcompress.target import Target

Scalar = bool | int | float | str | None
_Chosen = Annotated[int, Field(ge=1)] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
TrainingSettings = dict[str, Any]  # any field of transformers' (Seq2Seq)TrainingArguments, by its own name


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Layers:
    """A student cut from its teacher, with its weights: layers, units of feed-forward layers, tokens.

    Layers are so many, evenly spaced, or those whose indices are listed. `trim_vocabulary` leaves teacher and student
    the tokens that the training data needs.
    """

    encoder_layers: _Chosen
    decoder_layers: _Chosen
    ffn_dim: int | None = Field(default=None, ge=1)  # null: the teacher's
    trim_vocabulary: bool = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Network:
    """A network: pretrained (Hub id or folder), from scratch (`marian` or `timm`), or cut from the teacher."""

    pretrained: str | None = None
    revision: str | None = None
    marian: dict[str, Scalar] | None = None  # fields of MarianConfig
    timm: str | None = None  # a timm architecture
    arguments: dict[str, Any] = field(default_factory=dict)  # of timm.create_model
    weights: str | None = None  # a safetensors file of timm weights, under --data-root
    from_teacher: Layers | None = None
    training: TrainingSettings | None = None  # null: used as it is

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [k for k in ("pretrained", "marian", "timm", "from_teacher") if getattr(self, k) is not None]
        if len(kinds) != 1:
            raise ValueError(f"give exactly one of pretrained, marian, timm, from_teacher; found {kinds or 'none'}")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Filters:
    """Which of the teacher's translations are left out, besides empty ones, copies and those in another script."""

    length_ratio: float = Field(default=3.0, gt=1)  # this many times more or less than is usual in the corpus
    least_score: float = -5.0  # mean log-probability of a token under the teacher, in nats
    worst: float = Field(default=0.05, ge=0, lt=1)  # this share of what is left, by cross-entropy under the teacher


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sequences:
    """The teacher's translations of the training sources, on which students are trained in place of the references.

    Of the `n_best` by beam search that one is taken which is nearest the reference by chrF.
    """

    beams: int = Field(default=5, ge=1)
    n_best: int = Field(default=5, ge=1)
    engine: Literal["transformers", "ctranslate2"] = "transformers"
    batch_size: int = Field(default=64, ge=1)
    max_new_tokens: int = Field(default=128, ge=1)
    shard_rows: int = Field(default=2000, ge=1)
    monolingual: str | None = None  # more sources: a text file under --data-root, one sentence a line
    keep_pairs: bool = False  # train on the references too
    filters: Filters = field(default_factory=Filters)

    @model_validator(mode="after")
    def _of_the_beam(self) -> Self:
        if self.n_best > self.beams:
            raise ValueError(f"n_best {self.n_best} of {self.beams} beams: there are no more than beams")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Distillation:
    """loss = soft · T² · KL(teacher ‖ student) at temperature T + hard · cross-entropy (Polino et al. 2018, §2)."""

    soft: float = Field(default=0.7, ge=0)
    hard: float = Field(default=0.3, ge=0)
    temperature: float = Field(default=2.0, gt=0)
    sequences: Sequences | None = None
    cache: int | None = Field(default=None, ge=1)  # ask the teacher once, keep so many classes a token
    least_bleu: float = Field(default=5.0, ge=0)  # the teacher's, on 100 validation pairs; 0: any


def _own_refusals_too(fields: object, construct: ValidatorFunctionWrapHandler) -> object:
    """What a method's __post_init__ refuses joins what pydantic refuses."""
    try:
        return construct(fields)
    except ConfigError as error:
        raise ValueError(str(error)) from error


_by_name: dict[str, Any] = {
    name: (Annotated[method, WrapValidator(_own_refusals_too)], None) for name, method in BY_NAME.items()
}
_Methods = create_model("_Methods", __config__=STRICT, **_by_name)


def _read_method(value: object) -> object:
    """A method as it is, or from one method's name and its fields: {uniform: {bits: 4}}."""
    if isinstance(value, Reparameterization):
        return value
    given = _Methods.model_validate_json(json.dumps(value))
    names = sorted(given.model_fields_set)
    if len(names) != 1:
        raise ValueError(f"give exactly one of {', '.join(BY_NAME)}; found {' and '.join(names) or 'none'}")
    return getattr(given, names[0])


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Rule:
    """Weights whose name matches `pattern` (shell wildcards, any of a tied weight's names) and whose kind is listed."""

    method: Annotated[Reparameterization, BeforeValidator(_read_method)]
    pattern: str = "*"
    kinds: tuple[Kind, ...] = tuple(Kind)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Compression:
    """Rules in order of precedence (first match wins) and how the compressed student is trained."""

    rules: tuple[Rule, ...] = Field(min_length=1)
    # start from the trained full-precision student instead of from its starting point
    warm_start: bool = False
    # distil from the trained full-precision student, in place of the teacher or without one
    taught_by_twin: bool = False
    rate_weight: float = Field(default=0.0, ge=0)  # weight of the rate (bits per parameter of the model) in the loss
    target: Target | None = None  # the size or sparsity for which the rate's weight is found
    training: TrainingSettings | None = None  # on top of the student's; null: exactly the student's

    @model_validator(mode="after")
    def _one_wish(self) -> Self:
        if self.rate_weight and self.target is not None:
            raise ValueError("'target' finds the rate's weight itself: leave out 'target' or 'rate_weight'")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Evaluation:
    """How scores are taken."""

    batch_size: int = Field(default=64, ge=1)
    beams: int = Field(default=1, ge=1)
    max_new_tokens: int = Field(default=128, ge=1)
    bootstrap: int = Field(default=1000, ge=0)  # resamples for BLEU's interval


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Card:
    """What the model card cannot learn from the run."""

    license: str | None = None
    dataset_name: str | None = None
    limits: str = ""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """One task from data to compressed student. Exactly one of `translation` and `images` holds the data."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # a folder's name, and a prefix of overrides
    description: str = ""
    seed: int = Field(default=0, ge=0)
    translation: TranslationData | None = None
    images: ImageData | None = None
    vocabulary: Vocabulary | None = None
    teacher: Network | None
    student: Network
    distillation: Distillation = field(default_factory=Distillation)
    compression: Compression
    training: TrainingSettings = field(default_factory=dict)  # for every stage; a stage's own settings win
    evaluation: Evaluation = field(default_factory=Evaluation)
    card: Card = field(default_factory=Card)

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        if (self.translation is None) == (self.images is None):
            raise ValueError("give exactly one of 'translation' and 'images'")
        on_disk = self.distillation.sequences is not None or self.distillation.cache is not None
        if on_disk and (self.images is not None or self.teacher is None):
            raise ValueError("distillation's 'sequences' and 'cache' are for a translation recipe with a teacher")
        if self.teacher is None and self.student.from_teacher is not None:
            raise ValueError("a student cut 'from_teacher' needs a teacher")
        if self.teacher is not None and self.teacher.from_teacher is not None:
            raise ValueError("the teacher cannot be cut 'from_teacher'")
        if (self.first.marian is not None) != (self.vocabulary is not None):
            role = "student" if self.teacher is None else "teacher"
            raise ValueError(f"a 'marian' {role} from scratch needs a 'vocabulary' section, and only it may have one")
        return self

    @property
    def first(self) -> Network:
        """The network that is there first, whose vocabulary holds for all: the teacher or, without one, the student."""
        return self.teacher or self.student
