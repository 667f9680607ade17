"""Recipes for tests, as text, and how `load` refuses what is made of them."""

from pathlib import Path

import pytest

from hfcompress.errors import ConfigError
from hfcompress.recipe import load

DIGITS = """\
# Digits.
name: digits
images: {embedded: digits, size: 8}
teacher:
  timm: resnet10t
  arguments: {in_chans: 1}
student:
  timm: resnet10t
compression:
  rules:
    - kinds: [linear, conv]
      method:
        uniform: {bits: 4, bucket: 256}
    - {pattern: "*", method: {dense: {dtype: float16}}}
evaluation:
  batch_size: 32
"""

CLDR = """\
name: cldr
description: Dates and numbers, German to Norwegian
translation: {embedded: cldr, source: de, target: no}
vocabulary: {size: 500}
teacher:
  marian: {d_model: 64, dropout: 0.1}
  training:
    learning_rate: 1e-3
    num_train_epochs: 3
    predict_with_generate: true
student:
  from_teacher: {encoder_layers: 2, decoder_layers: 1}
  training: {optim: adamw_torch, report_to: [none], eval_strategy: no}
compression:
  rules: [{method: {uniform: {bits: 2, bucket: null}}}]
  training: {learning_rate: 1e-4}
training: {per_device_train_batch_size: 16}
"""

TINY = """\
name: tiny
images: {embedded: digits, size: 8, mean: [0.3], std: [0.4], train_rows: 64, test_rows: 20}
teacher: {timm: cifar_resnet20, arguments: {in_chans: 1}}
student: {timm: cifar_resnet20, arguments: {in_chans: 1}}
compression:
  rules: [{method: {uniform: {bits: 4}}, kinds: [conv, linear]}]
training: {max_steps: 1}
evaluation: {bootstrap: 0}
"""

BOTH = f"{DIGITS}---\n{CLDR}"


def written(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The message with which `load` refuses, the file's name cut from each of its lines."""
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    lines = str(error.value).split("\n")
    assert all(line.startswith(f"{path}:") for line in lines)
    return "\n".join(line.removeprefix(f"{path}:") for line in lines)
