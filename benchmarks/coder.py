"""How small and how fast the coder is on the integers of trained networks, beside NNCodec's DeepCABAC.

    python benchmarks/coder.py WEIGHTS.safetensors … [--bits 0.5 1 2 4] [--nncodec PYTHON]

Every array of two axes or more is rounded to a multiple of one step · its standard deviation, the step such that the
static entropies come to the bits asked for. All sizes are bytes of streams and tables, in % of that entropy. PYTHON: an
interpreter with `pip install nncodec` (it wants other versions than we do); its best `scan_order` and unary length 10.
Times are of this process alone (CPU seconds), beside a copy of the same integers.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from hfcompress.coding import Symbols, rans
from hfcompress.coding.decoder import Arrays, Place, Tables
from hfcompress.coding.plan import plan

_NNCODEC = """
import sys
import numpy as np
from nncodec.extensions import deepCABAC
from nncodec.nnc_core.hdsp.hdsp_tool import HDSP_OPTS_OFF

def size(integers, order):
    encoder = deepCABAC.Encoder()
    encoder.initCtxModels(10, 1)
    skipped = np.zeros(integers.shape[0], np.int32)
    encoder.encodeLayer(integers, 0, order, 0, 0, 0, skipped, *HDSP_OPTS_OFF(), 0, 0)
    return len(encoder.finish().tobytes())

arrays = np.load(sys.argv[1])
print(min(sum(size(arrays[name], order) for name in arrays.files) for order in (0, 1, 2)))
"""


def rounded(weights: list[np.ndarray], bits: float) -> list[Symbols]:
    """Integers whose static entropies come to `bits` a weight."""
    total, low, high = sum(w.size for w in weights), -10.0, 10.0
    while True:
        middle = (low + high) / 2
        found = [Symbols(np.rint(w / (2**middle * w.std())).astype(np.int32).reshape(-1), w.shape) for w in weights]
        entropy = sum(s.entropy() for s in found) / total
        if abs(entropy / bits - 1) < 1e-5 or high - low < 1e-9:
            return found
        low, high = (middle, high) if entropy > bits else (low, middle)


def of_nncodec(python: str, given: list[Symbols]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "integers.npz")
        np.savez(path, *(s.values.reshape(s.shape) for s in given))
        done = subprocess.run([python, "-c", _NNCODEC, str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure(given: list[Symbols]) -> tuple[int, float, float]:
    """Bytes, seconds to encode (the choice included), seconds to decode."""
    started = time.process_time()
    chosen = plan(given, [])
    stream = chosen.stream(b"")
    encoded = time.process_time()
    places = [Place(s.values.size, form, s.shape or ()) for s, form in zip(given, chosen.forms)]
    arrays = Arrays(places, [], Tables.read(chosen.tables), stream, chosen.states)
    for number, symbols in enumerate(given):
        assert np.array_equal(arrays.read(number)[0], symbols.values)
    arrays.finish()
    return stream.nbytes + len(chosen.tables), encoded - started, time.process_time() - encoded


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def sizes(path: str, bits: list[float], python: str | None) -> None:
    weights = [w.astype(np.float64) for w in load_file(path).values() if w.ndim > 1 and w.dtype.kind == "f"]
    for asked in bits:
        given = rounded(weights, asked)
        n, entropy = sum(s.values.size for s in given), sum(s.entropy() for s in given) / 8
        size, encode, decode = measure(given)
        plain = measure([Symbols(s.values) for s in given])[0]
        other = f"{100 * (of_nncodec(python, given) / entropy - 1):+.1f} %" if python else ""
        shares = (f"{100 * (b / entropy - 1):+.1f} %" for b in (plain, size))
        row(
            Path(path).stem,
            f"{asked:g}",
            f"{entropy:,.0f}",
            *shares,
            other,
            f"{n / encode / 1e6:.1f}",
            f"{n / decode / 1e6:.1f}",
        )


def speeds(n: int = 1 << 24) -> None:
    """Static tables, as for large weights."""
    for scale in (0.5, 3.0):
        symbols = Symbols(np.rint(np.random.default_rng(0).laplace(0, scale, n)).astype(np.int32))
        measure([Symbols(symbols.values[:4096])])  # numba compiles
        size, encode, decode = min((measure([symbols]) for _ in range(3)), key=lambda found: found[2])
        started = time.process_time()
        symbols.values.copy()
        copy = time.process_time() - started
        over = f"{100 * (8 * size / symbols.entropy() - 1):+.3f} %"
        rates = (f"{n / seconds / 1e6:.0f}" for seconds in (encode, decode, copy))
        row(f"{symbols.entropy() / n:.2f}", over, *rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="*")
    parser.add_argument("--bits", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 3, 4, 5, 6])
    parser.add_argument("--nncodec")
    options = parser.parse_args()
    if options.weights:
        row("integers of", "bits", "entropy, bytes", "tables only", "hfcompress", "NNCodec", "enc M/s", "dec M/s")
        row(*["---"] * 8)
    for path in options.weights:
        sizes(path, options.bits, options.nncodec)
    print(f"\n{1 << 24:,} Laplace symbols, {'numba' if rans.fast else 'numpy'}, M symbols/s")
    row("entropy", "over it", "enc", "dec", "copy")
    row(*["---"] * 5)
    speeds()


if __name__ == "__main__":
    main()
