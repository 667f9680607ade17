"""The real two-dimensional Fourier basis of a convolution kernel's slices."""

import math
from functools import cache

import torch
from torch import Tensor


@cache
def real_dft(height: int, width: int, device: torch.device) -> Tensor:
    """The orthonormal real two-dimensional Fourier basis, float32 [H·W, H·W]: a slice's coefficients are basis @ slice.

    Row fy·W + fx is a cosine of that frequency, or, where the conjugate frequency (−fy, −fx) comes earlier, its sine:
    H·W degrees of freedom exactly.
    """
    size = height * width
    rows = []
    for fy in range(height):
        for fx in range(width):
            conjugate = (-fy % height, -fx % width)
            wave = math.sin if conjugate < (fy, fx) else math.cos
            norm = math.sqrt((1 if conjugate == (fy, fx) else 2) / size)
            turns = [(fy * y * width + fx * x * height) % size / size for y in range(height) for x in range(width)]
            rows.append([norm * wave(2 * math.pi * turn) for turn in turns])
    return torch.tensor(rows, dtype=torch.float32, device=device)
