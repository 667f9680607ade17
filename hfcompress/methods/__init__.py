"""Every method, one file per paper; the whole registry is this tuple."""

from hfcompress.methods.dense import Dense
from hfcompress.methods.uniform import Uniform
from hfcompress.reparameterization import Reparameterization

METHODS: tuple[type[Reparameterization], ...] = (Dense, Uniform)

BY_NAME: dict[str, type[Reparameterization]] = {method.__name__.lower(): method for method in METHODS}
"""How recipes and files call them."""

__all__ = ["BY_NAME", "METHODS", "Dense", "Uniform"]
