"""Tiny networks and small real data for the tests that train: territories' names in two languages, digits."""

import os
import signal
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from babel import Locale
from sklearn.datasets import load_digits
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hfcompress import Compression, Rule, Uniform, zoo
from hfcompress.reparameterization import Kind
from hfcompress.results import DataFacts
from hfcompress.schema import Augmentation
from hfcompress.stages import Stage, train
from hfcompress.tasks import AugmentedImages, Task
from hfcompress.trainer import CompressionTrainer, Seq2SeqCompressionTrainer

WEIGHTS = (Kind.EMBEDDING, Kind.LINEAR, Kind.CONV)
EOS = 0


# ------------------------------------------------------------------------------------------- translation


@cache
def alphabet() -> str:
    return "".join(sorted({letter for pair in territories() for text in pair for letter in text}))


@cache
def territories() -> list[tuple[str, str]]:
    """German and English names of the territories of CLDR, in the order of their codes."""
    german, english = Locale("de").territories, Locale("en").territories
    return [(german[code], english[code]) for code in sorted(english) if len(code) == 2 and code in german]


def pad() -> int:
    return len(alphabet()) + 1


def names(first: int = 0, count: int = 32) -> list[dict[str, list[int]]]:
    """Pairs letter by letter, of ragged lengths."""
    return [
        {"input_ids": encode(german), "labels": encode(english)}
        for german, english in territories()[first : first + count]
    ]


def encode(text: str) -> list[int]:
    return [1 + alphabet().index(letter) for letter in text[:16]] + [EOS]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """As DataCollatorForSeq2Seq, without decoder_input_ids."""
    sources, targets = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
    ids = torch.nn.utils.rnn.pad_sequence(sources, batch_first=True, padding_value=pad())
    labels = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": ids.ne(pad()).long(), "labels": labels}


def with_decoder_inputs(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """As DataCollatorForSeq2Seq(model=...): what label smoothing of the stock trainer needs."""
    batch = collate(rows)
    shifted = batch["labels"].roll(1, dims=1).masked_fill(batch["labels"].roll(1, dims=1).eq(-100), pad())
    shifted[:, 0] = pad()
    return {**batch, "decoder_input_ids": shifted}


def marian(seed: int = 0, width: int = 16, layers: int = 1, dropout: float = 0.0, **settings) -> MarianMTModel:
    set_seed(seed)
    shared = {**_ids(), **_sizes(width, layers), "dropout": dropout, "scale_embedding": True, **settings}
    return MarianMTModel(MarianConfig(forced_eos_token_id=EOS, **shared))


def bart(seed: int = 0, width: int = 16, layers: int = 1, dropout: float = 0.0) -> BartForConditionalGeneration:
    set_seed(seed)
    config = BartConfig(forced_eos_token_id=EOS, bos_token_id=None, **_ids(), **_sizes(width, layers), dropout=dropout)
    return BartForConditionalGeneration(config)


def t5(seed: int = 0, width: int = 16, layers: int = 1, dropout: float = 0.0) -> T5ForConditionalGeneration:
    set_seed(seed)
    sizes = {"d_model": width, "d_ff": 2 * width, "d_kv": width // 2, "num_heads": 2, "num_layers": layers}
    return T5ForConditionalGeneration(T5Config(**_ids(), **sizes, dropout_rate=dropout))


SEQ2SEQ: dict[str, Callable[..., torch.nn.Module]] = {"marian": marian, "bart": bart, "t5": t5}


def _ids() -> dict[str, int]:
    return {
        "vocab_size": pad() + 1,
        "pad_token_id": pad(),
        "eos_token_id": EOS,
        "decoder_start_token_id": pad(),
    }


def _sizes(width: int, layers: int) -> dict[str, int]:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", layers), ("ffn_dim", 2 * width), ("attention_heads", 2))
    }
    return {"d_model": width, "max_position_embeddings": 32, **sides}


# ------------------------------------------------------------------------------------------------ images


@cache
def digits() -> list[dict[str, torch.Tensor]]:
    """scikit-learn's 8×8 digits, three equal channels."""
    data = load_digits()
    pixels = torch.from_numpy(data.images).float()[:, None].expand(-1, 3, -1, -1) / 8 - 1
    return [{"pixel_values": image, "labels": torch.tensor(int(y))} for image, y in zip(pixels, data.target)]


def resnet(seed: int = 0, **config) -> TimmWrapperForImageClassification:
    """CIFAR's ResNet-20 on 8×8 pixels."""
    return _timm("cifar_resnet20", seed, **config)


def vit(seed: int = 0) -> TimmWrapperForImageClassification:
    """Without batch norm: what it says of one image does not depend on the others."""
    return _timm("test_vit", seed, model_args={"img_size": 8, "patch_size": 4})


def _timm(architecture: str, seed: int, **config) -> TimmWrapperForImageClassification:
    zoo.register()
    set_seed(seed)
    cfg = {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0, "interpolation": "bicubic"}
    names = {i: f"digit {i}" for i in range(10)}
    given = {"pretrained_cfg": cfg, "id2label": names, "label2id": {v: k for k, v in names.items()}, **config}
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture=architecture, **given))


# ---------------------------------------------------------------------------------------------- training


def rules(bits: int = 4, bucket: int | None = 64, stochastic: bool = False) -> Compression:
    """Every matrix and filter on a uniform grid."""
    return Compression(rules=(Rule(method=Uniform(bits=bits, bucket=bucket, stochastic=stochastic), kinds=WEIGHTS),))


def arguments(folder, seq2seq: bool = False, **settings) -> TrainingArguments:
    given = {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "max_steps": 4,
        **settings,
    }
    return (Seq2SeqTrainingArguments if seq2seq else TrainingArguments)(**given)


def translation_trainer(folder, model=None, trainer=Seq2SeqCompressionTrainer, given=None, **settings):
    """On the first 32 names, evaluated on the next 16. given: further arguments of the trainer."""
    return trainer(
        model=model or marian(),
        args=arguments(folder, seq2seq=True, **settings),
        **{"train_dataset": names(), "eval_dataset": names(32, 16), "data_collator": collate, **(given or {})},
    )


def image_trainer(folder, model=None, trainer=CompressionTrainer, given=None, **settings):
    """On the first 64 digits, evaluated on the next 32."""
    return trainer(
        model=model or resnet(),
        args=arguments(folder, **settings),
        **{"train_dataset": digits()[:64], "eval_dataset": digits()[64:96], **(given or {})},
    )


class Digits(Task):
    """96 digits, cropped and mirrored: six steps of 16 an epoch on one process.

    pause: seconds that a step takes longer. interrupt_at: the step in which a SIGINT comes to this process.
    """

    arguments = TrainingArguments

    def __init__(self, pause: float = 0.0, interrupt_at: int | None = None) -> None:
        self.trainer = partial(EventfulTrainer, pause, interrupt_at)

    def prepare(self, folder: Path) -> DataFacts:
        return DataFacts({})

    def build(self, network, teacher):
        return resnet()

    def trainer_arguments(self, model):
        return {
            "train_dataset": AugmentedImages(digits()[:96], Augmentation(crop_padding=2, flip=True), seed=0),
            "eval_dataset": digits()[96:112],
            "data_collator": default_data_collator,
            "compute_metrics": accuracy,
        }

    def save_processing(self, folder: Path) -> None:
        pass

    def score(self, model, progress):
        raise NotImplementedError


class EventfulTrainer(CompressionTrainer):
    def __init__(self, pause, interrupt_at, **given):
        super().__init__(**given)
        self.pause, self.interrupt_at = pause, interrupt_at

    def training_step(self, *given, **more):
        if self.state.global_step + 1 == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(self.pause)
        return super().training_step(*given, **more)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train_stage(folder: Path, wanted: str = "as it was", task: Digits | None = None, **settings) -> Stage:
    """A student of 2 bits, rounded stochastically, taught by another network: trained and saved in `folder`."""
    torch.set_num_threads(1)
    task = task or Digits()
    given = {"per_device_train_batch_size": 16, "use_cpu": True, "learning_rate": 1e-2, **settings}
    taught = {"teacher": resnet(seed=1), "compression": rules(2, stochastic=True)}
    return train("small", folder, wanted, task, resnet(), given, lambda t: t.save_compressed(folder), **taught)


class Seen(TrainerCallback):
    """Calls `look(event, model)` at the events it is given; keeps what it returns, by event."""

    def __init__(self, look, *events: str) -> None:
        self.seen: dict[str, list] = {event: [] for event in events}
        for event in events:
            setattr(self, f"on_{event}", self._noting(event, look))

    def _noting(self, event, look):
        def note(args, state, control, model=None, **kwargs):
            self.seen[event].append(look(model))

        return note


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def first_gradient(kind: str, variant: str, batch: int, accumulation: int, folder) -> dict[str, torch.Tensor]:
    """Of the first optimizer step over 32 names in their order, by a name of `VARIANTS`."""
    given = dict(VARIANTS[variant])
    smoothing = given.pop("smoothing", 0.0)
    if given.pop("taught", False):
        given["teacher"] = SEQ2SEQ[kind](seed=1)
    return one_step(
        translation_trainer, SEQ2SEQ[kind](), given, batch, accumulation, folder, label_smoothing_factor=smoothing
    )


@cache
def whole_gradient(kind: str, variant: str) -> dict[str, torch.Tensor]:
    """The same with all 32 names at once, on one process."""
    with TemporaryDirectory() as folder:
        return first_gradient(kind, variant, 32, 1, folder)


def one_step(make, model, given, batch: int, accumulation: int, folder, **settings) -> dict[str, torch.Tensor]:
    """The gradient of the first rows, in their order."""
    look = Seen(gradients, "pre_optimizer_step")
    make(
        folder,
        model,
        given={**given, "callbacks": [look]},
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        **settings,
    ).train()
    return look.seen["pre_optimizer_step"][0]


VARIANTS = {
    "plain": {},
    "taught": {"taught": True, "smoothing": 0.1},
    "compressed": {"compression": rules()},
    "both": {"taught": True, "compression": rules(), "smoothing": 0.1},
}


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Relative, of all gradients together."""
    assert found.keys() == wanted.keys()
    off = sum((found[n].double() - wanted[n].double()).square().sum() for n in wanted)
    return float((off / sum(g.double().square().sum() for g in wanted.values())).sqrt())


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
