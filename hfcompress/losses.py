"""Losses as sums over the terms that count; whoever calls divides. All in float32 log space.

Low precision is not merely unsafe here: a bfloat16 KL at T = 10 is wrong by more than 100 %.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The label of a token that does not count."""


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Σ over labels ≠ −100 of −log p(label), label-smoothed by `smoothing`.

    logits: [..., classes]; labels: integers [...] or probabilities [..., classes]. A scalar, in nats.
    """
    flat = logits.float().reshape(-1, logits.shape[-1])
    if labels.is_floating_point():
        target = labels.float().reshape(flat.shape)  # smoothing in bfloat16 would be off by a percent
        return F.cross_entropy(flat, target, reduction="sum", label_smoothing=smoothing)
    return F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)


def distillation(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Σ over labels ≠ −100 of T² · KL(softmax(teacher / T) ‖ softmax(student / T)) over the last axis.

    student, teacher: logits [..., classes]; labels as for `cross_entropy`. A scalar, in nats. Classes to which the
    teacher gives −∞ (masked ones) carry no weight. (Hinton et al. 2015; Polino et al. 2018, section 2.)
    """
    classes = student.shape[-1]
    s, t = student.reshape(-1, classes), teacher.reshape(-1, classes)
    if not labels.is_floating_point():
        counted = labels.reshape(-1).ne(IGNORED)
        s, t = s[counted], t[counted]
    log_s = F.log_softmax(s.float() / temperature, dim=-1)
    log_t = F.log_softmax(t.float() / temperature, dim=-1)
    masked = log_t.isneginf()
    difference = (log_t - log_s).masked_fill(masked, 0.0)
    return temperature**2 * (log_t.exp() * difference).sum()


def cached_distillation(student: Tensor, cached: Mapping[str, Tensor], labels: Tensor, temperature: float) -> Tensor:
    """`distillation` from what a teacher's cache holds of each token: an unbiased estimate, exact for k = classes.

    student: logits [..., classes]; labels [...]. cached, at the same temperature: `ids`, `log_probs` [..., k] of the
    teacher's likeliest classes; of the rest its `mass` [...], and `samples`, `sample_log_probs` [..., n] of classes
    drawn from it. A bucket for the rest would leave out how its classes differ, which near convergence is a tenth of
    the loss; sampling the difference, not its two parts, leaves nothing to chance where the student is the teacher.
    """
    counted = labels.ne(IGNORED)
    log_s = F.log_softmax(student[counted].float() / temperature, dim=-1)
    cached = {name: tensor[counted] for name, tensor in cached.items()}
    log_t, log_rest = cached["log_probs"].float(), cached["sample_log_probs"].float()
    difference = (log_t - log_s.gather(-1, cached["ids"].long())).masked_fill(log_t.isneginf(), 0.0)
    rest = (log_rest - log_s.gather(-1, cached["samples"].long())).masked_fill(log_rest.isneginf(), 0.0)
    return temperature**2 * ((log_t.exp() * difference).sum() + (cached["mass"].float() * rest.mean(-1)).sum())


def count(labels: Tensor) -> Tensor:
    """How many terms count: tokens ≠ −100, or rows where the labels are probabilities. An integer scalar."""
    if labels.is_floating_point():
        return torch.tensor(labels.shape[:-1].numel(), device=labels.device)
    return labels.ne(IGNORED).sum()
