"""The transformers plug-in: `import hfcompress`, and from_pretrained reads compressed folders and repositories.

The result is an ordinary dense model. Before the loader reads anything, the file is checked and decoded here, where
an error is still an error; inside the loader it would become a warning. Then the loader opens the file too, takes its
one array (a view of the file, not read a second time) for that of one anchor parameter and hands it to `_Decode`, which
returns the model's tensors by name instead.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfcompress import positions, zoo
from hfcompress.checkpoint import FILE_NAME, check_names, read, wrapper_prefix
from hfcompress.claims import WRAPPER_PREFIX, unsaved
from hfcompress.container import Reader
from hfcompress.errors import ConfigError, FormatError
from hfcompress.saving import remember
from hfcompress.sealed import FORMAT, VERSION

_ARRAY = f"^(?:{re.escape(WRAPPER_PREFIX)})?{FORMAT}-{VERSION}$"
"""The file's array, before whose name the loader may have put a wrapper's prefix already."""


@register_quantization_config(FORMAT)
class HFCompressConfig(QuantizationConfigMixin):
    """config.json's `quantization_config`. Everything else stands in the compressed file itself."""

    dequantize = True  # transformers then forgets the quantizer after loading: the model is a plain dense one

    def __init__(self, format_version: int = VERSION, **unknown: Any) -> None:
        self.quant_method = FORMAT
        self.format_version = format_version
        if format_version != VERSION:
            raise FormatError(f"format version {format_version}, this package reads {VERSION}: upgrade hfcompress")


class _Decode(ConversionOps):
    """From the file's arrays to the model's tensors."""

    def __init__(self, quantizer: "HFCompressQuantizer") -> None:
        self.hf_quantizer = quantizer  # a truthy attribute of this name tells the loader not to cast our bytes

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Decode":
        return self  # the loader copies the converter for each anchor; the opened file must not be copied

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self.hf_quantizer.take_tensors()

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("a loaded model is dense and saves as such")


@register_quantizer(FORMAT)
class HFCompressQuantizer(HfQuantizer):
    """Points the loader at the compressed file and decodes it."""

    requires_calibration = True  # quantizing a dense model through from_pretrained is not what this is for

    def __init__(self, quantization_config: HFCompressConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._tensors: dict[str, Tensor] = {}
        self._file = Path()
        self._dtype = torch.float32
        self._anchor = ""  # the parameter that the file's array seems to be

    def take_tensors(self) -> dict[str, Tensor]:
        """The decoded tensors, once: the loader is their only owner afterwards."""
        tensors, self._tensors = self._tensors, {}
        return tensors

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Called with the dtype that the model will have."""
        self._dtype = dtype
        return dtype

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Called before the checkpoint is looked for (transformers ≥ 5.23)."""
        config.transformers_weights = FILE_NAME
        if config.model_type == "timm_wrapper":
            zoo.register()  # our own small networks, which timm does not have
        return config

    update_tp_plan = update_attn_implementation  # transformers < 5.23 calls this one at that moment

    def update_ep_plan(self, config: PretrainedConfig) -> PretrainedConfig:
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise FormatError(f"no {FILE_NAME} was found for a model whose config.json says it is compressed")
        self._file = Path(checkpoint_files[0])
        self._tensors = self._decode(model)
        # the shortest name: the loader takes a name for a pattern where it is a part of the anchor's
        self._anchor = min(model.state_dict(), key=lambda name: (len(name), name))

    def _decode(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Every tensor of the file in the dtype that it will have, each one decoded and cast before the next is."""
        reader = read(self._file)
        check_model(model, reader)
        prefix, target = wrapper_prefix(model), _dtypes(model, self._dtype)
        with _as_usual():
            tensors = {
                prefix + name: tensor.to(target[prefix + name]) if tensor.is_floating_point() else tensor
                for name, tensor in reader.tensors()
            }
            _check_ties(model, tensors)
            for name, table in positions.tables(model).items():
                table.data = table.data.to(target[name])
                tensors[name] = table
                model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True
        return tensors

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self._anchor:
            return []
        # force_cpu: decoded on the CPU, and brought by the loader to where its device_map says
        return [WeightConverter([_ARRAY], self._anchor, [_Decode(self)], force_cpu=True)]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        conversions = getattr(model, "_weight_conversions", None) or []
        ours = [c for c in conversions if any(isinstance(o, _Decode) for o in getattr(c, "operations", ()))]
        model._weight_conversions = [c for c in conversions if c not in ours] or _conversions_for_saving(model)
        del model.config.transformers_weights
        if self._tensors:  # the loader did not find the array that was there a moment ago
            self._tensors = {}
            raise FormatError(f"{self._file} was replaced while it was being loaded: load it again")
        remember(model, self._file)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _conversions_for_saving(model: PreTrainedModel) -> list[Any] | None:
    """Those by which timm's weights are saved under timm's names, as if they had been loaded under them."""
    return get_model_conversion_mapping(model, add_legacy=False) or None if wrapper_prefix(model) else None


def check_model(model: PreTrainedModel, reader: Reader) -> None:
    """Raises FormatError unless the file holds what `model` (which may be empty) needs, and nothing else.

    Raises ConfigError: it does not because `model` is another class than config.json names, say the base model.
    """
    prefix, found = wrapper_prefix(model), reader.shapes().keys()
    wanted = {name.removeprefix(prefix): tuple(t.shape) for name, t in model.state_dict().items()}
    optional = unsaved(model)
    for names in _ties(model):
        tied = {name.removeprefix(prefix) for name in names}
        if tied & found:
            optional |= tied
    try:
        check_names(reader, wanted, optional)
    except FormatError as error:
        written, asked = model.config.architectures or [], type(model).__name__
        if not written or asked in written:
            raise
        raise ConfigError(
            f"the compressed file is a {written[0]}'s, and a {asked} was asked for: load it by {written[0]} or the "
            f"Auto class of its task, and take what is wanted from that, as in model.{model.base_model_prefix}"
        ) from error


@contextmanager
def _as_usual() -> Iterator[None]:
    """Around us the empty model is being made: on the meta device, in the dtype that was asked for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def _dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each of the empty model's tensors, except what stays float32 in half precision (T5 has some)."""
    plan = model._get_dtype_plan(dtype)
    return {
        name: next((kept for part, kept in plan.items() if re.search(part, name)), tensor.dtype)
        for name, tensor in model.state_dict().items()
    }


def _check_ties(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Raises FormatError where a file has two values for what is one weight in the model."""
    for names in _ties(model):
        first, *others = sorted(names & tensors.keys()) or [""]
        for other in others:
            if not torch.equal(tensors[first], tensors[other]):
                raise FormatError(
                    f"the compressed file is of another model: {first} and {other} are tied, one weight under two "
                    "names, and differ in the file"
                )


def _ties(model: PreTrainedModel) -> list[set[str]]:
    """Groups of names of one weight, of which the file must hold at least one."""
    first: dict[int, str] = {}
    root = {n: first.setdefault(id(p), n) for n, p in model.named_parameters(remove_duplicate=False)}
    for target, source in model.all_tied_weights_keys.items():
        root[target] = root.get(source, source)
    groups: dict[str, set[str]] = {}
    for name, common in root.items():
        groups.setdefault(common, {common}).add(name)
    return [names for names in groups.values() if len(names) > 1]
