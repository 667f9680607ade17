"""`hfcompress export`: a compressed model for programs that know nothing of it, run beside ours before it is let go.

compressed folder ──load──▶ ordinary dense model ─┬─▶ safetensors, float32 or float16
                                                  ├─▶ CTranslate2   (export_ctranslate2.py)
                                                  └─▶ ONNX          (export_onnx.py)
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from hfcompress.errors import ConfigError, HFCompressError
from hfcompress.files import write_atomically
from hfcompress.loading import class_for, load
from hfcompress.originals import copy_beside, saved_tensors
from hfcompress.probe import logits_of, sample_inputs
from hfcompress.saving import dequantize
from hfcompress.verify import file_at

_LARGEST = torch.finfo(torch.float16).max


def export(
    folder: Path, output: Path, to: str, *, quantization: str | None = None, sentences: Path | None = None
) -> Iterator[str]:
    """Write the model in `folder` to `output` as `to` (dense, fp16, ctranslate2 or onnx); say what was compared.

    quantization: CTranslate2's, which rounds the weights once more. sentences: a text file whose lines CTranslate2 and
    we translate; without it, made-up ones. Raises ConfigError: no compressed folder, a package is missing, a model that
    the form is not for; HFCompressError: what was written does not do what ours does.
    """
    file = file_at(folder)
    if to == "ctranslate2":
        need("ctranslate2")
        from hfcompress.export_ctranslate2 import to_ctranslate2

        yield from to_ctranslate2(load(file.parent), file.parent, output, quantization, sentences)
    elif to == "onnx":
        need("onnx", "onnxruntime", "onnxscript")
        from hfcompress.export_onnx import to_onnx

        yield from to_onnx(load(file.parent), file.parent, output)
    else:
        yield from to_dense(load(file.parent), file.parent, output, half=to == "fp16")


def need(*packages: str) -> None:
    """Raises ConfigError: one of them is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"this export needs {', '.join(missing)}: pip install 'hfcompress[export]'")


def to_dense(model: PreTrainedModel, folder: Path, output: Path, *, half: bool) -> Iterator[str]:
    """Plain safetensors, as save_pretrained writes them: the same numbers, or these rounded to float16."""
    wanted = {name: tensor.detach().clone() for name, tensor in saved_tensors(model)}
    inputs = sample_inputs(model)
    logits = logits_of(model, inputs)
    if half:
        wanted = {name: _halved(name, tensor) for name, tensor in wanted.items()}
        model = model.half()
    copy_beside(folder, output)
    dequantize(model).save_pretrained(output)
    _mend(output / "config.json")
    found = class_for(AutoConfig.from_pretrained(output)).from_pretrained(output).eval()
    written = dict(saved_tensors(found))
    other = sorted(n for n in wanted.keys() | written.keys() if n not in wanted or n not in written)
    other += [n for n in wanted.keys() & written.keys() if not torch.equal(wanted[n], written[n])]
    if other:
        raise HFCompressError(f"{output}: {len(other)} tensors are not ours, first {other[0]}; do not use it")
    yield f"{len(wanted)} tensors, read again by transformers: {'ours in float16' if half else 'ours'}, bit for bit"
    again = logits_of(found.float() if half else found, inputs)
    if half:
        yield f"largest difference of a logit to ours: {_largest(again - logits):.2g} of {_largest(logits):.3g}"
    elif not torch.equal(again, logits):
        raise HFCompressError(f"{output}: its logits are not ours; do not use it")
    else:
        yield "logits of a sample: equal to ours, bit for bit"
    yield f"{_size(output, 'model*.safetensors'):,} bytes of weights in {output}"


def _mend(config: Path) -> None:
    """timm stumbles over an entry `model_args` that holds nothing."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    if "model_args" in fields and fields["model_args"] is None:
        del fields["model_args"]
        write_atomically(config, (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())


def _halved(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if tensor.numel() and tensor.abs().max() > _LARGEST:
        raise ConfigError(f"{name} holds numbers above {_LARGEST:,.0f}, the largest of float16: export --to dense")
    return tensor.half()


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _size(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))
