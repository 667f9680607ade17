"""Scores of a folder or repository as plain transformers loads it, and the yardsticks for its size."""

import gzip
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    TimmWrapperImageProcessor,
)

from hfcompress import zoo
from hfcompress.checkpoint import FILE_NAME
from hfcompress.claims import unsaved
from hfcompress.errors import DataError
from hfcompress.networks import check_classifier, from_pretrained
from hfcompress.pictures import Pictures
from hfcompress.results import Paired, Sample, Score, wilson
from hfcompress.schema import Evaluation

Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""


def score_translation(
    model: str, test: Dataset, settings: Evaluation, progress: Progress | None = None
) -> tuple[dict[str, Score], list[Sample]]:
    """BLEU and chrF of sacrebleu with bootstrap intervals, and every hypothesis with its own chrF.

    `test` has columns source and target. Sentences are decoded in batches of like length, longest first. Raises
    DataError: nothing there that can be loaded; FormatError: a compressed file that is damaged or of another model.
    """
    network = from_pretrained(AutoModelForSeq2SeqLM, model).eval().to(_device())
    tokenizer = from_pretrained(AutoTokenizer, model)
    sources, references = list(test["source"]), list(test["target"])

    def translate(sentences: list[str]) -> list[str]:
        batch = tokenizer(sentences, return_tensors="pt", padding=True, truncation=True)
        with torch.inference_mode():
            ids = network.generate(
                **batch.to(network.device), num_beams=settings.beams, max_new_tokens=settings.max_new_tokens
            )
        texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts

    hypotheses = translated(translate, sources, settings.batch_size, progress)
    return corpus_scores(hypotheses, references, settings.bootstrap), [
        Sample(s, r, h, CHRF().sentence_score(h, [r]).score) for s, r, h in zip(sources, references, hypotheses)
    ]


def translated(
    translate: Callable[[list[str]], list[str]], sources: Sequence[str], size: int, progress: Progress | None = None
) -> list[str]:
    """What `translate` makes of the sources, given so many at a time: those of like length together, longest first."""
    hypotheses = [""] * len(sources)
    order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        for i, text in zip(rows, translate([sources[i] for i in rows])):
            hypotheses[i] = text
        if progress is not None:
            progress(min(start + len(rows), len(order)), len(order))
    return hypotheses


def corpus_scores(hypotheses: Sequence[str], references: Sequence[str], resamples: int) -> dict[str, Score]:
    """BLEU and chrF. Raises DataError: no lines, or other numbers of them (sacrebleu would score the shorter)."""
    if len(hypotheses) != len(references) or not hypotheses:
        raise DataError(f"{len(hypotheses)} hypotheses for {len(references)} references: there must be one for each")
    scores = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        value = metric.corpus_score(list(hypotheses), [list(references)]).score
        interval = (value, value)
        if resamples:
            resampled = type(metric)().corpus_score(list(hypotheses), [list(references)], n_bootstrap=resamples)
            interval = (
                max(0.0, resampled._mean - resampled._ci),
                min(100.0, resampled._mean + resampled._ci),
            )
        scores[name] = Score(float(value), len(hypotheses), str(metric.get_signature()), interval)
    return scores


def paired_bleu(
    hypotheses: Sequence[str], others: Mapping[str, Sequence[str]], references: Sequence[str], resamples: int
) -> tuple[Paired, ...]:
    """`hypotheses` against each of the `others` (row of results → its lines), as `differences` finds it."""
    found, how = differences(hypotheses, others, references, resamples)
    counts = len(references), resamples, how
    return tuple(Paired(name, "bleu", *each, *counts) for name, each in found.items())  # type: ignore[arg-type]


def differences(
    hypotheses: Sequence[str], others: Mapping[str, Sequence[str]], references: Sequence[str], resamples: int
) -> tuple[dict[str, tuple[float, float]], str]:
    """Name of the others → BLEU of `hypotheses` minus its own, and the p-value of none: paired bootstrap resampling.

    The second is sacrebleu's signature; nothing is found without `others` or resamples. All lines answer the same
    `references`. Raises DataError: no lines, or other numbers of them.
    """
    for lines in (hypotheses, *others.values()):
        if len(lines) != len(references) or not lines:
            raise DataError(f"{len(lines)} hypotheses for {len(references)} references: there must be one for each")
    if not others or not resamples:
        return {}, ""
    systems = [("own", list(hypotheses)), *((name, list(lines)) for name, lines in others.items())]
    test = PairedTest(systems, {"BLEU": BLEU()}, [list(references)], test_type="bs", n_samples=resamples)
    signatures, table = test()
    own, *found = table["BLEU"]
    tests = {}
    for (name, lines), other in zip(systems[1:], found):
        # of equal lines sacrebleu says the smallest p-value there is: no resample's difference exceeds zero
        p_value = 1.0 if lines == list(hypotheses) else float(other.p_value)
        tests[name] = (float(own.score - other.score), p_value)
    return tests, str(signatures["BLEU"])


def score_images(
    model: str, test: Dataset, settings: Evaluation, progress: Progress | None = None, split: str = "test"
) -> tuple[dict[str, Score], list[Sample]]:
    """Top-1 accuracy in percent with Wilson's interval, and every row with the probability of its right label.

    `test` has columns image and label, `split` says what it is called. Raises DataError: nothing there that can be
    loaded, or the model's labels are not the split's; FormatError: a compressed file that is damaged or of another
    model.
    """
    zoo.register()
    network = from_pretrained(AutoModelForImageClassification, model).eval().to(_device())
    names = test.features["label"].names
    check_classifier(model, network, names)
    processor = TimmWrapperImageProcessor(network.config.pretrained_cfg, network.config.architecture)
    rows = Pictures(test, processor, in_memory=0)  # each is read once
    right: list[float] = []
    samples = []
    for start in range(0, len(test), settings.batch_size):
        batch = rows.__getitems__(range(start, min(start + settings.batch_size, len(test))))
        labels = torch.tensor([row["labels"] for row in batch])
        with torch.inference_mode():
            logits = network(torch.stack([row["pixel_values"] for row in batch]).to(network.device)).logits.cpu()
        predicted, chance = logits.argmax(-1), logits.softmax(-1)[torch.arange(len(labels)), labels]
        right += (predicted == labels).tolist()
        samples += [
            Sample(f"{split} image {start + i}", names[label], names[guess], 100 * float(p))
            for i, (label, guess, p) in enumerate(zip(labels.tolist(), predicted.tolist(), chance))
        ]
        if progress is not None:
            progress(start + len(labels), len(test))
    correct = int(sum(right))
    size, crop = processor.data_config["input_size"][-1], processor.data_config["crop_pct"]
    signature = f"top1|split:{split}|size:{size}|crop_pct:{crop}"
    score = Score(100 * correct / len(test), len(test), signature, wilson(correct, len(test)))
    return {"accuracy": score}, samples


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files of a folder. Raises DataError: none."""
    return sum(file.stat().st_size for file in weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The compressed file of a folder, or dense safetensors. Raises DataError: neither."""
    compressed = folder / FILE_NAME
    files = [compressed] if compressed.is_file() else sorted(folder.glob("model*.safetensors"))
    if not files:
        raise DataError(f"no weights in {folder}: expected {FILE_NAME} or model.safetensors")
    return files


def int8_gzip_bytes(model: nn.Module) -> int:
    """The yardstick: weights of ≥ 2 dimensions in int8 with a float32 scale a row, the rest float32; gzip -9."""
    ignored = unsaved(model)
    persistent = model.state_dict().keys()
    parts: list[bytes] = []
    buffers = ((n, b) for n, b in model.named_buffers() if n in persistent)
    for name, tensor in [*model.named_parameters(), *buffers]:
        if name not in ignored:
            parts += _int8(tensor.detach().cpu())
    return len(gzip.compress(b"".join(parts), compresslevel=9, mtime=0))


def _int8(tensor: Tensor) -> list[bytes]:
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return [tensor.contiguous().numpy().tobytes()]
    rows = tensor.float().reshape(len(tensor), -1)
    scale = (rows.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
    codes = (rows / scale).round().to(torch.int8)
    return [codes.numpy().tobytes(), scale.numpy().astype(np.float32).tobytes()]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
