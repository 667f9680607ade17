"""The transformers plug-in: `import hfcompress`, and from_pretrained reads compressed folders and repositories.

The result is an ordinary dense model. Before the loader reads anything, the file is checked and decoded here, where
an error is still an error; inside the loader it would become a warning. Then the loader opens the file too, collects
its arrays under one anchor parameter and hands them to `_Decode`, which returns the model's tensors by name instead.
"""

import re
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfcompress import cifar
from hfcompress.checkpoint import FILE_NAME, WRAPPER_PREFIX, check_names, read, wrapper_prefix
from hfcompress.compressor import unsaved
from hfcompress.errors import FormatError
from hfcompress.sealed import FORMAT, VERSION


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

    def convert(
        self, input_dict: dict[str, Any], *args: Any, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, Tensor]:
        tensors, prefix = self.hf_quantizer.take_tensors(), wrapper_prefix(model)
        return {
            prefix + name: tensor.to(_target_dtype(model, prefix + name, tensor)) for name, tensor in tensors.items()
        }

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
        self._arrays: list[str] = []
        self._anchor = ""

    def take_tensors(self) -> dict[str, Tensor]:
        """The decoded tensors, once: the loader is their only owner afterwards."""
        tensors, self._tensors = self._tensors, {}
        return tensors

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Called before the checkpoint is looked for (transformers ≥ 5.23)."""
        config.transformers_weights = FILE_NAME
        if config.model_type == "timm_wrapper":
            cifar.register()  # our own small networks, which timm does not have
        return config

    update_tp_plan = update_attn_implementation  # transformers < 5.23 calls this one at that moment

    def update_ep_plan(self, config: PretrainedConfig) -> PretrainedConfig:
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise FormatError(f"no {FILE_NAME} was found for a model whose config.json says it is compressed")
        reader = read(checkpoint_files[0])
        prefix, found = wrapper_prefix(model), reader.shapes().keys()
        wanted = {name.removeprefix(prefix): tuple(t.shape) for name, t in model.state_dict().items()}
        optional = unsaved(model)
        for names in _ties(model):
            tied = {name.removeprefix(prefix) for name in names}
            if tied & found:
                optional |= tied
        check_names(reader, wanted, optional)
        with torch.device("cpu"):  # around us the empty model is being made, on the meta device
            self._tensors, self._arrays = dict(reader.tensors()), sorted(reader.arrays)
        # the shortest name: the loader takes a name for a pattern where it is a part of the anchor's
        self._anchor = min(model.state_dict(), key=lambda name: (len(name), name))

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self._arrays:
            return []
        # the loader may have put a wrapper's prefix before our arrays' names already
        names = [f"^(?:{re.escape(WRAPPER_PREFIX)})?{name}$" for name in self._arrays]
        return [WeightConverter(names, self._anchor, [_Decode(self)])]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        conversions = getattr(model, "_weight_conversions", None) or []
        ours = [c for c in conversions if any(isinstance(o, _Decode) for o in getattr(c, "operations", ()))]
        model._weight_conversions = [c for c in conversions if c not in ours] or None
        del model.config.transformers_weights
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _target_dtype(model: PreTrainedModel, name: str, tensor: Tensor) -> torch.dtype:
    """The dtype from_pretrained was asked for, which the empty model already has; integers stay integers."""
    return model.get_parameter_or_buffer(name).dtype if tensor.is_floating_point() else tensor.dtype


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
