"""Registers the plug-in with transformers when transformers' models are loaded, and not before: imports stay quick."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_MODELS = "transformers.modeling_utils"  # once it is loaded, everything the plug-in imports is
_PLUGIN = "hfcompress.quantizer"


class _AfterModels(MetaPathFinder):
    """Lets the usual finders find transformers' models, and imports the plug-in after them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODELS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            import_module(_PLUGIN)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Now if transformers' models are there already, else as soon as they are."""
    if _MODELS in sys.modules:
        import_module(_PLUGIN)
    else:
        sys.meta_path.insert(0, _AfterModels())
