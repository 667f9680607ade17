"""Networks as a recipe names them: the architectures of the paper, given weights, and what is refused."""

import re

import pytest
import timm
import torch
from conftest import CLASSIFIERS, TRANSLATORS, make_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer

from hfcompress import zoo
from hfcompress.data import label_names, load_images, load_translation
from hfcompress.errors import ConfigError, DataError
from hfcompress.evaluate import score_images
from hfcompress.networks import check_classifier, classifier, parameters, translator
from hfcompress.recipe import find, load
from hfcompress.schema import Evaluation, ImageData, Layers, Network, TranslationData, Vocabulary
from hfcompress.tokenizer import train_tokenizer

IMAGES = ImageData(embedded="digits", size=32)
LABELS = [f"class {i}" for i in range(10)]

# ------------------------------------------------------------------------------------------ CIFAR's ResNets


@pytest.mark.parametrize(
    ("depth", "count"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_sizes_are_the_papers(depth, count):
    """Table 6 of He et al. 2016: 0.27, 0.46, 0.66, 0.85 and 1.7 million."""
    zoo.register()
    assert parameters(timm.create_model(f"cifar_resnet{depth}")) == count


def plain_resnet(state: dict[str, torch.Tensor], x: torch.Tensor, blocks: int) -> torch.Tensor:
    """Section 4.2 of the paper, in evaluation mode, from the weights alone."""

    def conv_bn(x, conv, bn, stride=1):
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        mean, variance = state[f"{bn}.running_mean"], state[f"{bn}.running_var"]
        return F.batch_norm(x, mean, variance, state[f"{bn}.weight"], state[f"{bn}.bias"], eps=1e-5)

    x = F.relu(conv_bn(x, "conv1", "bn1"))
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.relu(conv_bn(x, f"{name}.conv1", f"{name}.bn1", stride))
            y = conv_bn(y, f"{name}.conv2", f"{name}.bn2")
            shortcut = torch.zeros_like(y)
            first = (y.shape[1] - x.shape[1]) // 2
            shortcut[:, first : first + x.shape[1]] = x[:, :, ::stride, ::stride]
            x = F.relu(y + shortcut)
    return x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize("width", [1, 2])
def test_the_forward_pass_is_the_papers(width):
    zoo.register()
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet32", width=width).eval()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(model(images), plain_resnet(model.state_dict(), images, 5), rtol=1e-4, atol=1e-5)
        features = model.forward_features(images)
        assert features.shape == (2, 64 * width, 8, 8)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)


def test_there_are_no_published_weights():
    zoo.register()
    with pytest.raises(ValueError, match="no published weights"):
        timm.create_model("cifar_resnet20", pretrained=True)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        timm.create_model("cifar_resnet20").set_grad_checkpointing()


# ------------------------------------------------------------------------------------------ classifiers


def build(network: Network, data: ImageData = IMAGES, labels=LABELS, root=None, seed=0):
    return classifier(network, data, labels, root, seed)


def test_a_classifier_knows_its_labels_and_its_pictures(tmp_path):
    data = ImageData(embedded="digits", size=8, mean=(0.3,), std=(0.4,))
    model = build(Network(timm="cifar_resnet20", arguments={"in_chans": 1, "width": 2}), data)
    assert parameters(model) == 1_073_386 and model.config.id2label == dict(enumerate(LABELS))
    assert model(torch.randn(2, 1, 8, 8)).logits.shape == (2, 10)
    model.save_pretrained(tmp_path)
    again = build(Network(pretrained=str(tmp_path)), data)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert again.config.pretrained_cfg["input_size"] == [1, 8, 8] and again.config.pretrained_cfg["std"] == [0.4]
    check_classifier("it", again, LABELS)


def test_the_seed_decides_the_weights():
    one, same, other = (build(Network(timm="test_resnet"), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("network", "error", "told"),
    [
        (Network(timm="cifar_resnet21"), ConfigError, "no architecture 'cifar_resnet21'; near ones: .*cifar_resnet20"),
        (Network(timm="cifar_resnet20", arguments={"depth": 3}), ConfigError, "does not take these arguments: .*depth"),
        (Network(from_teacher=Layers(encoder_layers=1, decoder_layers=1)), ConfigError, "'timm' or 'pretrained'"),
        (Network(pretrained="no/where"), DataError, r"cannot load 'no/where' \(no folder here\)"),
        (Network(timm="cifar_resnet20", weights="no.safetensors"), DataError, "no weights at .*--data-root"),
    ],
)
def test_what_is_no_classifier_is_refused(network, error, told):
    with pytest.raises(error, match=told):
        build(network)


def test_weights_come_from_a_file_of_timms_names(tmp_path):
    zoo.register()
    state = timm.create_model("cifar_resnet20").state_dict()
    save_file({n: t for n, t in state.items() if "num_batches" not in n}, tmp_path / "w.safetensors")
    network = Network(timm="cifar_resnet20", weights="w.safetensors")
    model = build(network, root=tmp_path)
    assert all(torch.equal(model.timm_model.state_dict()[name], tensor) for name, tensor in state.items())
    harmed = {
        "1 missing (first linear.bias), 1 unknown (first extra)": {"extra": state["linear.bias"]},
        "1 of another shape (first linear.bias)": {"linear.bias": torch.zeros(3)},
    }
    for told, change in harmed.items():
        without = {name: tensor for name, tensor in state.items() if name != "linear.bias"}
        save_file({**without, **change}, tmp_path / "w.safetensors")
        with pytest.raises(DataError, match=re.escape(told)):
            build(network, root=tmp_path)
    (tmp_path / "w.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(DataError, match="cannot be read"):
        build(network, root=tmp_path)


def test_given_weights_classify_real_pictures(data, tmp_path):
    """91.73 % on all of CIFAR-10's test images, says who published them."""
    (recipe,) = load(find("cifar10/resnet20_finetune"), ["images.train_rows=100", "images.test_rows=300"])
    splits = load_images(recipe.images, data)
    model = classifier(recipe.student, recipe.images, label_names(splits), data, 0)
    assert parameters(model) == 269_722
    model.save_pretrained(tmp_path)
    scores, _ = score_images(str(tmp_path), splits.test, Evaluation(batch_size=100))
    assert scores["accuracy"].value > 88


# ------------------------------------------------------------------------------------------ translators


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    data = TranslationData(embedded="cldr", source="de", target="en", train_rows=300)
    train_tokenizer(load_translation(data).train, data, Vocabulary(size=200), folder)
    return AutoTokenizer.from_pretrained(folder)


SMALL = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}


def test_a_marian_fits_its_tokenizer(tokenizer):
    model = translator(Network(marian=SMALL), tokenizer, 200, 0, None)
    config = model.config
    assert config.vocab_size == len(tokenizer) and config.max_position_embeddings == 200
    assert config.pad_token_id == config.decoder_start_token_id == tokenizer.pad_token_id
    assert config.eos_token_id == tokenizer.eos_token_id
    ids = model.generate(**tokenizer(["Donnerstag"], return_tensors="pt"), max_new_tokens=5)
    assert ids[0, 0] == tokenizer.pad_token_id and tokenizer.pad_token_id not in ids[0, 1:]
    same = translator(Network(marian=SMALL), tokenizer, 200, 0, None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters()))


def test_a_student_is_cut_from_its_teacher(tokenizer):
    teacher = translator(Network(marian=SMALL), tokenizer, 64, 0, None)
    cut = Network(from_teacher=Layers(encoder_layers=2, decoder_layers=1))
    student = translator(cut, tokenizer, 64, 0, teacher)
    assert (student.config.encoder_layers, student.config.decoder_layers) == (2, 1)
    assert torch.equal(student.model.shared.weight, teacher.model.shared.weight)
    with pytest.raises(ConfigError, match="needs a teacher"):
        translator(cut, tokenizer, 64, 0, None)


def test_a_saved_translator_is_found_again(tokenizer, tmp_path):
    model = translator(Network(marian=SMALL), tokenizer, 64, 0, None)
    model.save_pretrained(tmp_path)
    again = translator(Network(pretrained=str(tmp_path)), tokenizer, 64, 0, None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize(
    ("network", "error", "told"),
    [
        (Network(timm="test_resnet"), ConfigError, "a translation recipe cannot have a 'timm' network"),
        (Network(marian={**SMALL, "d_modle": 4}), ConfigError, "MarianConfig has no d_modle"),
        (Network(marian={**SMALL, "d_model": 17}), ConfigError, "17"),
        (Network(pretrained="no/where"), DataError, r"cannot load 'no/where' \(no folder here\)"),
    ],
)
def test_what_is_no_translator_is_refused(network, error, told, tokenizer):
    with pytest.raises(error, match=told):
        translator(network, tokenizer, 64, 0, None)


def test_a_classifier_is_no_translator(tokenizer, tmp_path):
    make_model("cifar_resnet20").save_pretrained(tmp_path)
    with pytest.raises(DataError, match="AutoModelForSeq2SeqLM"):
        translator(Network(pretrained=str(tmp_path)), tokenizer, 64, 0, None)


# ------------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize("name", [*TRANSLATORS, *CLASSIFIERS])
def test_parameters_are_what_a_file_holds_without_its_buffers(name, tmp_path):
    """A tied weight once, sinusoidal positions not at all."""
    model = make_model(name)
    model.save_pretrained(tmp_path)
    buffers = {n.removeprefix("timm_model.") for n, _ in model.named_buffers()}
    saved = load_file(tmp_path / "model.safetensors")
    assert parameters(model) == sum(t.numel() for n, t in saved.items() if n.removeprefix("timm_model.") not in buffers)
