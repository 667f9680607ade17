"""Every family that the package promises: saved, and loaded by plain transformers calls in one fresh process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compress, make_inputs, unsettled
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    M2M100Config,
    MarianConfig,
    MBartConfig,
    MT5Config,
    PegasusConfig,
    PreTrainedModel,
    T5Config,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    set_seed,
)

from hfcompress.backends import Encoded
from hfcompress.checkpoint import FILE_NAME, read, save

TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2, "vocab_size": 60}
HALVES = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 2))}
BART = {**TOKENS, **HALVES, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": 16, "max_position_embeddings": 40}
T5 = {**TOKENS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
TRANSLATORS: dict[str, Callable[[], Any]] = {
    "Marian": lambda: MarianConfig(**BART, forced_eos_token_id=1, scale_embedding=True),
    "Marian, two embeddings": lambda: MarianConfig(**BART, share_encoder_decoder_embeddings=False),
    "T5": lambda: T5Config(**T5),
    "T5 1.1": lambda: T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mT5": lambda: MT5Config(**T5, tie_word_embeddings=False),
    "BART": lambda: BartConfig(**BART, bos_token_id=2, forced_eos_token_id=1),
    "mBART": lambda: MBartConfig(**BART, bos_token_id=2, forced_eos_token_id=1, scale_embedding=True),
    "M2M100": lambda: M2M100Config(**BART, bos_token_id=2, forced_eos_token_id=1),
    "NLLB": lambda: M2M100Config(**BART, bos_token_id=2, forced_bos_token_id=7, activation_function="relu"),
    "Pegasus": lambda: PegasusConfig(**BART, forced_eos_token_id=1),
}
SMALL = {"img_size": 64, "embed_dim": 24, "depth": 2}
IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}),
    "resnext": ("resnext50_32x4d", {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32], "base_width": 16}),
    "densenet": ("densenet121", {"growth_rate": 8, "block_config": [2, 2, 2, 2]}),
    "mobilenetv2": ("mobilenetv2_035", {}),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
    "efficientnet": ("test_efficientnet", {}),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}),
    "vit": ("vit_tiny_patch16_224", SMALL),
    "deit": ("deit_tiny_distilled_patch16_224", SMALL),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [1, 2]},
    ),
    "mixer": ("mixer_s32_224", {"img_size": 64, "mlp_ratio": [0.1, 0.1]}),
}
FAMILIES = (*TRANSLATORS, *IMAGES)


def make(family: str) -> PreTrainedModel:
    """A small model with random weights and statistics, none of them at its neutral starting value."""
    set_seed(7)
    if family in TRANSLATORS:
        model = AutoModelForSeq2SeqLM.from_config(TRANSLATORS[family]())
        model.generation_config.max_new_tokens = 6
        model.generation_config.max_length = None
    else:
        architecture, arguments = IMAGES[family]
        shown = {"input_size": [3, 64, 64], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "crop_pct": 1.0}
        config = TimmWrapperConfig(
            architecture=architecture, model_args=arguments or None, pretrained_cfg=shown, num_labels=7
        )
        model = TimmWrapperForImageClassification(config)
    return unsettled(model)


def aliases(model: PreTrainedModel) -> list[list[str]]:
    """The names of each tied weight."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(sorted(group) for group in names.values() if len(group) > 1)


def said(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits, and what a translator generates: greedily, and by beam search."""
    with torch.no_grad():
        found = {"logits": model(**inputs).logits}
        if "input_ids" in inputs:
            for beams in (1, 3):
                found[f"{beams} beams"] = model.generate(inputs["input_ids"], num_beams=beams)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One compressed folder for each family, with what the model was and said beside it."""
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        model = make(family)
        save(model, root / family, compress(model))
        inputs = make_inputs(model)
        facts = {"inputs": inputs, "state": model.state_dict(), "said": said(model, inputs), "ties": aliases(model)}
        torch.save(facts, root / f"{family}.pt")
    return root


@pytest.fixture(scope="module")
def found(root: Path, run_python: Callable[..., str]) -> dict[str, dict[str, Any]]:
    """What a fresh process finds in the folders."""
    code = """
import json, sys, torch
from pathlib import Path
import hfcompress
from transformers import AutoModelForImageClassification, AutoModelForSeq2SeqLM, pipeline
from PIL import Image
torch.set_num_threads(1)

def differing(state, wanted, dtype=None):
    def expected(t):
        return t.to(dtype) if dtype is not None and t.is_floating_point() else t
    same = lambda a, b: a.dtype == b.dtype and torch.equal(a, b)
    return [n for n, t in wanted.items() if not same(state[n], expected(t))] + sorted(state.keys() - wanted.keys())

def look(folder, facts):
    from test_families import aliases, said
    inputs, wanted = facts["inputs"], facts["said"]
    auto = AutoModelForSeq2SeqLM if "input_ids" in inputs else AutoModelForImageClassification
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    seen = {"class": type(model).__name__, "ties": aliases(model) == facts["ties"]}
    seen["info"] = sorted(name for kind in info.values() for name in kind)
    seen["state"] = differing(model.state_dict(), facts["state"])
    seen["said"] = {name: torch.equal(value, wanted[name]) for name, value in said(model, inputs).items()}
    seen["varied"] = bool(wanted["logits"].std() > 0 and wanted["logits"].isfinite().all())
    again = hfcompress.load(folder)
    seen["load"] = torch.equal(said(again, inputs)["logits"], wanted["logits"])
    for dtype in (torch.bfloat16, torch.float16):
        half = auto.from_pretrained(folder, dtype=dtype)
        kept = {n for n in differing(half.state_dict(), facts["state"], dtype)}
        seen[str(dtype)] = sorted(kept)
        # exactly what transformers makes of the same dense weights
        dense = auto.from_pretrained(folder.with_name(folder.name + " dense"), dtype=dtype).state_dict()
        seen[f"{dtype} as dense"] = differing(half.state_dict(), dense)
    for name, device_map in (("cpu", "cpu"), ("auto", "auto"), ("map", {"": "cpu"})):
        placed = auto.from_pretrained(folder, device_map=device_map)
        seen[f"placed {name}"] = differing(placed.state_dict(), facts["state"])
    if "pixel_values" in inputs:
        classify = pipeline("image-classification", model=str(folder))
        picture = Image.effect_noise((80, 70), 90).convert("RGB")
        pixels = classify.image_processor(picture, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            best = model(pixels).logits.softmax(-1).max().item()
        answer = classify(picture, top_k=7)
        seen["pipeline"] = len(answer) == 7 and abs(answer[0]["score"] - best) < 1e-5
    return seen

root, found = Path(sys.argv[1]), {}
for path in sorted(root.glob("*.pt")):
    facts, folder = torch.load(path), path.with_suffix("")
    model = hfcompress.dequantize(hfcompress.load(folder))
    model.save_pretrained(folder.with_name(folder.name + " dense"))
    found[path.stem] = look(folder, facts)
print(json.dumps(found))
"""
    return json.loads(run_python(code, root))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_process_loads_the_same_model(family: str, found: dict[str, dict[str, Any]]) -> None:
    facts = found[family]
    assert facts["class"] == type(make(family)).__name__
    assert facts["state"] == [] and facts["info"] == [] and facts["ties"]
    assert facts["said"] and all(facts["said"].values()) and facts["varied"]
    assert facts["load"]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_dtypes_are_those_of_dense_weights(family: str, found: dict[str, dict[str, Any]]) -> None:
    facts = found[family]
    assert facts["torch.bfloat16 as dense"] == [] and facts["torch.float16 as dense"] == []
    assert facts["torch.bfloat16"] == []
    assert bool(facts["torch.float16"]) == ("T5" in family)  # T5 keeps some of its weights in float32


@pytest.mark.parametrize("family", FAMILIES)
def test_placed_by_a_device_map(family: str, found: dict[str, dict[str, Any]]) -> None:
    assert [name for name, names in found[family].items() if name.startswith("placed") and names] == []


@pytest.mark.parametrize("family", TRANSLATORS)
def test_beams_from_states_encoded_before_are_those_from_the_sentences(family: str) -> None:
    model = make(family).eval()
    ids = make_inputs(model)["input_ids"]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        encoded = Encoded(ids, mask, model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state)
        whole = model.generate(ids, attention_mask=mask, num_beams=3)
        for _ in range(2):  # nor does the first change what the second reads
            given = {"encoder_outputs": encoded.output(), "attention_mask": encoded.mask}
            assert torch.equal(model.generate(encoded.ids, num_beams=3, **given), whole)


@pytest.mark.parametrize("family", IMAGES)
def test_the_pipeline_classifies_images(family: str, found: dict[str, dict[str, Any]]) -> None:
    assert found[family]["pipeline"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_weight_is_stored_once(family: str, root: Path) -> None:
    names, ties = read(root / family).shapes().keys(), torch.load(root / f"{family}.pt")["ties"]
    assert all(len(names & set(tie)) == 1 for tie in ties)
    assert bool(ties) == (family in TRANSLATORS)
    assert (root / family / FILE_NAME).is_file()
