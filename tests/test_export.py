"""`hfcompress export`: what is written does what ours does, and what does not is not let go."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from commands import hfcompress
from conftest import compress, make_inputs, make_model
from datasets import Dataset
from safetensors import safe_open
from transformers import AutoConfig

from hfcompress import load
from hfcompress.checkpoint import save
from hfcompress.compressor import Compressor
from hfcompress.errors import ConfigError, DataError, HFCompressError
from hfcompress.export import export, need
from hfcompress.methods import Dense, Uniform
from hfcompress.networks import translator
from hfcompress.originals import saved_tensors
from hfcompress.reparameterization import Kind
from hfcompress.schema import Network, Rule, TranslationData, Vocabulary
from hfcompress.tokenizer import train_tokenizer

PAIRS = {"source": ["ein Mann", "zwei Hüte", "drei rote Äpfel"] * 9, "target": ["a man", "two hats", "three"] * 9}
SMALL = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
SMALL |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}


def made(name: str, folder: Path) -> Path:
    model = make_model(name)
    save(model, folder, compress(model))
    return folder


def zero_points(model: torch.nn.Module) -> Compressor:
    grid = Uniform(bits=4, bucket=16, zero_point=True)
    kinds = (Kind.LINEAR, Kind.EMBEDDING)
    return Compressor(model, [Rule(method=grid, kinds=kinds), Rule(method=Dense(), kinds=(Kind.BIAS,))])


@pytest.fixture(scope="module")
def marian(tmp_path_factory) -> Path:
    """A translator with its tokenizer, whose padding row rounding moves off zero."""
    folder = tmp_path_factory.mktemp("marian")
    data = TranslationData(embedded="cldr", source="de", target="en", max_length=16)
    tokenizer = train_tokenizer(Dataset.from_dict(PAIRS), data, Vocabulary(size=28), folder)
    model = translator(Network(marian=SMALL), tokenizer, 16, 0, None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
        model.get_input_embeddings().weight[model.config.pad_token_id] = 0.0
    save(model, folder, zero_points(model))
    tokenizer.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------ dense


@pytest.mark.parametrize("name", ["marian", "t5", "m2m_100", "test_resnet", "test_vit", "cifar_resnet20"])
def test_dense_is_ours_bit_for_bit(name: str, tmp_path: Path, run_python) -> None:
    folder = made(name, tmp_path / "small")
    lines = list(export(folder, tmp_path / "dense", "dense"))
    assert "equal to ours, bit for bit" in lines[1] and (tmp_path / "dense" / "model.safetensors").is_file()
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    wanted = dict(saved_tensors(load(folder)))
    found = dict(saved_tensors(load(tmp_path / "dense")))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[n], found[n]) for n in wanted)


def test_a_dense_export_needs_no_hfcompress(tmp_path: Path) -> None:
    folder = made("test_resnet", tmp_path / "small")
    list(export(folder, tmp_path / "dense", "dense"))
    with safe_open(tmp_path / "dense" / "model.safetensors", "pt") as file:
        assert not any(key.startswith("timm_model.") for key in file.keys())  # noqa: SIM118
    theirs = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True).eval()
    ours = load(folder)
    inputs = make_inputs(ours)
    with torch.inference_mode():
        assert torch.equal(theirs(inputs["pixel_values"]), ours(**inputs).logits)


def test_fp16_is_ours_rounded_once(tmp_path: Path) -> None:
    folder = made("bart", tmp_path / "small")
    lines = list(export(folder, tmp_path / "half", "fp16"))
    assert "ours in float16, bit for bit" in lines[0]
    found = load(tmp_path / "half")
    assert found.dtype == torch.float16


def test_fp16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    model = make_model("test_vit")
    with torch.no_grad():
        model.timm_model.head.bias[0] = 1e6
    save(model, tmp_path / "small")
    with pytest.raises(ConfigError, match=r"head\.bias holds numbers above 65,504"):
        list(export(tmp_path / "small", tmp_path / "half", "fp16"))


# ------------------------------------------------------------------------------------------ onnx


@pytest.mark.parametrize("name", ["marian", "t5", "test_resnet", "test_vit"])
def test_onnx_says_what_we_say(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = made(name, tmp_path / "small")
    lines = list(export(folder, tmp_path / "onnx", "onnx"))
    assert AutoConfig.from_pretrained(tmp_path / "onnx").model_type == load(folder).config.model_type
    assert sum("largest difference to ours" in line for line in lines) == 2
    model = load(folder)
    inputs = make_inputs(model)
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    session = runtime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(["logits"], {key: x.numpy() for key, x in inputs.items()})[0]
    with torch.inference_mode():
        wanted = model(**inputs).logits
    assert (torch.from_numpy(found) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_integer_zero_points_keep_their_codes(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make_model("test_vit")
    save(model, tmp_path / "plain")
    save(model, tmp_path / "small", zero_points(model))
    lines = list(export(tmp_path / "small", tmp_path / "onnx", "onnx"))
    assert any("keep their 4-bit codes" in line for line in lines)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == sum(1 for n, p in model.named_parameters() if ".blocks." in n and p.ndim == 2)
    list(export(tmp_path / "plain", tmp_path / "float", "onnx"))
    size, other = ((tmp_path / form / "model.onnx").stat().st_size for form in ("onnx", "float"))
    assert size < 0.6 * other


# ------------------------------------------------------------------------------------------ CTranslate2


def test_ctranslate2_translates_as_we_do(marian: Path, tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    (tmp_path / "lines.txt").write_text("ein Mann\nzwei rote Äpfel\n\n", encoding="utf-8")
    for given, count in ((None, 16), (tmp_path / "lines.txt", 2)):
        lines = list(export(marian, tmp_path / f"ct2-{count}", "ctranslate2", sentences=given))
        assert any(line.startswith(f"{count} sentences translated greedily: {count} as by us") for line in lines)


def test_a_padding_row_that_is_not_zero_is_kept(marian: Path, tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    model = load(marian)
    with torch.no_grad():
        model.get_input_embeddings().weight[model.config.pad_token_id] = torch.randn(32)
    (tmp_path / "moved").mkdir()
    for file in marian.iterdir():
        (tmp_path / "moved" / file.name).write_bytes(file.read_bytes())
    save(model, tmp_path / "moved")
    first, second, *_ = export(tmp_path / "moved", tmp_path / "ct2", "ctranslate2")
    assert "padding row is not zero" in first and "16 as by us" in second


def test_rounding_once_more_is_counted_not_refused(marian: Path, tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    lines = list(export(marian, tmp_path / "ct2", "ctranslate2", quantization="int8"))
    assert any("16 sentences translated greedily" in line for line in lines)


def test_what_ctranslate2_is_not_for(marian: Path, tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    with pytest.raises(ConfigError, match="goes --to onnx"):
        list(export(made("test_vit", tmp_path / "vit"), tmp_path / "out", "ctranslate2"))
    with pytest.raises(DataError, match="cannot be read"):
        list(export(marian, tmp_path / "out", "ctranslate2", sentences=tmp_path / "none.txt"))
    with pytest.raises(ConfigError, match="does not take this model"):
        list(export(marian, tmp_path / "out", "ctranslate2", quantization="int3"))


# ------------------------------------------------------------------------------------------ what is refused


def test_a_difference_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the export to write other weights, it would not say that all is well."""
    folder = made("test_vit", tmp_path / "small")
    monkeypatch.setattr("hfcompress.export.dequantize", lambda model: _other(model))
    with pytest.raises(HFCompressError, match="not ours"):
        list(export(folder, tmp_path / "dense", "dense"))


def _other(model):
    from hfcompress.saving import dequantize

    with torch.no_grad():
        model.timm_model.head.bias.add_(1e-6)
    return dequantize(model)


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ConfigError, match=r"needs no_such_package: pip install 'hfcompress\[export\]'"):
        need("json", "no_such_package")


def test_without_the_packages_the_command_says_so(tmp_path: Path) -> None:
    folder = made("test_vit", tmp_path / "small")
    code = """
import sys
for name in ("onnx", "onnxruntime", "onnxscript"):
    sys.modules[name] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name.startswith("onnx") else found(name)
from hfcompress.cli import main
sys.exit(main(sys.argv[1:]))
"""
    given = [sys.executable, "-c", code, "export", str(folder), "--output", str(tmp_path / "out"), "--to", "onnx"]
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "needs onnx, onnxruntime, onnxscript: pip install" in done.stderr


def test_the_command(tmp_path: Path) -> None:
    folder = made("test_vit", tmp_path / "small")
    asked = ("export", folder, "--output", tmp_path / "dense")
    done = hfcompress(tmp_path, *asked, "--to", "dense")
    assert done.code == 0 and "bit for bit" in done.out, done.err
    assert "is not empty" in hfcompress(tmp_path, *asked, "--to", "fp16").refusal
    assert (
        "--quantization is"
        in hfcompress(
            tmp_path, "export", folder, "--output", tmp_path / "x", "--to", "onnx", "--quantization", "int8"
        ).refusal
    )
