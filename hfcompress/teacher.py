"""A frozen teacher, and the checks that teacher and student speak of the same classes."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hfcompress.errors import TeacherError

_SEQ2SEQ = ("vocab_size", "decoder_start_token_id", "pad_token_id", "eos_token_id")
_IMAGE = ("input_size", "mean", "std")


def freeze(teacher: nn.Module) -> nn.Module:
    """In eval mode, without gradients; for good."""
    return teacher.requires_grad_(False).eval()


def check(teacher: nn.Module, student: nn.Module) -> None:
    """Raises TeacherError, naming the difference, unless the teacher's logits mean what the student's mean."""
    if teacher is student:
        raise TeacherError("teacher and student are the same object: load the teacher apart, or copy.deepcopy it")
    shared = {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    if shared:
        raise TeacherError(f"teacher and student share {len(shared)} weights: training one would change the other")
    if not (isinstance(teacher, PreTrainedModel) and isinstance(student, PreTrainedModel)):
        return
    theirs, ours = teacher.config, student.config
    if theirs.is_encoder_decoder != ours.is_encoder_decoder:
        kinds = ["an encoder-decoder" if c.is_encoder_decoder else "no encoder-decoder" for c in (theirs, ours)]
        raise TeacherError(f"the teacher is {kinds[0]}, the student is {kinds[1]}")
    if theirs.is_encoder_decoder:
        _same(_vocabulary(theirs), _vocabulary(ours))
        return
    if theirs.num_labels != ours.num_labels:
        raise TeacherError(f"the teacher has {theirs.num_labels} labels, the student {ours.num_labels}")
    _same_labels(dict(theirs.id2label), dict(ours.id2label))
    pairs = [getattr(c, "pretrained_cfg", None) or {} for c in (theirs, ours)]
    if all(pairs):
        _same(*({k: _plain(p.get(k)) for k in _IMAGE} for p in pairs))


def check_vocabularies(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raises TeacherError with the first five conflicts unless every id is the same token in both."""
    theirs, ours = ({i: token for token, i in t.get_vocab().items()} for t in (teacher, student))
    conflicts = [i for i in sorted(theirs.keys() | ours.keys()) if theirs.get(i) != ours.get(i)]
    if conflicts:
        listing = ", ".join(f"{i} is {theirs.get(i)!r} / {ours.get(i)!r}" for i in conflicts[:5])
        raise TeacherError(
            f"teacher and student vocabularies differ in {len(conflicts)} of {max(len(theirs), len(ours))} ids "
            f"(id: teacher / student): {listing}. Give the student the teacher's tokenizer"
        )


def digest_of(teacher: nn.Module) -> str:
    """SHA-256 of its weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def logits_of(outputs: Any) -> Tensor:
    """The logits of a transformers output, a dictionary, or a bare tensor as timm models return."""
    logits = outputs if isinstance(outputs, Tensor) else outputs["logits"]
    assert isinstance(logits, Tensor)
    return logits


def _vocabulary(config: PretrainedConfig) -> dict[str, Any]:
    apart = getattr(config, "decoder_vocab_size", None)  # Marian's, where the two sides share no embeddings
    return {**{k: getattr(config, k, None) for k in _SEQ2SEQ}, "decoder_vocab_size": apart or config.vocab_size}


def _same(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> None:
    differing = [k for k in teacher if teacher[k] != student[k]]
    if differing:
        listing = "; ".join(f"{k}: {teacher[k]} / {student[k]}" for k in differing)
        raise TeacherError(
            f"teacher / student differ in {listing}. Distillation compares logits one by one: make them agree"
        )


def _same_labels(teacher: dict[int, str], student: dict[int, str]) -> None:
    unnamed = all(name == f"LABEL_{i}" for names in (teacher, student) for i, name in names.items())
    generic = any(all(name == f"LABEL_{i}" for i, name in names.items()) for names in (teacher, student))
    differing = [i for i in teacher if teacher[i] != student.get(i)]
    if differing and not unnamed and not generic:
        first = differing[0]
        raise TeacherError(
            f"teacher and student order their labels differently: {len(differing)} differ, first {first} "
            f"({teacher[first]!r} / {student.get(first)!r})"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
