"""Probability models of integers, learned from the real numbers that are rounded to them: pure functions.

Ballé, Minnen, Singh, Hwang, Johnston, "Variational image compression with a scale hyperprior", ICLR 2018 (its
factorized density), used for weights by Oktay, Ballé, Singh, Shrivastava, ICLR 2020. A cumulative c(x) gives an
integer, or any real number x in its place, the probability

    p(x) = c(x + ½) − c(x − ½),        b(x) = −log2 p(x) bits.

While training, u ~ U(−½, ½) stands in for the rounding of a latent z, which then costs B(z) = E[b(z + u)] bits. Nothing
is drawn here: the expectation is the integral of b from z − ½ to z + ½, and its slope is b(z + ½) − b(z − ½). Both are
tabulated in cells of 1 / CELLS, and a latent looks up its cell: the noise's mean without its variance, and the density
is evaluated at a few hundred points however many latents there are.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Family: TypeAlias = Literal["factorized", "logistic", "laplace"]

CELLS = 16
"""Cells of the tables in one unit."""
CHUNK = 1 << 15
"""Elements worked on at a time, so that temporaries stay in the cache and are not fresh memory."""
_LEAST_REACH, _MOST_REACH = 8, 256
_WIDTHS = (1, 3, 3, 3, 1)
_LEAST_GAP = 1e-6


@dataclass(frozen=True)
class Table:
    """Code lengths of one density, in bits, up to `reach` units from 0; beyond, they go on as straight lines.

    Cell i lies around (i + ½) / CELLS − reach − ½, so that the CELLS cells of a unit round to one integer.
    expected: B, and slopes: B' (a constant, bits per unit), both [(2 · reach + 1) · CELLS]; whole: b of the integers
    −reach … reach. All float32; expected and whole are differentiable in the density's parameters.
    """

    reach: int
    covers: bool  # every latent
    expected: Tensor
    slopes: Tensor
    whole: Tensor


def start(family: Family, spread: float) -> Tensor:
    """Parameters, float32 [n], of a density about 0 whose standard deviation is near `spread`. No random numbers."""
    if family == "laplace":
        return torch.tensor([math.log(spread / math.sqrt(2))])
    scale = spread * math.sqrt(3) / math.pi  # of a logistic
    if family == "logistic":
        return torch.tensor([math.log(scale)])
    gain = scale ** (-1 / (len(_WIDTHS) - 1))  # of each layer
    parts = []
    for fan_in, fan_out in pairwise(_WIDTHS):
        parts.append(torch.full((fan_out * fan_in,), math.log(math.expm1(gain / fan_in))))
        if fan_out > 1:  # biases that differ, or units would stay equal; gates that are closed
            parts += [torch.linspace(-0.5, 0.5, fan_out), torch.zeros(fan_out)]
    return torch.cat([*parts, torch.zeros(1)])


def bits(family: Family, parameters: Tensor, x: Tensor) -> Tensor:
    """b(x) of x [n], without loss of precision however far out; differentiable in `parameters`."""
    if family == "laplace":
        return _laplace(parameters, x)
    ends = torch.cat([x - 0.5, x + 0.5])
    logits = ends * torch.exp(-parameters) if family == "logistic" else _factorized(parameters, ends)
    below, above = logits.chunk(2)
    # σ(a) − σ(b) = σ(a) σ(−b) (1 − e^(b − a)): no difference of numbers that are both near 0 or near 1
    gap = (above - below).clamp_min(_LEAST_GAP)
    nats = F.softplus(-above) + F.softplus(below) - torch.log(-torch.expm1(-gap))
    return nats / math.log(2)


def _laplace(parameters: Tensor, x: Tensor) -> Tensor:
    scale = parameters.exp().clamp_min(1e-2)
    far, half = x.abs(), 0.5 / scale
    lost = 0.5 * (torch.exp((far.clamp_max(0.5) - 0.5) / scale) + torch.exp(-(far + 0.5) / scale))
    inside = -torch.log1p(-lost)
    # p = e^(−far/scale) sinh(half), and log sinh(h) = h + log(1 − e^(−2h)) − log 2
    outside = far / scale - half - torch.log(-torch.expm1(-2 * half)) + math.log(2)
    return torch.where(far < 0.5, inside, outside) / math.log(2)


def _factorized(parameters: Tensor, x: Tensor) -> Tensor:
    """Logits of the cumulative: y = softplus(H)·y + a per layer, all but the last followed by y += tanh(g)·tanh(y)."""
    used = 0

    def take(rows: int, columns: int) -> Tensor:
        nonlocal used
        used += rows * columns
        return parameters[used - rows * columns : used].view(rows, columns)

    y = x.unsqueeze(0)
    for fan_in, fan_out in pairwise(_WIDTHS):
        slope = F.softplus(take(fan_out, fan_in))
        y = torch.addmm(take(fan_out, 1), slope, y)
        if fan_out > 1:
            y = y + take(fan_out, 1).tanh() * y.tanh()
    return y.squeeze(0)


def tabulate(family: Family, parameters: Tensor, furthest: float) -> Table:
    """The density as a table for latents up to `furthest` units (finite) from 0; it reaches 256 at most."""
    reach = _LEAST_REACH
    while reach < min(furthest, _MOST_REACH):
        reach *= 2
    device = parameters.device
    points = torch.arange((2 * reach + 2) * CELLS, device=device) + 0.5  # b is wanted half a unit beyond B
    lengths = bits(family, parameters, points / CELLS - (reach + 1))
    slopes = lengths.detach()[CELLS:] - lengths.detach()[:-CELLS]
    means = F.avg_pool1d(lengths.view(1, 1, -1), CELLS, stride=1).view(-1)
    expected = (means[1:] + means[:-1]) / 2  # the trapezoidal rule
    whole = bits(family, parameters, torch.arange(-reach, reach + 1, device=device, dtype=torch.float32))
    return Table(reach, furthest <= reach, expected, slopes, whole)


def code_length(z: Tensor, table: Table) -> tuple[Tensor, Tensor]:
    """(Σ B(z), Σ b(round(z))) in bits, scalars in float32 differentiable in the density's parameters, not in z.

    z: float32 [n], overwritten. The first is what latents cost when noise is added, the second when they are rounded.
    """
    counts = torch.zeros(len(table.slopes), dtype=torch.int64, device=z.device)
    beyond = torch.zeros((), device=z.device)
    for chunk in pieces(z):
        cells, excess = _cells(chunk, table)
        counts += torch.bincount(cells, minlength=len(counts))
        if excess is not None:
            beyond += torch.dot(excess, torch.index_select(table.slopes, 0, cells))
    held = counts.to(torch.float32)
    return held @ table.expected + beyond, held.view(-1, CELLS).sum(1) @ table.whole + beyond


def slopes_(z: Tensor, table: Table) -> None:
    """Overwrites z, float32 [n], by B'(z)."""
    for chunk in pieces(z):
        torch.index_select(table.slopes, 0, _cells(chunk, table)[0], out=chunk)


def pieces(rows: Tensor) -> tuple[Tensor, ...]:
    """Rows [n] or [n, k] in blocks that fit a cache, or all of them where a launch costs more than memory."""
    width = rows.numel() // max(len(rows), 1)
    return rows.split(max(1, CHUNK // max(width, 1)) if rows.device.type == "cpu" else max(1, len(rows)))


def _cells(z: Tensor, table: Table) -> tuple[Tensor, Tensor | None]:
    """Each latent's cell, int32 [n], and by how many units it lies outside of the table. z: overwritten."""
    position = z.mul_(CELLS).add_((table.reach + 0.5) * CELLS)
    if table.covers:
        return position.to(torch.int32), None
    inside = position.clamp(0, len(table.slopes) - 1)
    return inside.to(torch.int32), position.sub_(inside).div_(CELLS)
