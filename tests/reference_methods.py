"""How each method's parts become a weight: the page docs/format.md, section "Methods", in plain loops.

It imports nothing of the package. Every operation on float32 numbers rounds once; numpy fuses none.
"""

import math
from typing import Any

import numpy as np

Parts = dict[str, np.ndarray]
ZERO = np.float32(0)


def weight(shape: list[int], dtype: str, method: dict[str, Any], parts: Parts, offset: int, total: int) -> np.ndarray:
    """The weight, in the slot's dtype (bfloat16: its bits). method: {name: fields}."""
    ((name, fields),) = method.items()
    n = math.prod(shape)
    if name == "dense":
        flat = parts["weight"].astype(np.float32)
    elif name == "uniform":
        flat = uniform(fields, parts, n)
    elif name == "levels":
        flat = levels(fields, parts, n)
    elif name == "magnitude" or (name == "softthreshold" and fields.get("survivors", "float16") == "float16"):
        flat = sparse(parts, n)
    elif name == "softthreshold":
        flat = grid(parts, n)
    elif name == "entropypenalized":
        flat = penalized(fields, parts, shape, n)
    elif name == "multihash":
        flat = hashed(fields, parts, n, offset, total)
    else:
        raise ValueError(f"the page has no method {name}")
    return cast(flat, dtype).reshape(shape)


def cast(flat: np.ndarray, dtype: str) -> np.ndarray:
    """To nearest, ties to even; numpy has no bfloat16: the upper 16 bits of a float32, rounded."""
    with np.errstate(over="ignore"):
        if dtype != "bfloat16":
            return flat.astype(dtype)
    bits = flat.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16) % 2) >> 16).astype(np.uint16)


def bucket_of(fields: dict[str, Any], i: int) -> int:
    size = fields.get("bucket", 256)
    return 0 if size is None else i // size


def uniform(fields: dict[str, Any], parts: Parts, n: int) -> np.ndarray:
    codes, step = parts["codes"].astype(np.float32), parts["step"].astype(np.float32)
    origin = parts["zero" if fields.get("zero_point", False) else "low"].astype(np.float32)
    found = np.zeros(n, dtype=np.float32)
    for i in range(n):
        b = bucket_of(fields, i)
        found[i] = (codes[i] - origin[b]) * step[b] if "zero" in parts else codes[i] * step[b] + origin[b]
    return found


def levels(fields: dict[str, Any], parts: Parts, n: int) -> np.ndarray:
    points, low, span = (parts[name].astype(np.float32) for name in ("points", "low", "span"))
    found = np.zeros(n, dtype=np.float32)
    for i in range(n):
        b = bucket_of(fields, i)
        found[i] = points[parts["codes"][i]] * span[b] + low[b]
    return found


def sparse(parts: Parts, n: int) -> np.ndarray:
    found, following = np.zeros(n, dtype=np.float32), 0
    for i in range(n):
        if parts["alive"][i]:
            found[i] = np.float32(parts["survivors"][following])
            following += 1
    return found


def grid(parts: Parts, n: int) -> np.ndarray:
    found = np.zeros(n, dtype=np.float32)
    for i, code in enumerate(parts["codes"].astype(np.float32)):
        found[i] = (code - np.sign(code) / np.float32(2)) * parts["step"][0]
    return found


def penalized(fields: dict[str, Any], parts: Parts, shape: list[int], n: int) -> np.ndarray:
    step = np.array([int(bits) % 65536 << 16 for bits in parts["step"]], dtype=np.uint32).view(np.float32)
    places = math.prod(shape[2:]) if fields.get("transform", "none") == "dft" and len(shape) == 4 else 1
    transformed = 1 < places <= 64
    places = places if transformed else 1
    c = np.zeros(n, dtype=np.float32)
    for i in range(n):
        c[i] = np.float32(parts["codes"][i]) * step[i % places]
    if not transformed:
        return c
    waves = basis(shape[2], shape[3])
    found = np.zeros(n, dtype=np.float32)
    for i in range(n):
        p, t = i % places, ZERO
        for f in range(places):
            t = t + waves[f, p] * c[i - p + f]
        found[i] = t
    return found


def basis(height: int, width: int) -> np.ndarray:
    """[H·W, H·W] in double precision, then rounded to float32."""
    size = height * width
    found = np.zeros((size, size))
    for f in range(size):
        for p in range(size):
            (fy, fx), (y, x) = divmod(f, width), divmod(p, width)
            g = (-fy % height) * width + -fx % width
            turn = ((fy * y * width + fx * x * height) % size) / size
            wave = math.sin if g < f else math.cos
            found[f, p] = math.sqrt((1 if g == f else 2) / size) * wave(6.283185307179586 * turn)
    return found.astype(np.float32)


def hashed(fields: dict[str, Any], parts: Parts, n: int, offset: int, total: int) -> np.ndarray:
    m = math.isqrt(total - 1) + 1 if total else 0
    rank = len(parts["left"]) // max(m, 1)
    left, right = ([int(code) for code in parts[name]] for name in ("left", "right"))
    by_row, by_column = (parts[f"{name}_amplitude"].astype(np.float32) for name in ("left", "right"))
    top = 2 ** (fields.get("bits", 8) - 1) - 1
    factor = parts["scale"][0] / np.float32(top**2)
    found = np.zeros(n, dtype=np.float32)
    for i in range(n):
        row, column = divmod(offset + i, m)
        s = sum(left[row * rank + k] * right[column * rank + k] for k in range(rank))
        found[i] = np.float32(s) * by_row[row] * by_column[column] * factor + ZERO
    return found
