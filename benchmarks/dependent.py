"""Bytes at equal weight error: our grids in our file's coder, beside NNCodec's dependent (trellis) quantization.

    python benchmarks/dependent.py WEIGHTS.safetensors … --nncodec PYTHON [--qp -16 -20 -24 -28]

NNCodec quantizes every array of two axes or more at the parameter `qp`; its bytes are those of the whole bitstream.
Ours have one step for all arrays, such that the squared error is the same: a uniform grid, each weight rounded, and the
dependent one of `hfcompress compress`; bytes of streams and tables. PYTHON: an interpreter with `pip install nncodec`.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from coder import measure, row
from safetensors.numpy import load_file

from hfcompress.coding import Symbols
from hfcompress.dependent import dependent_codes
from hfcompress.methods.entropy import LIMIT

_NNCODEC = """
import sys
import numpy as np
from nncodec.nnc.compression import compress, decompress

weights, stream = dict(np.load(sys.argv[1])), sys.argv[2]
for qp in map(int, sys.argv[3:]):
    compress(dict(weights), bitstream_path=stream, qp=qp, use_dq=True, opt_qp=False, verbose=False)
    found = decompress(stream)
    error = sum(((found[name] - weights[name]).astype(np.float64) ** 2).sum() for name in weights)
    print("row", qp, len(open(stream, "rb").read()), error)
"""


def of_nncodec(python: str, weights: dict[str, np.ndarray], qps: list[int]) -> dict[int, tuple[int, float]]:
    """qp → (bytes, squared error)."""
    with tempfile.TemporaryDirectory() as folder:
        given, stream = Path(folder, "weights.npz"), Path(folder, "stream.nnc")
        np.savez(given, **weights)
        command = [python, "-c", _NNCODEC, str(given), str(stream), *map(str, qps)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("row ")]
    return {int(qp): (int(size), float(error)) for qp, size, error in rows}


def rounded(w: np.ndarray, step: float) -> np.ndarray:
    return np.rint(w / step).astype(np.int32)


def dependent(w: np.ndarray, step: float) -> np.ndarray:
    return dependent_codes((w / step).astype(np.float32).reshape(-1), LIMIT).reshape(w.shape)


def ours(weights: list[np.ndarray], error: float, put: Callable[[np.ndarray, float], np.ndarray]) -> int:
    """Bytes on the grid, on which `put` puts weights, whose squared error is `error`."""
    low, high = -9.0, 3.0  # of so fine a grid that no code of these networks is beyond the limit
    while high - low > 1e-3:
        middle = (low + high) / 2
        found = sum(((put(w, 2**middle) * 2**middle - w) ** 2).sum() for w in weights)
        low, high = (middle, high) if found < error else (low, middle)
    return measure([Symbols(put(w, 2**low).reshape(-1), w.shape) for w in weights])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+")
    parser.add_argument("--nncodec", required=True)
    parser.add_argument("--qp", type=int, nargs="+", default=[-16, -20, -24, -28])
    options = parser.parse_args()
    row("weights of", "qp", "signal to error", "NNCodec, dependent", "hfcompress, uniform", "", "dependent", "")
    row(*["---"] * 8)
    for path in options.weights:
        weights = {k: v for k, v in load_file(path).items() if v.ndim > 1 and v.dtype == np.float32}
        wide = [w.astype(np.float64) for w in weights.values()]
        power, count = sum((w**2).sum() for w in wide), sum(w.size for w in wide)
        sizes = of_nncodec(options.nncodec, weights, options.qp)
        for qp in options.qp:
            size, error = sizes[qp]
            cells = [f"{8 * size / count:.3f} bits"]
            for mine in (ours(wide, error, rounded), ours(wide, error, dependent)):
                cells += [f"{8 * mine / count:.3f} bits", f"{100 * (mine / size - 1):+.1f} %"]
            row(Path(path).stem, str(qp), f"{10 * np.log10(power / error):.1f} dB", *cells)


if __name__ == "__main__":
    main()
