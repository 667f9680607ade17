"""Scores are sacrebleu's and Wilson's own; sizes are the files'; what cannot be scored is refused."""

import gzip
import math
import random

import numpy as np
import pytest
import sacrebleu
import torch
from conftest import compress, make_model
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from sacrebleu.significance import PairedTest
from torch import nn

from hfcompress import corpora, load
from hfcompress.checkpoint import FILE_NAME, save
from hfcompress.errors import DataError, FormatError
from hfcompress.evaluate import (
    corpus_scores,
    int8_gzip_bytes,
    paired_bleu,
    score_images,
    score_translation,
    weight_bytes,
)
from hfcompress.measure import paired_tests
from hfcompress.networks import classifier as build
from hfcompress.networks import translator as build_translator
from hfcompress.results import wilson
from hfcompress.schema import Evaluation, ImageData, Network, TranslationData, Vocabulary
from hfcompress.tokenizer import train_tokenizer

# ------------------------------------------------------------------------------------------ BLEU, chrF


@pytest.fixture(scope="module")
def answers():
    """References, and hypotheses with some of their words lost."""
    draw = random.Random(0)
    references = corpora.cldr("de", "en")["test"]["target"][:60]
    return [" ".join(w for w in r.split() if draw.random() < 0.8) for r in references], list(references)


def test_the_numbers_are_sacrebleus(answers):
    hypotheses, references = answers
    scores = corpus_scores(hypotheses, references, resamples=0)
    bleu, chrf = sacrebleu.corpus_bleu(hypotheses, [references]), sacrebleu.corpus_chrf(hypotheses, [references])
    assert (scores["bleu"].value, scores["chrf"].value) == (bleu.score, chrf.score)
    assert 10 < bleu.score < 90 and scores["bleu"].n == scores["chrf"].n == len(references)
    assert scores["bleu"].signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert "chrF2" in str(scores["chrf"].signature) or "nc:6" in scores["chrf"].signature
    assert not scores["bleu"].measured


def test_intervals_are_those_of_the_bootstrap(answers):
    scores = corpus_scores(*answers, resamples=100)
    assert scores == corpus_scores(*answers, resamples=100)
    for score in scores.values():
        low, high = score.interval
        assert 0 <= low < score.value < high <= 100 and score.measured
    plain = corpus_scores(*answers, resamples=0)
    assert {m: (s.value, s.signature) for m, s in scores.items()} == {
        m: (s.value, s.signature) for m, s in plain.items()
    }


def test_paired_bootstrap_is_sacrebleus(answers):
    worse, references = answers
    one_word = [worse[0] + " x", *worse[1:]]
    others = {"teacher": references, "student": one_word, "post_training": worse}
    found = paired_bleu(worse, others, references, resamples=200)
    assert found == paired_bleu(worse, others, references, resamples=200)  # sacrebleu's seed is fixed
    assert [test.against for test in found] == list(others)
    theirs = PairedTest([("a", worse), ("b", references)], {"m": sacrebleu.BLEU()}, [references], "bs", 200)()
    assert found[0].p_value == theirs[1]["BLEU"][1].p_value < 0.05 and found[0].signature == str(theirs[0]["BLEU"])
    assert found[0].difference == pytest.approx(sacrebleu.corpus_bleu(worse, [references]).score - 100)
    assert "bs:200|seed:12345" in found[0].signature and (found[0].n, found[0].resamples) == (len(references), 200)
    assert found[1].p_value > 0.05 and found[2].p_value == 1 and found[2].difference == 0
    assert paired_bleu(worse, others, references, 0) == paired_bleu(worse, {}, references, 200) == ()
    with pytest.raises(DataError, match="59 hypotheses for 60 references"):
        paired_bleu(worse, {"student": worse[1:]}, references, 10)


def test_paired_tests_read_what_a_fresh_process_wrote(answers):
    worse, references = answers

    def scored(lines, metric="bleu"):
        samples = [{"output": line, "reference": reference} for line, reference in zip(lines, references)]
        return {"scores": {metric: {}}, "samples": samples}

    found = paired_tests({"teacher": scored(references), "student": scored(worse), "compressed": scored(worse)}, 50)
    assert [(test.against, test.p_value < 0.05) for test in found] == [("teacher", True), ("student", False)]
    assert paired_tests({"student": scored(worse, "accuracy"), "compressed": scored(worse, "accuracy")}, 50) == ()


@pytest.mark.parametrize(("hypotheses", "references"), [(3, 2), (2, 3), (0, 0), (0, 1)])
def test_lines_without_a_partner_are_refused(hypotheses, references):
    """sacrebleu would score the shorter of the two."""
    with pytest.raises(DataError, match=f"{hypotheses} hypotheses for {references} references"):
        corpus_scores(["a"] * hypotheses, ["a"] * references, resamples=0)


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("translator")
    test = corpora.cldr("de", "en")["test"].select(range(12))
    data = TranslationData(embedded="cldr", source="de", target="en")
    tokenizer = train_tokenizer(test, data, Vocabulary(size=80), folder)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "init_std": 1.0}
    model = build_translator(Network(marian=sizes), tokenizer, 64, 0, None)
    save(model, folder, compress(model))
    return folder, test


def test_every_sentence_gets_its_own_answer(translator):
    """Though they are decoded by length, in batches."""
    folder, test = translator
    progress: list[tuple[int, int]] = []
    settings = Evaluation(batch_size=5, max_new_tokens=8, bootstrap=0)
    scores, samples = score_translation(str(folder), test, settings, lambda *done: progress.append(done))
    assert progress == [(5, 12), (10, 12), (12, 12)]
    assert [(s.source, s.reference) for s in samples] == list(zip(test["source"], test["target"]))
    alone = [
        score_translation(str(folder), test.select([row]), settings)[1][0].output for row in range(0, len(test), 4)
    ]
    assert alone == [sample.output for sample in samples[::4]]
    assert scores == corpus_scores([s.output for s in samples], test["target"], resamples=0)
    assert all(s.score == sacrebleu.sentence_chrf(s.output, [s.reference]).score for s in samples)


# ------------------------------------------------------------------------------------------ accuracy


def pictures(names: list[str], rows: int = 9) -> Dataset:
    draw = np.random.default_rng(0)
    images = [Pillow.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(rows)]
    labels = [row % len(names) for row in range(rows)]
    return Dataset.from_dict(
        {"image": images, "label": labels}, Features({"image": Image(), "label": ClassLabel(names=names)})
    )


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    model = build(Network(timm="cifar_resnet20"), ImageData(embedded="digits", size=32), list("abcdefg"), None, 0)
    save(model, folder, compress(model))
    return folder


def test_accuracy_is_the_share_of_right_answers(classifier):
    test = pictures(list("abcdefg"))
    progress: list[tuple[int, int]] = []
    settings = Evaluation(batch_size=4)
    scores, samples = score_images(str(classifier), test, settings, lambda *done: progress.append(done))
    assert progress == [(4, 9), (8, 9), (9, 9)] and list(scores) == ["accuracy"]
    right = [sample.output == sample.reference for sample in samples]
    score = scores["accuracy"]
    assert (score.value, score.n, score.interval) == (100 * sum(right) / 9, 9, wilson(sum(right), 9))
    assert score.signature == "top1|split:test|size:32|crop_pct:1.0"
    model = load(classifier)
    for row, sample in enumerate(samples):
        image = test[row]["image"].resize((32, 32), Pillow.Resampling.BICUBIC)
        pixels = (torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 - 0.5) / 0.5
        with torch.inference_mode():
            chances = model(pixels[None]).logits.softmax(-1)[0]
        assert sample.reference == "abcdefg"[row % 7]
        assert sample.score == pytest.approx(100 * float(chances[row % 7]), abs=0.01)
        assert sample.output == "abcdefg"[int(chances.argmax())]


def test_wilson_against_the_formula():
    for correct, n in ((1, 10), (81, 263), (9173, 10000)):
        z, p = 1.959963984540054, correct / n
        for bound in wilson(correct, n):  # where the score test is at its critical value
            assert abs(bound / 100 - p) == pytest.approx(z * math.sqrt(bound / 100 * (1 - bound / 100) / n))
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 100


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (list("abcdef"), "knows 7 labels, the data has 6"),
        (list("abcdegf"), "orders its labels otherwise than the data: 'f' where the data has 'g'"),
    ],
)
def test_other_labels_are_refused(classifier, names, told):
    with pytest.raises(DataError, match=told):
        score_images(str(classifier), pictures(names), Evaluation())


def test_labels_of_other_names_are_taken_in_their_order(classifier):
    """Names are often missing, or in another language."""
    score_images(str(classifier), pictures([f"class {i}" for i in range(7)]), Evaluation())


def test_what_is_no_model_of_the_task_is_refused(classifier, translator, tmp_path):
    images, (folder, pairs) = pictures(list("abcdefg")), translator
    for model in (folder, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="cannot load"):
            score_images(str(model), images, Evaluation())
    with pytest.raises(DataError, match="cannot load"):
        score_translation(str(classifier), pairs, Evaluation())


def test_a_damaged_file_is_not_scored(classifier, tmp_path):
    for file in classifier.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / FILE_NAME
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FormatError):
        score_images(str(tmp_path), pictures(list("abcdefg")), Evaluation())
    make_model("cifar_resnet20").save_pretrained(tmp_path)  # dense, beside it
    file.unlink()
    dense = tmp_path / "model.safetensors"
    dense.write_bytes(dense.read_bytes()[:-1])
    with pytest.raises(DataError, match="cannot load"):
        score_images(str(tmp_path), pictures(list("abcdefg")), Evaluation())


# ------------------------------------------------------------------------------------------ sizes


def test_weight_bytes_are_those_of_the_files(classifier, tmp_path):
    assert weight_bytes(classifier) == (classifier / FILE_NAME).stat().st_size
    make_model("t5").save_pretrained(tmp_path / "dense", max_shard_size="10KB")
    shards = list((tmp_path / "dense").glob("*.safetensors"))
    assert len(shards) > 1 and weight_bytes(tmp_path / "dense") == sum(shard.stat().st_size for shard in shards)
    with pytest.raises(DataError, match="no weights in"):
        weight_bytes(tmp_path)


def test_the_yardstick_is_int8_and_gzip():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 48)
            self.tied = self.linear.weight
            self.register_buffer("steps", torch.tensor(3))
            self.register_buffer("scratch", torch.zeros(1000), persistent=False)

    torch.manual_seed(0)
    net = Net()
    weight, bias = net.linear.weight.detach().numpy(), net.linear.bias.detach().numpy()
    scales = np.abs(weight).max(1, keepdims=True) / np.float32(127)
    codes = np.round(weight / scales).astype(np.int8)
    parts = [part.tobytes() for part in (codes, scales, bias, np.int64(3))]
    assert int8_gzip_bytes(net) == len(gzip.compress(b"".join(parts), 9, mtime=0))
    with torch.no_grad():
        net.linear.weight.zero_()
    assert int8_gzip_bytes(net) < 500  # and no division by zero
