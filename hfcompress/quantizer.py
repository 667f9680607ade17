"""The transformers plug-in: `import hfcompress`, and from_pretrained reads compressed folders and repositories.

The result is an ordinary dense model. The loader opens the file this points it to, collects its five arrays under one
anchor parameter and hands them to `_Decode`, which returns every tensor of the model under its own name.
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
from hfcompress.checkpoint import FILE_NAME, WRAPPER_PREFIX, check_names, read
from hfcompress.container import FORMAT, VERSION, Reader
from hfcompress.errors import FormatError


@register_quantization_config(FORMAT)
class HFCompressConfig(QuantizationConfigMixin):
    """config.json's `quantization_config`. Everything else stands in the compressed file itself."""

    dequantize = True  # transformers then forgets the quantizer after loading: the model is a plain dense one

    def __init__(self, format_version: int = VERSION, **unknown: Any) -> None:
        self.quant_method = FORMAT
        self.format_version = format_version
        if format_version != VERSION:
            raise FormatError(
                f"format version {format_version}, this package reads {VERSION}: upgrade hfcompress"
            )


class _Decode(ConversionOps):
    """From the file's arrays to the model's tensors."""

    def __init__(self, quantizer: "HFCompressQuantizer") -> None:
        self.hf_quantizer = (
            quantizer  # a truthy attribute of this name tells the loader not to cast our bytes
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Decode":
        return self  # the loader copies the converter for each anchor; the opened file must not be copied

    def convert(
        self, input_dict: dict[str, Any], *args: Any, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, Tensor]:
        reader, prefix = self.hf_quantizer.take_reader(), _prefix(model)
        return {
            prefix + name: tensor.to(_target_dtype(model, prefix + name, tensor))
            for name, tensor in reader.tensors()
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
        self._reader: Reader | None = None
        self._anchor = ""

    def take_reader(self) -> Reader:
        """The opened file, once: what it holds is freed as soon as it is decoded."""
        reader, self._reader = self._reader, None
        if reader is None:
            raise FormatError("the compressed file was not opened before its weights were asked for")
        return reader

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
        self._reader = read(checkpoint_files[0])
        prefix = _prefix(model)
        wanted = {name.removeprefix(prefix): tuple(t.shape) for name, t in model.state_dict().items()}
        optional = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        tied = {name.removeprefix(prefix) for name in _aliases(model)} - self._reader.shapes().keys()
        check_names(self._reader, wanted, optional | tied)
        # no other tensor's name may be a part of the anchor's, or the loader takes it for a pattern: the shortest is safe
        self._anchor = min(model.state_dict(), key=lambda name: (len(name), name))

    def get_weight_conversions(self) -> list[WeightConverter]:
        reader = self._reader
        if reader is None:
            return []
        # the loader may have put a wrapper's prefix before our arrays' names already
        names = [f"^(?:{re.escape(WRAPPER_PREFIX)})?{name}$" for name in sorted(reader.arrays)]
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


def _prefix(model: PreTrainedModel) -> str:
    return WRAPPER_PREFIX if model.config.model_type == "timm_wrapper" else ""


def _target_dtype(model: PreTrainedModel, name: str, tensor: Tensor) -> torch.dtype:
    """The dtype from_pretrained was asked for, which the empty model already has; integers stay integers."""
    return model.get_parameter_or_buffer(name).dtype if tensor.is_floating_point() else tensor.dtype


def _aliases(model: PreTrainedModel) -> set[str]:
    """Names of tied weights, of which the file holds one a group."""
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(name)
    tied = {name for names in by_tensor.values() if len(names) > 1 for name in names}
    declared = model.all_tied_weights_keys
    return tied | set(declared) | set(declared.values())
