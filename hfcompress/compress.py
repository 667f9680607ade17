"""`hfcompress compress`: any dense model to a compressed folder, without data and without training.

The default is one unbounded grid for every matrix, its step relative to the size of the matrix' weights and its codes
entropy coded. Min–max buckets of b bits spend those bits on values that hardly occur; here a value costs what it is
rare, so that the same error takes fewer bytes. A trellis opens every other point of a finer grid (`dependent`), which
takes fewer still. The step is found by bisection: on a sample of the weights first, then corrected by the sizes of real
files.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress import checkpoint
from hfcompress.checkpoint import Sizes
from hfcompress.compress_rules import default_rules, parameters
from hfcompress.compressor import Compressor
from hfcompress.errors import ConfigError
from hfcompress.methods.entropy import EntropyPenalized
from hfcompress.originals import Original, saved_tensors
from hfcompress.reparameterization import MATRICES
from hfcompress.schema import Rule

GRID = EntropyPenalized.__name__.lower()
DEFAULT_BITS = 4.0
FINEST, COARSEST = 2.0**-12, 4.0
"""Distances of open points of the grid, relative to the root mean square of a weight's elements."""
_TOLERANCE = 0.02
_SAMPLE = 1 << 21
_TRIES = 14

Say = Callable[[str], None]


@dataclass(frozen=True)
class Group:
    """All weights of one kind: numbers, bytes before, bytes after, squared error and squared size of the weights."""

    name: str
    weights: int
    before: int
    after: float
    error: float
    size: float

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.after / max(self.weights, 1)

    @property
    def relative_error(self) -> float:
        """‖w − w'‖ / ‖w‖."""
        return math.sqrt(self.error / self.size) if self.size else 0.0


@dataclass(frozen=True)
class Outcome:
    """What has been written. `step`: of the grid, where there is one."""

    sizes: Sizes
    groups: tuple[Group, ...]
    before: int
    rules: tuple[Rule, ...]
    step: float | None

    @property
    def relative_error(self) -> float:
        """‖w − w'‖ / ‖w‖ over the matrices and kernels; norms and biases are hardly rounded, and would flatter."""
        chosen = [group for group in self.groups if group.name in MATRICES]
        size = sum(group.size for group in chosen)
        return math.sqrt(sum(group.error for group in chosen) / size) if size else 0.0


def compress(
    original: Original,
    output: Path,
    *,
    bits: float | None = None,
    target_bytes: int | None = None,
    rules: Sequence[Rule] | None = None,
    say: Say = lambda what: None,
) -> Outcome:
    """Write the compressed model to `output`, with its config, tokenizer or processor files.

    Without `rules`, the grid at `bits` per coded weight on average (4), or with a file of at most `target_bytes`, both
    reached within 2 %. `say` is told what is being done. Raises ConfigError: a target that cannot be reached, or
    weights that are not finite.
    """
    model = original.model
    before = {name: tensor.detach().clone() for name, tensor in saved_tensors(model)}
    if rules is None:
        search = _Search(model, before, bits, target_bytes, say)
        compressor, step = search.run()
    else:
        say("coding")
        compressor, step = Compressor(model, rules), None
    say("writing")
    original.copy_files(output)
    sizes = checkpoint.save(model, output, compressor)
    used = tuple(search.rules if rules is None else rules)
    dense = sum(tensor.nbytes for tensor in before.values())
    return Outcome(sizes, tuple(_groups(model, before, sizes)), dense, used, step)


class _Search:
    """Looks for the step of the grid that meets a target."""

    def __init__(
        self,
        model: PreTrainedModel,
        before: dict[str, Tensor],
        bits: float | None,
        target_bytes: int | None,
        say: Say,
    ) -> None:
        self.model, self.before, self.say = model, before, say
        self.target_bytes = target_bytes
        self.bits = DEFAULT_BITS if bits is None else bits
        self.rules = default_rules(model, EntropyPenalized())
        self.samples = list(_samples(model, before))
        self.weights = sum(count for count, _ in self.samples)

    def run(self) -> tuple[Compressor, float]:
        """The compressor at the step found, and the step; the model holds its weights. Raises ConfigError: none is."""
        fixed, ratio = self._fixed_bytes(), 1.0
        tried: list[tuple[float, float]] = []
        for _ in range(_TRIES):
            step = _between(tried) or self._step_for(self._wanted_bits(fixed) / ratio)
            self.say(f"coding at step {step:.4g} of the weights' size")
            compressor, sizes = self._at(step)
            coded = sum(t.codes / 8 + t.arrays for t in sizes.tensors if t.method == GRID)
            fixed = sizes.total - round(coded)
            bits = 8 * coded / self.weights
            if self._met(bits, sizes.total, step):
                return compressor, step
            tried.append((math.log2(step), math.log2(bits / self._wanted_bits(fixed))))
            ratio = bits / self._estimate(step)
        asked = f"--bits {self.bits:g}" if self.target_bytes is None else f"--target-bytes {self.target_bytes:,}"
        raise ConfigError(f"{asked} was not met: the last try gave {bits:.3g} bits a weight, {sizes.total:,} bytes")

    def _met(self, bits: float, total: int, step: float) -> bool:
        if self.target_bytes is None:
            if abs(bits / self.bits - 1) <= _TOLERANCE / 4:
                return True
            edge = (step >= COARSEST and bits > self.bits) or (step <= FINEST and bits < self.bits)
            if edge and abs(bits / self.bits - 1) > _TOLERANCE:
                raise ConfigError(f"--bits {self.bits:g} cannot be reached: the nearest is {bits:.3g} bits a weight")
            return edge
        if step >= COARSEST and total > self.target_bytes:
            raise ConfigError(f"--target-bytes {self.target_bytes:,} cannot be reached: the least is {total:,} bytes")
        return (1 - _TOLERANCE) * self.target_bytes <= total <= self.target_bytes or step <= FINEST

    def _wanted_bits(self, fixed: int) -> float:
        """Bits a coded weight may take; the middle of what a target in bytes allows."""
        if self.target_bytes is None:
            return self.bits
        return max(8 * ((1 - _TOLERANCE / 2) * self.target_bytes - fixed) / self.weights, 1e-3)

    def _at(self, step: float) -> tuple[Compressor, Sizes]:
        with torch.no_grad():
            for name, tensor in saved_tensors(self.model):
                tensor.copy_(self.before[name])
        compressor = Compressor(self.model, self.rules)
        _set_step(compressor, step)
        return compressor, checkpoint.sizes(checkpoint.Reader(checkpoint.to_bytes(self.model, compressor)))

    def _estimate(self, step: float) -> float:
        """Bits a weight from the sample: each tensor's entropy at that step."""
        return sum(count * _entropy(sample, step) for count, sample in self.samples) / max(self.weights, 1)

    def _step_for(self, bits: float) -> float:
        low, high = math.log2(FINEST), math.log2(COARSEST)
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if self._estimate(2**middle) > bits else (low, middle)
        if high == math.log2(COARSEST):
            return COARSEST
        return FINEST if low == math.log2(FINEST) else 2 ** ((low + high) / 2)

    def _fixed_bytes(self) -> int:
        """About what lies around the codes."""
        every = sum(tensor.numel() for tensor in self.before.values())
        return 2 * (every - self.weights) + 40 * len(self.before)


def _between(tried: Sequence[tuple[float, float]]) -> float | None:
    """A step between the two tries next to the target, or beyond all of them; None: ask the sample again.

    tried: (log2 of the step, log2 of bits over what is wanted); a coarser step takes fewer bits.
    """
    finer = max((t for t in tried if t[1] > 0), default=None)
    coarser = min((t for t in tried if t[1] <= 0), default=None)
    if finer and coarser:
        share = finer[1] / (finer[1] - coarser[1])
        return 2.0 ** (finer[0] + min(max(share, 0.1), 0.9) * (coarser[0] - finer[0]))
    if len(tried) < 3:
        return None
    beyond = finer[0] + 1 if finer else tried[-1][0] - 1
    return float(min(max(2.0**beyond, FINEST), COARSEST))


def _set_step(compressor: Compressor, step: float) -> None:
    """Put every matrix on its grid: a method's own first step is for training, not for a file."""
    for entry in compressor.entries.values():
        if isinstance(entry.method, EntropyPenalized) and entry.slot.numel:
            entry.latents = entry.method.on_dependent_grid(entry.latents, step)
    compressor.write()


def _samples(model: PreTrainedModel, before: dict[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(elements, some of them divided by the root mean square of all) for every matrix and kernel."""
    total = sum(tensor.numel() for tensor in before.values())
    for name, kind, _ in parameters(model):
        if kind not in MATRICES:
            continue
        flat = before[name].flatten()
        size = flat.float().norm() / max(flat.numel(), 1) ** 0.5
        take = min(flat.numel(), max(4096, _SAMPLE * flat.numel() // max(total, 1)))
        if take < flat.numel():
            flat = flat[torch.randint(flat.numel(), (take,), generator=torch.Generator().manual_seed(0))]
        yield before[name].numel(), flat.float() / (size or 1.0)


def _entropy(sample: Tensor, step: float) -> float:
    if not sample.numel():
        return 0.0
    codes = (sample / step).round_().long()
    counts = torch.bincount(codes - codes.min()).double()
    counts = counts[counts > 0] / counts.sum()
    return float(-(counts * counts.log2()).sum())


def _groups(model: PreTrainedModel, before: dict[str, Tensor], sizes: Sizes) -> Iterator[Group]:
    """One for each kind, largest first, then what lies around the weights."""
    prefix = checkpoint.wrapper_prefix(model)
    now = {name.removeprefix(prefix): tensor for name, tensor in saved_tensors(model)}
    old = {name.removeprefix(prefix): tensor for name, tensor in before.items()}
    found = []
    for kind in dict.fromkeys(t.kind for t in sizes.tensors):
        mine = [t for t in sizes.tensors if t.kind == kind]
        floats = [t.name for t in mine if old[t.name].is_floating_point()]
        found.append(
            Group(
                kind,
                sum(t.weights for t in mine),
                sum(old[t.name].nbytes for t in mine),
                sum(t.codes / 8 + t.arrays for t in mine),
                sum(_squares(now[n].detach().float() - old[n].float()) for n in floats),
                sum(_squares(old[n].float()) for n in floats),
            )
        )
    yield from sorted(found, key=lambda group: -group.after)
    around = sizes.total - sum(group.after for group in found)
    yield Group("tables, index, header", 0, 0, around, 0.0, 0.0)


def _squares(x: Tensor) -> float:
    return x.square().sum(dtype=torch.float64).item()
