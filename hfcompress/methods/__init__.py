"""Every method, one file per paper; the whole registry is this tuple."""

from hfcompress.methods.dense import Dense
from hfcompress.methods.entropy import EntropyPenalized
from hfcompress.methods.hashing import MultiHash
from hfcompress.methods.levels import Levels
from hfcompress.methods.magnitude import Magnitude
from hfcompress.methods.threshold import SoftThreshold
from hfcompress.methods.uniform import Uniform
from hfcompress.reparameterization import Reparameterization

METHODS: tuple[type[Reparameterization], ...] = (
    Dense,
    Uniform,
    Levels,
    EntropyPenalized,
    SoftThreshold,
    MultiHash,
    Magnitude,
)

BY_NAME: dict[str, type[Reparameterization]] = {method.__name__.lower(): method for method in METHODS}
"""How recipes and files call them."""

__all__ = [
    "BY_NAME",
    "METHODS",
    "Dense",
    "EntropyPenalized",
    "Levels",
    "Magnitude",
    "MultiHash",
    "SoftThreshold",
    "Uniform",
]
