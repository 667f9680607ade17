"""Losses against a loop in float64, and where others give NaN."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother

from hfcompress.losses import IGNORED, count, cross_entropy, distillation

temperatures = pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0, 10.0, 20.0])


def log_softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    total = math.fsum(math.exp((x - top) / temperature) for x in logits)
    return [(x - top) / temperature - math.log(total) for x in logits]


def loops(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[float, float]:
    """(cross-entropy, T² · KL) of rows of logits, summed over the rows that count."""
    ce = kl = 0.0
    rows = zip(*(x.double().flatten(0, -2).tolist() for x in (student, teacher)), labels.flatten().tolist())
    for s, t, label in rows:
        if label == IGNORED:
            continue
        ce -= log_softmax(s)[label]
        for log_p, log_q in zip(log_softmax(t, temperature), log_softmax(s, temperature)):
            if log_p > -math.inf:
                kl += temperature**2 * math.exp(log_p) * (log_p - log_q)
    return ce, kl


def draw(dtype: torch.dtype = torch.float32, classes: int = 50, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(4, 6, classes, generator=generator).to(dtype) for _ in range(2))
    labels = torch.randint(0, classes, (4, 6), generator=generator)
    labels[torch.rand(4, 6, generator=generator) < 0.3] = IGNORED
    return student.requires_grad_(), teacher, labels


@temperatures
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_to_loops(temperature: float, dtype: torch.dtype) -> None:
    student, teacher, labels = draw(dtype)
    ce, kl = loops(student, teacher, labels, temperature)
    assert cross_entropy(student, labels).item() == pytest.approx(ce, rel=1e-5)
    assert distillation(student, teacher, labels, temperature).item() == pytest.approx(kl, rel=1e-4)
    assert count(labels) == (labels != IGNORED).sum()


@temperatures
def test_a_student_equal_to_its_teacher_loses_nothing(temperature: float) -> None:
    _, teacher, labels = draw()
    student = teacher.clone().requires_grad_()
    loss = distillation(student, teacher, labels, temperature)
    loss.backward()
    assert abs(loss.item()) < 1e-3 and student.grad.abs().max() < 1e-5 * temperature


@temperatures
def test_gradient_is_that_of_the_paper(temperature: float) -> None:
    student, teacher, labels = draw()
    distillation(student, teacher, labels, temperature).backward()
    p, q = (torch.softmax(x.detach().double() / temperature, -1) for x in (teacher, student))
    wanted = temperature * (q - p) * (labels != IGNORED).unsqueeze(-1)
    assert torch.allclose(student.grad.double(), wanted, atol=1e-5 * temperature)


@temperatures
def test_minus_infinity_in_the_teacher(temperature: float) -> None:
    student, teacher, labels = draw()
    teacher[..., ::3] = -math.inf
    loss = distillation(student, teacher, labels, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(loops(student, teacher, labels, temperature)[1], rel=1e-4)
    assert student.grad.isfinite().all()
    masked = student.detach().clone()
    masked[..., ::3] = -math.inf  # the same classes masked on both sides
    masked.requires_grad_()
    loss = distillation(masked, teacher, labels, temperature)
    loss.backward()
    assert loss.isfinite() and masked.grad.isfinite().all()


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_that_counts(rows: int) -> None:
    student, teacher = torch.randn(rows, 5, requires_grad=True), torch.randn(rows, 5)
    labels = torch.full((rows,), IGNORED)
    for smoothing in (0.0, 0.1):
        loss = cross_entropy(student, labels, smoothing) + distillation(student, teacher, labels, 2.0)
        loss.backward()
        assert loss.item() == 0 and student.grad.eq(0).all()
    assert count(labels) == 0


@given(st.floats(0, 0.9), st.integers(2, 30))
def test_label_smoothing_is_that_of_transformers(smoothing: float, classes: int) -> None:
    student, _, labels = draw(classes=classes)
    wanted = LabelSmoother(epsilon=smoothing)({"logits": student}, labels) * count(labels)
    assert cross_entropy(student, labels, smoothing).item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_as_labels(dtype: torch.dtype) -> None:
    student, teacher, labels = draw(dtype)
    labels = labels.clamp(min=0)
    certain = torch.nn.functional.one_hot(labels, 50).to(dtype)
    assert torch.allclose(cross_entropy(student, certain, 0.1), cross_entropy(student, labels, 0.1))
    assert torch.equal(distillation(student, teacher, certain, 3.0), distillation(student, teacher, labels, 3.0))
    assert count(certain) == 24 and count(certain).dtype == torch.int64
    assert count(torch.zeros(1001, 2, dtype=dtype)) == 1001


def test_large_logits_stay_finite() -> None:
    student, teacher, labels = draw(scale=1e4)
    loss = cross_entropy(student, labels) + distillation(student, teacher, labels, 1.0)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
