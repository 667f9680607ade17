"""What `hfcompress compress` makes of trained models, without data, beside what people use.

    python benchmarks/compress.py MODEL …        # folders or repositories of transformers or timm

For each: the file at 4 bits and the same weights in int8 and gzip; then 4-bit buckets of 256 weights between their
least and greatest (`--method uniform`), coded by the same coder, and how many bits of the default's grid have their
error. Bytes are those of files. Error: ‖w − w'‖ / ‖w‖ over matrices and kernels. Seconds: of the CPU.
"""

import math
import sys
import tempfile
import time
from pathlib import Path

from hfcompress.compress import Outcome, compress
from hfcompress.compress_rules import default_rules
from hfcompress.evaluate import int8_gzip_bytes
from hfcompress.methods import Uniform
from hfcompress.originals import Original, load_original


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def written(original: Original, **options: object) -> Outcome:
    """`original` is as it was afterwards."""
    before = {name: tensor.clone() for name, tensor in original.model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        outcome = compress(original, Path(folder), **options)  # type: ignore[arg-type]
    original.model.load_state_dict(before)
    return outcome


def bits_of(outcome: Outcome) -> float:
    """A weight of the matrices and kernels."""
    chosen = [group for group in outcome.groups if group.relative_error > 1e-3]
    return 8 * sum(group.after for group in chosen) / sum(group.weights for group in chosen)


def at_error(original: Original, error: float) -> Outcome:
    """On the default's grid, by regula falsi: a bit halves the error."""
    bits = 4.0
    for _ in range(5):
        outcome = written(original, bits=bits)
        if abs(outcome.relative_error / error - 1) < 2e-3:
            break
        bits += 0.9 * math.log2(outcome.relative_error / error)
    return outcome


def main() -> None:
    row(
        "model", "weights", "4 bits", "int8 + gzip", "", "seconds", "4-bit buckets", "their error", "the grid at it", ""
    )
    row(*["---"] * 10)
    for name in sys.argv[1:]:
        original = load_original(name)
        gzip = int8_gzip_bytes(original.model)
        started = time.process_time()
        grid = written(original, bits=4.0)
        seconds = time.process_time() - started
        buckets = written(original, rules=default_rules(original.model, Uniform(bits=4)))
        same = at_error(original, buckets.relative_error)
        row(
            Path(name).name,
            f"{grid.sizes.weights:,}",
            f"{grid.sizes.total:,}",
            f"{gzip:,}",
            f"{grid.sizes.total / gzip:.3f} ×",
            f"{seconds:.1f}",
            f"{bits_of(buckets):.3f} bits",
            f"{100 * buckets.relative_error:.2f} %",
            f"{bits_of(same):.3f} bits ({100 * same.relative_error:.2f} %)",
            f"{bits_of(same) - bits_of(buckets):+.3f} bits",
        )


if __name__ == "__main__":
    main()
