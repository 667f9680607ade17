"""The papers' small networks: their sizes, their forward passes from the weights alone, and reading them back."""

import pytest
import timm
import torch
from torch.nn import functional as F
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from hfcompress import zoo
from hfcompress.checkpoint import save
from hfcompress.compressor import Compressor
from hfcompress.methods import Uniform
from hfcompress.networks import classifier, parameters
from hfcompress.reparameterization import Kind
from hfcompress.schema import ImageData, Network, Rule

LABELS = [f"class {i}" for i in range(10)]
SIZES = {
    "lenet_300_100": 266_610,
    "lenet5_caffe": 431_080,
    "polino_teacher": 5_346_142,
    "polino_student1": 1_000_235,
    "polino_student2": 318_415,
    "polino_student3": 111_935,
}


def made(name, **arguments):
    """In evaluation mode, with batch-norm statistics that tell."""
    zoo.register()
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    for buffer_name, buffer in model.named_buffers():
        if "running" in buffer_name:
            buffer.uniform_(0.5, 1.5)
    return model


def images(model):
    return torch.randn(3, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "count"), SIZES.items())
def test_sizes_are_the_papers(name, count):
    """Polino: 5.3, 1.0, 0.3 and 0.1 million; LeNets: 267 and 431 thousand."""
    assert parameters(made(name)) == count


def test_resnet_20_4_has_the_size_of_the_paper():
    """Oktay et al.: 17.2 MB of float32."""
    assert parameters(made("cifar_resnet20", width=4)) == 4_286_026


def test_lenet_300_100():
    model = made("lenet_300_100")
    w, x = model.state_dict(), images(model)
    hidden = F.relu(x.reshape(3, 784) @ w["fc1.weight"].T + w["fc1.bias"])
    hidden = F.relu(hidden @ w["fc2.weight"].T + w["fc2.bias"])
    with torch.inference_mode():
        assert torch.allclose(model(x), hidden @ w["fc3.weight"].T + w["fc3.bias"], atol=1e-5)


@pytest.mark.parametrize("relu", [False, True])
def test_lenet_5(relu):
    model = made("lenet5_caffe", convolution_relu=relu)
    w, x = model.state_dict(), images(model)
    for name in ("conv1", "conv2"):
        x = F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"]).unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
        x = x.clamp(min=0) if relu else x
    assert x.shape == (3, 50, 4, 4)
    hidden = F.relu(x.reshape(3, -1) @ w["fc1.weight"].T + w["fc1.bias"])
    with torch.inference_mode():
        assert torch.allclose(model(images(model)), hidden @ w["fc2.weight"].T + w["fc2.bias"], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "convolutions", "dense", "pooled"),
    [("polino_teacher", 8, 2, {1, 3, 7}), ("polino_student3", 4, 1, {1, 3})],
)
@pytest.mark.parametrize("logits_relu", [False, True])
def test_polinos_networks(name, convolutions, dense, pooled, logits_relu):
    model = made(name, logits_relu=logits_relu)
    w, x = model.state_dict(), images(model)

    def norm(x, i):
        mean, variance, scale, shift = (
            w[f"norms.{i}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        shape = (-1, *[1] * (x.ndim - 2))
        x = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
        return x * scale.view(shape) + shift.view(shape)

    for i in range(convolutions):
        kernel = w[f"convolutions.{i}.weight"]
        x = F.conv2d(x, kernel, w[f"convolutions.{i}.bias"], padding=kernel.shape[-1] // 2)
        x = norm(x.clamp(min=0), i)
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2)) if i in pooled else x
    x = x.reshape(3, -1)
    for i in range(dense):
        x = norm((x @ w[f"dense.{i}.weight"].T + w[f"dense.{i}.bias"]).clamp(min=0), convolutions + i)
    x = x @ w["out.weight"].T + w["out.bias"]
    with torch.inference_mode():
        assert torch.allclose(model(images(model)), x.clamp(min=0) if logits_relu else x, rtol=1e-4, atol=1e-4)


def test_dropout_is_the_teachers_and_the_students_without_one():
    """Distilled students have none."""
    layers = {name: made(name).dropouts for name in ("polino_teacher", "polino_student1")}
    assert layers == {"polino_teacher": {1: 0.2, 3: 0.3, 7: 0.35, 8: 0.4, 9: 0.4}, "polino_student1": {}}
    alone = made("polino_student1", dropout=True)
    assert alone.dropouts == {1: 0.2, 3: 0.3, 4: 0.4}
    alone.train()
    torch.manual_seed(0)
    assert not torch.equal(alone(images(alone)), alone(images(alone)))


@pytest.mark.parametrize("name", SIZES)
def test_timms_halves_and_other_images(name):
    model = made(name)
    whole = model(images(model))
    features = model.forward_features(images(model))
    assert torch.equal(model.forward_head(features), whole) and whole.shape == (3, 10)
    assert model.forward_head(features, pre_logits=True).shape == (3, model.num_features)
    small = made(name, in_chans=2, img_size=16, num_classes=4)
    assert small(torch.zeros(2, 2, 16, 16)).shape == (2, 4)
    assert made(name, num_classes=0)(images(model)).shape == (3, model.num_features)
    with pytest.raises(ValueError, match="no published weights"):
        timm.create_model(name, pretrained=True)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model.set_grad_checkpointing()


def test_a_network_starts_with_the_weights_that_its_author_meant():
    """transformers draws all layers anew from one distribution, in which LeNet would learn little."""
    data = ImageData(embedded="digits", size=28, mean=(0.5,), std=(0.5,))
    model = classifier(Network(timm="lenet_300_100"), data, LABELS, None, seed=3)
    state = model.timm_model.state_dict()
    for name, (inputs, outputs) in {"fc1": (784, 300), "fc2": (300, 100), "fc3": (100, 10)}.items():
        assert state[f"{name}.weight"].abs().max() <= (6 / (inputs + outputs)) ** 0.5
        assert state[f"{name}.weight"].std() == pytest.approx((2 / (inputs + outputs)) ** 0.5, rel=0.1)
        assert not state[f"{name}.bias"].any()
    again = classifier(Network(timm="lenet_300_100"), data, LABELS, None, seed=3)
    assert all(torch.equal(tensor, again.timm_model.state_dict()[name]) for name, tensor in state.items())


@pytest.mark.parametrize("name", SIZES)
def test_a_fresh_process_reads_the_compressed_folder(name, tmp_path, run_python):
    """With transformers' own call and the plug-in: nothing else is imported, nothing registered by hand."""
    zoo.register()
    size = list(made(name).pretrained_cfg["input_size"])
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=name, num_labels=10, pretrained_cfg={"input_size": size})
    model = TimmWrapperForImageClassification(config).eval()
    rules = [Rule(method=Uniform(bits=2), kinds=(Kind.CONV, Kind.LINEAR))]
    save(model, tmp_path, Compressor(model, rules))
    torch.save(model(torch.ones(1, *size)).logits.detach(), tmp_path / "logits.pt")
    code = """
import sys, torch, hfcompress
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
wanted = torch.load(sys.argv[1] + "/logits.pt")
with torch.inference_mode():
    found = model(torch.ones(1, *model.config.pretrained_cfg["input_size"])).logits
print(torch.allclose(found, wanted, rtol=1e-4, atol=1e-5), found.abs().max().item() > 0)
"""
    assert run_python(code, tmp_path).split() == ["True", "True"]
