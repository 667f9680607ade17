"""The card says what the results say, all of it and no more; the Hub reads it; its snippet runs.

tests/cards holds two whole cards; `python tests/test_card.py` writes them anew after an intended change.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from transformers import PreTrainedModel, TimmWrapperImageProcessor

from hfcompress.card import write_card
from hfcompress.card_text import comparisons, fenced, markdown_table, plain, sample_table
from hfcompress.checkpoint import Sizes, save
from hfcompress.compressor import Compressor
from hfcompress.errors import HFCompressError
from hfcompress.methods import Uniform
from hfcompress.networks import classifier, parameters, translator
from hfcompress.recipe import load
from hfcompress.reparameterization import Kind
from hfcompress.results import DataFacts, Paired, Part, Results, Row, Sample, Score, by_kind
from hfcompress.schema import Network, Recipe, Rule, TranslationData, Vocabulary
from hfcompress.tokenizer import train_tokenizer

CARDS = Path(__file__).with_name("cards")

TRANSLATION = """
name: multi30k-de-en-4bit
description: Captions of photographs, German to English.
seed: 7
translation:
  hub: bentrevett/multi30k
  revision: 4b2b27d
  source: de
  target: "no"
  column: null
  test: test_2016_flickr
vocabulary: {size: 8000}
teacher: {marian: {d_model: 256}, training: {}}
student: {from_teacher: {encoder_layers: 6, decoder_layers: 2}, training: {}}
compression:
  rules:
  - {kinds: [linear, embedding], method: {uniform: {bits: 4}}}
  - {method: {dense: {dtype: float16}}}
evaluation: {beams: 4}
card: {license: cc-by-4.0, dataset_name: Multi30k, limits: "Captions only: other text is out of scope."}
"""

IMAGES = """
name: digits-2bit
images: {embedded: digits, size: 8}
teacher: {pretrained: timm/resnet18.a1_in1k, revision: v1}
student: {timm: resnet18, arguments: {block: basic}, training: {}}
distillation: {soft: 0, hard: 1}
compression:
  warm_start: true
  rules: [{method: {uniform: {bits: 2, bucket: null}}}]
"""

SIGNATURE = "nrefs:1|bs:1000|seed:12345|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
CHRF = "nrefs:1|bs:1000|seed:12345|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0"

PARTS = (
    Part("linear", 3_500_000, {"codes": 1_600_000, "scales, other arrays": 54_000}),
    Part("embedding", 2_048_000, {"codes": 890_000, "scales, other arrays": 32_000}),
    Part("norm", 15_000, {"not coded": 30_000}),
    Part("tables, index, header", None, {"tables": 1_420, "index": 7_000, "header": 880}),
)


def bleu(value: float) -> Score:
    return Score(value, 1000, SIGNATURE, (value - 1.2, value + 1.1))


def chrf(value: float) -> Score:
    return Score(value, 1000, CHRF, (value - 0.9, value + 0.9))


def accuracy(correct: int, interval: tuple[float, float]) -> Score:
    return Score(correct / 4, 400, "top1", interval)


SURROUNDINGS = {
    "versions": {"python": "3.11.7", "hfcompress": "0.1.0", "torch": "2.15.0"},
    "hardware": {"cpu": "A CPU", "cores": 2, "memory_bytes": 2**34, "gpus": [], "platform": "Linux x86_64"},
}
TRANSLATED = Results(
    rows=(
        Row("teacher", 9_500_000, 38_000_000, 32.0, 7_900_000, {"bleu": bleu(39.8), "chrf": chrf(60.2)}),
        Row("student", 5_563_000, 22_252_000, 32.0, 4_900_000, {"bleu": bleu(38.9), "chrf": chrf(59.7)}),
        Row("post_training", 5_563_000, 2_615_600, 3.7614, 4_900_000, {"bleu": bleu(35.2), "chrf": chrf(56.0)}),
        Row("compressed", 5_563_000, 2_615_300, 3.761, 4_900_000, {"bleu": bleu(38.9), "chrf": chrf(59.5)}),
    ),
    seed=7,
    seconds={"teacher": 3801.2, "student": 901.0, "post_training": 12.34, "compressed": 950.0},
    paired=(
        Paired("teacher", "bleu", -0.9, 0.012987, 1000, 1000, SIGNATURE),
        Paired("student", "bleu", 0.0, 1.0, 1000, 1000, SIGNATURE),
        Paired("post_training", "bleu", 3.7, 0.000999, 1000, 1000, SIGNATURE),
    ),
    **SURROUNDINGS,
)
CLASSIFIED = Results(  # a miss: larger than its teacher, and worse than compressing after training
    rows=(
        Row("teacher", 1_000, 4_000, 32.0, 900, {"accuracy": accuracy(392, (96.1, 99.0))}),
        Row("student", 2_000, 8_000, 32.0, 1_800, {"accuracy": accuracy(388, (94.8, 98.3))}),
        Row("post_training", 2_000, 5_000, 20.0, 1_800, {"accuracy": accuracy(380, (92.4, 96.7))}),
        Row("compressed", 2_000, 5_000, 20.0, 1_800, {"accuracy": accuracy(300, (70.5, 79.0))}),
    ),
    seed=0,
    seconds={"student": 5.0},
    **SURROUNDINGS,
)
SENTENCES = [
    Sample(f"Ein Mann mit {i} Hüten", f"A man | {i} *hats*", "" if i == 0 else f"a <man> with {i}", 10.0 * i)
    for i in range(10)
]
DIGITS = [Sample(f"test image {i}", "7", "1", 99.0 - 40 * i) for i in range(2)]


def recipe_of(text: str, folder: Path) -> Recipe:
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return load(folder / "recipe.yaml")[0]


def translation_card(folder: Path) -> str:
    for picture in ("training.png", "sizes.png", "scores.png"):
        (folder / picture).touch()
    data = DataFacts({"train": 29_000, "validation": 1_014, "test_2016_flickr": 1_000}, overlap=2, left_out=7)
    recipe = recipe_of(TRANSLATION, folder)
    command = "hfcompress run recipes/multi30k/4bit.yaml"
    path = write_card(folder, recipe, TRANSLATED, PARTS, SENTENCES, command, recipe_text=TRANSLATION, data=data)
    return path.read_text(encoding="utf-8")


def images_card(folder: Path) -> str:
    recipe = recipe_of(IMAGES, folder)
    path = write_card(folder, recipe, CLASSIFIED, (), DIGITS, "hfcompress run digits.yaml")
    return path.read_text(encoding="utf-8")


WHOLE = {"translation": translation_card, "images": images_card}


# ---------------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_card(name: str, tmp_path: Path) -> None:
    assert WHOLE[name](tmp_path) == (CARDS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", WHOLE)
def test_metadata_go_through_the_hubs_own_reader_and_back(name: str, tmp_path: Path) -> None:
    text = WHOLE[name](tmp_path)
    card = ModelCard(text)
    assert card.content == text
    assert card.data.to_dict() == yaml.safe_load(text.split("---\n")[1])
    assert None not in (card.data.datasets or []) and card.data.tags == list(dict.fromkeys(card.data.tags))


def test_metadata_hold_the_results(tmp_path: Path) -> None:
    data = ModelCard(translation_card(tmp_path)).data
    assert data.language == ["de", "no"]  # Norwegian, not False
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {
        "sacrebleu": 38.9,
        "chrf": 59.5,
        "size_bytes": 2_615_300,
        "bits_per_weight": 3.761,
    }
    assert {r.dataset_revision for r in data.eval_results} == {"4b2b27d"}
    assert data.eval_results[0].metric_args == {"signature": SIGNATURE}
    assert data.get("base_model") is None


def test_a_pretrained_teacher_is_the_base_model_unless_it_is_a_folder(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    data = ModelCard(images_card(tmp_path)).data
    assert (data.base_model, data.base_model_relation) == ("timm/resnet18.a1_in1k", "quantized")
    (tmp_path / "timm" / "resnet18.a1_in1k").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = images_card(tmp_path)
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "- Teacher: `resnet18.a1_in1k`, revision `v1`, as it is." in text


def test_a_revision_that_was_not_checked_is_not_claimed(tmp_path: Path) -> None:
    recipe, facts = recipe_of(TRANSLATION, tmp_path), DataFacts({"train": 3}, local=True)
    text = write_card(tmp_path, recipe, TRANSLATED, (), (), "c", data=facts).read_text(encoding="utf-8")
    assert "4b2b27d" not in text and "read from a local folder" in text


# ---------------------------------------------------------------------------------------------- only facts


def test_a_section_without_facts_is_left_out(tmp_path: Path) -> None:
    row = Row("compressed", 10, 40, 32.0, 20, {})
    recipe = recipe_of(IMAGES.replace("bucket: null", "bucket: 16"), tmp_path)
    bare = Results((row,), 0, {}, {}, {})
    text = write_card(tmp_path, recipe, bare, (), (), "hfcompress run x.yaml").read_text(encoding="utf-8")
    absent_words = "None|{{|{%|png)|## Size by part|## Sample|Versions|Hardware|Wall|Rows"
    for absent in absent_words.split("|"):
        assert absent not in text
    assert "**40 B on disk.**" in text
    assert [r.metric_type for r in ModelCard(text).data.eval_results] == ["size_bytes", "bits_per_weight"]
    assert "\n\n\n" not in text


points = st.floats(0, 100).map(lambda x: round(x, 2))


@given(points, points, st.floats(0, 5), st.floats(0, 5))
def test_comparisons_say_which_is_better_and_by_how_much(this: float, other: float, a: float, b: float) -> None:
    def row(name: str, value: float, half: float) -> Row:
        return Row(name, 8, 8, 8.0, 0, {"bleu": Score(value, 1, "", (value - half, value + half))})  # type: ignore[arg-type]

    mine = row("compressed", this, a)
    (sentence,) = comparisons(Results((row("post_training", other, b), mine), 0, {}, {}, {}), mine)
    match = re.fullmatch(r"BLEU (?:(\d+\.\d\d) points (above|below)|equal to that of) the same [^;]*(;.*)?\.", sentence)
    assert match
    difference = float(match[1] or 0) * (1 if match[2] == "above" else -1)
    assert difference == pytest.approx(this - other, abs=0.0051)
    overlap = {
        "; the 95 % intervals overlap": True,
        "; the 95 % intervals do not overlap": False,
        None: None,
    }[match[3]]
    if overlap is not None:
        assert overlap == (this - a <= other + b and other - b <= this + a)
    else:
        assert min(a, b) < 1e-10


@settings(max_examples=200)
@given(st.text(st.characters(exclude_categories=("Cs", "Cc"))))
def test_text_from_the_data_shows_as_it_is(text: str) -> None:
    rendered = MarkdownIt("commonmark").enable("table").parse(markdown_table([["a", "b"], [plain(text), "c"]], "l"))
    cells = [token for token in rendered if token.type == "inline"]
    assert len(cells) == 4 and cells[3].content == "c"
    shown = "".join(child.content for child in cells[2].children or [])
    assert shown == (" ".join(text.split()) or "(empty)")


@given(st.text("`~ab\n ", min_size=1).map(str.strip).filter(bool))
def test_no_text_breaks_out_of_its_block(text: str) -> None:
    (block,) = MarkdownIt("commonmark").parse(fenced(text, "yaml"))
    assert (block.type, block.content) == ("fence", text + "\n")


@given(st.permutations(range(50)))
def test_the_worst_answers_are_shown(order: list[int]) -> None:
    table = sample_table([Sample(str(i), "r", "o", float(i)) for i in order])
    assert [row[0] for row in table[1:]] == ["0", "1", "2", "3", "23", "24", "25", "26"]


def test_an_endless_answer_is_cut() -> None:
    table = sample_table([Sample("a", "b", "so on " * 999, 0.0)])
    assert len(table[1][2]) < 250 and table[1][2].endswith("so on …")


# ---------------------------------------------------------------------------------------------- refusals


def test_parts_that_do_not_make_up_the_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HFCompressError, match=r"add up to its 2615300 bytes, found 1654000; take both"):
        write_card(tmp_path, recipe_of(TRANSLATION, tmp_path), TRANSLATED, PARTS[:1], (), "c")
    assert not (tmp_path / "README.md").exists()


def test_results_without_the_compressed_student_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HFCompressError, match="need a row 'compressed', found teacher, student"):
        write_card(tmp_path, recipe_of(IMAGES, tmp_path), replace(CLASSIFIED, rows=CLASSIFIED.rows[:2]), (), (), "c")


# ---------------------------------------------------------------------------------------------- the snippet


def publish(model: PreTrainedModel, recipe: Recipe, folder: Path, samples: list[Sample]) -> None:
    """A compressed model with its card, as a run leaves it."""
    rules = (Rule(method=Uniform(bits=4), kinds=(Kind.LINEAR, Kind.EMBEDDING, Kind.CONV)),)
    sizes: Sizes = save(model, folder, Compressor(model, rules))
    row = Row("compressed", parameters(model), sizes.total, sizes.bits_per_weight, 0, {})
    write_card(folder, recipe, Results((row,), 0, {}, {}, {}), by_kind(sizes), samples, "hfcompress run x.yaml")


def run_snippet(folder: Path) -> str:
    """What the card's snippet prints, in a fresh process and away from the network."""
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_translation_snippet_gives_what_the_model_gives(tmp_path: Path) -> None:
    pairs = Dataset.from_dict({"source": ["ein Mann", "zwei Hüte"] * 9, "target": ["a man", "two hats"] * 9})
    data = TranslationData(embedded="cldr", source="de", target="en", max_length=16)
    tokenizer = train_tokenizer(pairs, data, Vocabulary(size=20), tmp_path)
    small = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = translator(Network(marian={**small, **heads}), tokenizer, 16, 0, None).eval()
    recipe = recipe_of(TRANSLATION.replace("beams: 4", "beams: 2, max_new_tokens: 9"), tmp_path)
    publish(model, recipe, tmp_path, [Sample("zwei 'Hüte'", "two hats", "", 0.0)])
    tokens = model.generate(**tokenizer("zwei 'Hüte'", return_tensors="pt"), num_beams=2, max_new_tokens=9)
    assert run_snippet(tmp_path) == tokenizer.decode(tokens[0], skip_special_tokens=True).strip() != ""


def test_the_image_snippet_gives_what_the_model_gives(tmp_path: Path) -> None:
    recipe = recipe_of(IMAGES.replace("size: 8", "size: 32"), tmp_path)
    assert recipe.images is not None
    labels = [f"label {i}" for i in range(10)]
    network = Network(timm="test_resnet")
    model = classifier(network, recipe.images, labels, None, 0).eval()
    publish(model, recipe, tmp_path, [])
    grey = (torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    Image.fromarray(grey.numpy()).save(tmp_path / "picture.png")
    processor = TimmWrapperImageProcessor(model.config.pretrained_cfg, model.config.architecture)
    pixels = processor(Image.open(tmp_path / "picture.png").convert("RGB"))["pixel_values"]
    with torch.inference_mode():
        expected = model(pixels).logits.argmax().item()
    assert run_snippet(tmp_path) == labels[expected]


if __name__ == "__main__":
    import tempfile

    for name, card in WHOLE.items():
        with tempfile.TemporaryDirectory() as folder:
            (CARDS / f"{name}.md").write_text(card(Path(folder)), encoding="utf-8")
