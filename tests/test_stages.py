"""Settings of stages."""

import pytest
import torch
from transformers import TrainingArguments

from hfcompress.stages import slow_on


@pytest.mark.parametrize(("capability", "told"), [("AVX2", True), ("DEFAULT", True), ("AVX512", False)])
def test_bfloat16_where_it_is_slow_is_told(capability, told, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    found = slow_on(TrainingArguments(str(tmp_path), bf16=True, use_cpu=True))
    assert ("training.bf16=false" in found) if told else found is None
    assert slow_on(TrainingArguments(str(tmp_path), use_cpu=True)) is None
