"""What every test file shares: no network, one thread, and small models of every family we promise to read."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    M2M100Config,
    MarianConfig,
    MT5Config,
    PegasusConfig,
    PreTrainedModel,
    T5Config,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    set_seed,
)

from hfcompress import zoo
from hfcompress.compressor import Compressor
from hfcompress.methods import Dense, Uniform
from hfcompress.reparameterization import Kind
from hfcompress.schema import Rule

torch.set_num_threads(1)
settings.register_profile("hfcompress", deadline=None, derandomize=True)
settings.load_profile("hfcompress")

_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
_HALVES = {
    side: 2 for side in ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
}
_HALVES |= {
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "d_model": 16,
    "vocab_size": 60,
    "max_position_embeddings": 40,
}
_T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, **_TOKENS}
TRANSLATORS = {
    "marian": lambda: MarianConfig(**_HALVES, **_TOKENS, forced_eos_token_id=1),
    "bart": lambda: BartConfig(**_HALVES, **_TOKENS, bos_token_id=2, forced_eos_token_id=1),
    "m2m_100": lambda: M2M100Config(**_HALVES, **_TOKENS, bos_token_id=2),
    "pegasus": lambda: PegasusConfig(**_HALVES, **_TOKENS, forced_eos_token_id=1),
    "t5": lambda: T5Config(**_T5),
    "mt5": lambda: MT5Config(**_T5, tie_word_embeddings=False),
}
CLASSIFIERS = ("test_resnet", "test_vit", "cifar_resnet20")
MODELS = (*TRANSLATORS, *CLASSIFIERS)


def make_model(name: str) -> PreTrainedModel:
    """A small model of that family with random weights and batch-norm statistics, in eval mode."""
    set_seed(7)
    if name in TRANSLATORS:
        model = AutoModelForSeq2SeqLM.from_config(TRANSLATORS[name]())
        model.generation_config.max_length = 12
    else:
        zoo.register()
        size = 32 if name == "cifar_resnet20" else 64
        config = TimmWrapperConfig(
            architecture=name,
            model_args={"img_size": size} if name == "test_vit" else None,
            pretrained_cfg={"input_size": [3, size, size], "mean": [0.5] * 3, "std": [0.5] * 3},
            num_labels=7,
        )
        model = TimmWrapperForImageClassification(config)
    return unsettled(model)


def unsettled(model: PreTrainedModel) -> PreTrainedModel:
    """The model in eval mode, none of its weights and statistics at its neutral starting value."""
    fixed = set(model._keys_to_ignore_on_save or ())
    with torch.no_grad():
        for tensor_name, tensor in model.state_dict().items():
            if tensor_name not in fixed and tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape))
    return model.eval()


def compress(model: nn.Module) -> Compressor:
    """Four-bit matrices, sixteen-bit biases where there are any; norms and whatever else there is as they are."""
    rules = [Rule(method=Uniform(bits=4, bucket=64), kinds=(Kind.LINEAR, Kind.EMBEDDING, Kind.CONV))]
    if any(name.endswith("bias") for name, _ in model.named_parameters()):
        rules.append(Rule(method=Dense("float16"), kinds=(Kind.BIAS,)))
    return Compressor(model, rules)


def make_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two inputs of the model's kind."""
    generator = torch.Generator().manual_seed(3)
    if model.config.is_encoder_decoder:
        draw = [torch.randint(3, 60, (2, 6), generator=generator) for _ in range(2)]
        return {"input_ids": draw[0], "decoder_input_ids": draw[1]}
    return {"pixel_values": torch.randn(2, *model.config.pretrained_cfg["input_size"], generator=generator)}


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Runs Python code in a fresh process (`fails`: it must) and gives its standard output (`fails`: error).

    The process finds the tests' own modules.
    """

    paths = [path for path in (str(Path(__file__).parent), os.environ.get("PYTHONPATH")) if path]

    def run(code: str, *arguments: object, fails: bool = False, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        )
        assert (done.returncode != 0) == fails, done.stderr
        return done.stderr if fails else done.stdout

    return run


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real datasets that HFCOMPRESS_DATA names."""
    folder = os.environ.get("HFCOMPRESS_DATA")
    if not folder:
        pytest.skip("HFCOMPRESS_DATA does not name the folder of datasets")
    return Path(folder)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Again for every file: ctranslate2, once loaded, sets the number for the whole process."""
    torch.set_num_threads(1)


@pytest.fixture
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what a command says."""
    return tmp_path_factory.mktemp("said")
