"""Compress small translation and image models while they train.

Importing this package lets transformers' `from_pretrained` read compressed folders and repositories; everything else
is loaded when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hfcompress import plugin

if TYPE_CHECKING:
    from hfcompress.checkpoint import save as save
    from hfcompress.compressor import Compressor as Compressor
    from hfcompress.loading import load as load
    from hfcompress.methods import Dense as Dense
    from hfcompress.methods import EntropyPenalized as EntropyPenalized
    from hfcompress.methods import Levels as Levels
    from hfcompress.methods import Magnitude as Magnitude
    from hfcompress.methods import MultiHash as MultiHash
    from hfcompress.methods import SoftThreshold as SoftThreshold
    from hfcompress.methods import Uniform as Uniform
    from hfcompress.redistribution import gradient_norms as gradient_norms
    from hfcompress.redistribution import redistribute_points as redistribute_points
    from hfcompress.reparameterization import Kind as Kind
    from hfcompress.reparameterization import Reparameterization as Reparameterization
    from hfcompress.saving import dequantize as dequantize
    from hfcompress.schema import Compression as Compression
    from hfcompress.schema import Distillation as Distillation
    from hfcompress.schema import Layers as Layers
    from hfcompress.schema import Rule as Rule
    from hfcompress.students import from_teacher as from_teacher
    from hfcompress.target import Target as Target
    from hfcompress.teacher_cache import TeacherCache as TeacherCache
    from hfcompress.trainer import CompressionTrainer as CompressionTrainer
    from hfcompress.trainer import Seq2SeqCompressionTrainer as Seq2SeqCompressionTrainer

_HOMES = {
    "Compression": "schema",
    "CompressionTrainer": "trainer",
    "Compressor": "compressor",
    "Dense": "methods",
    "Distillation": "schema",
    "EntropyPenalized": "methods",
    "Kind": "reparameterization",
    "Layers": "schema",
    "Levels": "methods",
    "MultiHash": "methods",
    "Reparameterization": "reparameterization",
    "Rule": "schema",
    "Seq2SeqCompressionTrainer": "trainer",
    "Magnitude": "methods",
    "SoftThreshold": "methods",
    "Target": "target",
    "TeacherCache": "teacher_cache",
    "Uniform": "methods",
    "dequantize": "saving",
    "from_teacher": "students",
    "gradient_norms": "redistribution",
    "load": "loading",
    "redistribute_points": "redistribution",
    "save": "checkpoint",
}

__all__ = list(_HOMES)

plugin.register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hfcompress' has no attribute '{name}'")
    return getattr(import_module(f"hfcompress.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
