"""Bytes at equal weight error: a uniform grid in our file's coder, beside NNCodec's dependent (trellis) quantization.

    python benchmarks/dependent.py WEIGHTS.safetensors … --nncodec PYTHON [--qp -16 -20 -24 -28]

NNCodec quantizes every array of two axes or more at the parameter `qp`; its bytes are those of the whole bitstream.
Ours has one step for all arrays, such that the squared error is the same; bytes of streams and tables. PYTHON: an
interpreter with `pip install nncodec`.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from coder import measure, row
from safetensors.numpy import load_file

from hfcompress.coding import Symbols

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


def ours(weights: list[np.ndarray], error: float) -> int:
    """Bytes on the grid whose squared error is `error`."""
    low, high = -20.0, 10.0
    for _ in range(40):
        middle = (low + high) / 2
        found = sum(((np.rint(w / 2**middle) * 2**middle - w) ** 2).sum() for w in weights)
        low, high = (middle, high) if found < error else (low, middle)
    given = [Symbols(np.rint(w / 2**low).astype(np.int32).reshape(-1), w.shape) for w in weights]
    return measure(given)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+")
    parser.add_argument("--nncodec", required=True)
    parser.add_argument("--qp", type=int, nargs="+", default=[-16, -20, -24, -28])
    options = parser.parse_args()
    row("weights of", "qp", "signal to error", "NNCodec, dependent", "hfcompress, uniform", "")
    row(*["---"] * 6)
    for path in options.weights:
        weights = {k: v for k, v in load_file(path).items() if v.ndim > 1 and v.dtype == np.float32}
        wide = [w.astype(np.float64) for w in weights.values()]
        power, count = sum((w**2).sum() for w in wide), sum(w.size for w in wide)
        sizes = of_nncodec(options.nncodec, weights, options.qp)
        for qp in options.qp:
            size, error = sizes[qp]
            mine = ours(wide, error)
            bits = [f"{8 * n / count:.3f} bits" for n in (size, mine)]
            over = f"{100 * (mine / size - 1):+.1f} %"
            row(Path(path).stem, str(qp), f"{10 * np.log10(power / error):.1f} dB", *bits, over)


if __name__ == "__main__":
    main()
