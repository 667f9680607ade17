"""How many operations compression adds to a step: on a GPU about as many kernels, and for small tensors the time.

    python benchmarks/operations.py

Counted on a CPU while it works as a GPU does: weights of a rule decoded together, nothing cut to fit a cache. "One by
one" is what it does otherwise. Views are left out; so is the optimizer.
"""

from collections import Counter
from typing import Any

from overhead import METHODS, compression, images, marian, resnet20, row, sentences
from torch.utils._python_dispatch import TorchDispatchMode

from hfcompress import Compressor, density, together
from hfcompress.methods import levels

VIEWS = {"view", "detach", "split", "unsqueeze", "squeeze", "expand", "slice", "select", "alias", "_unsafe_view", "t"}
VIEWS |= {"transpose", "split_with_sizes", "unbind", "as_strided", "_local_scalar_dense", "permute"}


class Counting(TorchDispatchMode):
    """What is dispatched while it is on, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := function.__name__.split(".")[0]) not in VIEWS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def of_step(name: str, text: bool) -> int:
    """Decoding, and the gradients' way back, of one step."""
    model, batch = (marian(), sentences()) if text else (resnet20(), images())
    spec = compression(name)
    compressor = Compressor(model, spec.rules, rate_weight=spec.rate_weight)
    model(**{key: value[:2] for key, value in batch.items()}).loss.backward()
    with Counting() as counting:
        compressor.write(hard=False)
        compressor.pull_back()
    return counting.found.total()


def of_model(text: bool) -> int:
    model, batch = (marian(), sentences()) if text else (resnet20(), images())
    with Counting() as counting:
        model(**{key: value[:2] for key, value in batch.items()}).loss.backward()
    return counting.found.total()


def main() -> None:
    row("operations of a step", "forward and backward", *METHODS)
    row(*["---"] * (len(METHODS) + 2))
    for label, text in (("Marian 256, 3+3", True), ("ResNet-20", False)):
        for way in ("one by one", "together"):
            density.CHUNK = levels.CELLS = 1 << 30
            together.AT_ONCE["cpu"] = 1 << 24 if way == "together" else 1
            row(f"{label}, {way}", f"{of_model(text):,}", *(f"{of_step(name, text):,}" for name in METHODS))


if __name__ == "__main__":
    main()
