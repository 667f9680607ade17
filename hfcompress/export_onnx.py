"""To ONNX: images to logits, or source and target to logits; run by onnxruntime beside ours.

Matrices on a 4-bit grid with integer zero points keep their codes: ONNX Runtime's MatMulNBits takes them as they are.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.checkpoint import read
from hfcompress.coding import Symbols
from hfcompress.container import Reader
from hfcompress.errors import HFCompressError
from hfcompress.methods import Uniform
from hfcompress.originals import copy_beside
from hfcompress.probe import logits_of, sample_inputs

NAME = "model.onnx"
_BLOCKS = (16, 32, 64, 128, 256)
_TOLERANCE = 1e-3
"""Of the largest logit: what another order of additions may change."""


class _Sees(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        return logits


class _Translates(_Sees):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:  # type: ignore[override]
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids}
        logits: Tensor = self.model(**given, use_cache=False).logits
        return logits


def to_onnx(model: PreTrainedModel, folder: Path, output: Path) -> Iterator[str]:
    """Write `output`/model.onnx, config.json, the tokenizer's or processor's files. Raises as `export.export` does."""
    inputs = sample_inputs(model)
    network = (_Translates if model.config.is_encoder_decoder else _Sees)(model).eval()
    lengths = torch.export.Dim.DYNAMIC
    varying = {name: {i: lengths for i in ((0, 1) if x.ndim == 2 else (0,))} for name, x in inputs.items()}
    with torch.no_grad():
        program: Any = torch.onnx.export(
            network, kwargs=inputs, dynamo=True, dynamic_shapes=varying, output_names=["logits"], verbose=False
        )
    graph = program.model_proto
    packed = _keep_codes(graph, read(folder))
    output.mkdir(parents=True, exist_ok=True)
    onnx.save(graph, output / NAME)
    copy_beside(folder, output)
    model.config.save_pretrained(output)  # names of classes, ids of special tokens
    yield from _compare(model, output / NAME, inputs)
    if packed:
        yield f"{packed} matrices keep their 4-bit codes (MatMulNBits)"
    yield f"{(output / NAME).stat().st_size:,} bytes in {output / NAME}"


def _compare(model: PreTrainedModel, file: Path, inputs: dict[str, Tensor]) -> Iterator[str]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    longer = {name: torch.cat([x, x, x[:, :1]], 1) if x.ndim == 2 else torch.cat([x, x]) for name, x in inputs.items()}
    for given in (inputs, longer):
        ours = logits_of(model, given)
        theirs = torch.from_numpy(session.run(["logits"], {name: x.numpy() for name, x in given.items()})[0])
        most, size = (ours - theirs).abs().max().item(), ours.abs().max().item()
        shape = " × ".join(map(str, next(iter(given.values())).shape))
        if not most <= _TOLERANCE * max(size, 1.0):
            raise HFCompressError(f"{file}: its logits differ from ours by {most:.2g} of {size:.3g}; do not use it")
        yield f"logits of an input of {shape}: largest difference to ours {most:.2g} of {size:.3g}"


def _keep_codes(graph: Any, reader: Reader) -> int:
    """Put MatMulNBits in the place of products with matrices whose codes it can take; how many."""
    kept = _four_bit(reader)
    arrays = {init.name: init for init in graph.graph.initializer}
    count = 0
    for node in graph.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in arrays:
            continue
        matrix = numpy_helper.to_array(arrays[node.input[1]])
        found = kept.get(_key(matrix.T)) if matrix.ndim == 2 and matrix.dtype == np.float32 else None
        if found is None:
            continue
        codes, step, zero, block = found
        rows, columns = codes.shape
        names = [f"{node.input[1]}.{part}" for part in ("codes", "step", "zero")]
        if names[0] not in arrays:
            packed = _nibbles(codes).reshape(rows, columns // block, block // 2)
            parts = (packed, step.astype(np.float32), _nibbles(zero.reshape(rows, -1)).reshape(-1))
            for name, part in zip(names, parts):
                arrays[name] = numpy_helper.from_array(part, name)
                graph.graph.initializer.append(arrays[name])
        fields = {"K": columns, "N": rows, "bits": 4, "block_size": block, "accuracy_level": 1}
        product = helper.make_node(
            "MatMulNBits", [node.input[0], *names], list(node.output), domain="com.microsoft", **fields
        )
        node.CopyFrom(product)
        count += 1
    if count:
        graph.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        used = {name for node in graph.graph.node for name in node.input}
        unused = [init for init in graph.graph.initializer if init.name not in used]
        for init in unused:
            graph.graph.initializer.remove(init)
    return count


Codes = tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8], int]


def _four_bit(reader: Reader) -> dict[tuple[tuple[int, ...], bytes], Codes]:
    """(shape, digest) of a decoded matrix → its codes [rows, columns], steps, zero points, block."""
    chosen = {s.slot.name: s for s in reader.slots if _fits(s.method, s.slot.shape)}
    if not chosen:
        return {}
    values, found = reader.values(), {}
    for name, tensor in reader.tensors():
        if name in chosen:
            stored = chosen[name]
            parts = {key: values[part] for key, part in stored.parts.items()}
            symbols, step, zero = parts["codes"], parts["step"], parts["zero"]
            assert isinstance(symbols, Symbols) and isinstance(step, np.ndarray) and isinstance(zero, np.ndarray)
            codes = symbols.values.astype(np.uint8).reshape(stored.slot.shape)
            assert isinstance(stored.method, Uniform) and stored.method.bucket is not None
            found[_key(tensor.float().numpy())] = (codes, step, zero, stored.method.bucket)
    return found


def _fits(method: Any, shape: tuple[int, ...]) -> bool:
    """Whether MatMulNBits takes it: 4 bits, whole blocks in a row."""
    if not isinstance(method, Uniform) or not method.zero_point or method.bits != 4 or len(shape) != 2:
        return False
    return method.bucket in _BLOCKS and shape[1] % method.bucket == 0 and shape[0] > 0


def _key(matrix: NDArray[Any]) -> tuple[tuple[int, ...], bytes]:
    return matrix.shape, hashlib.sha256(np.ascontiguousarray(matrix).tobytes()).digest()


def _nibbles(numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two 4-bit numbers a byte along the last axis, the first in the low half, filled up with 0."""
    even: NDArray[Any] = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, numbers.shape[-1] % 2)])
    packed: NDArray[np.uint8] = (even[..., 0::2] | (even[..., 1::2] << 4)).astype(np.uint8)
    return packed
