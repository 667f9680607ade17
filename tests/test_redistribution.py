"""`redistribution.py`: norms measured on a real small network, and the rules made of them."""

import copy

import pytest
import torch
from small import digits, resnet
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Toy, loss_of

from hfcompress.compressor import Compressor
from hfcompress.errors import ConfigError
from hfcompress.methods import Dense, Levels
from hfcompress.methods.levels import redistribute
from hfcompress.redistribution import gradient_norms, redistribute_points
from hfcompress.reparameterization import Kind
from hfcompress.schema import Rule

WEIGHTS = (Kind.CONV, Kind.LINEAR, Kind.EMBEDDING)


def batches(count: int) -> list[dict[str, Tensor]]:
    rows = [digits()[i * 16 : (i + 1) * 16] for i in range(count)]
    return [{key: torch.stack([row[key] for row in batch]) for key in batch[0]} for batch in rows]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"])


def test_norms_are_those_of_the_mean_gradient() -> None:
    model = resnet().train()
    model.timm_model.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    norms = gradient_norms(model, iter(batches(3)), loss)
    assert model.training and not model.timm_model.bn1.training and model.timm_model.conv1.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    model.eval()
    for batch in batches(3):
        (loss(model, batch) / 3).backward()
    assert norms.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert norms[name] == pytest.approx(parameter.grad.norm().item(), rel=1e-4)


def test_unused_weights_have_no_norm_and_frozen_ones_none_at_all() -> None:
    norms = gradient_norms(Toy(), [0, 1], loss_of)
    assert norms["unused.weight"] == 0 < norms["conv.weight"] and "frozen.weight" not in norms
    with pytest.raises(ConfigError, match="no batch"):
        gradient_norms(Toy(), [], loss_of)


def test_every_tensor_gets_its_own_rule() -> None:
    model = resnet()
    before = copy.deepcopy(model.state_dict())
    base = [Rule(method=Levels(6, bucket=64), kinds=WEIGHTS), Rule(method=Dense())]
    norms = gradient_norms(model, batches(2), loss)
    rules = redistribute_points(model, base, norms)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    claimed = {n: e.method for n, e in Compressor(copy.deepcopy(model), base).entries.items()}
    points = {name: 6 for name, method in claimed.items() if isinstance(method, Levels)}
    shares = redistribute(norms, points)
    assert len(points) == 20 and len(set(shares.values())) > 1 and sum(shares.values()) == 120
    entries = Compressor(model, rules).entries
    assert entries.keys() == claimed.keys()
    for name, entry in entries.items():
        assert entry.method == (Levels(shares[name], bucket=64) if name in shares else Dense())


def test_other_rules_and_tied_weights_stay_as_they_are() -> None:
    base = (
        Rule(method=Dense(), pattern="conv.*"),
        Rule(method=Levels(4), pattern="inner.*", kinds=WEIGHTS),
        Rule(method=Levels(8), kinds=WEIGHTS),
        Rule(method=Levels(4), pattern="norm.*"),
    )
    model = Toy()
    norms = {**gradient_norms(model, [0], loss_of), "frozen.weight": 0.0}
    rules = redistribute_points(model, base, norms)
    methods = {n: e.method for n, e in Compressor(Toy(), rules).entries.items()}
    assert methods.keys() == {n: e for n, e in Compressor(Toy(), base).entries.items()}.keys()
    assert methods["embed.weight"] == Levels(8) and methods["conv.weight"] == Dense()
    others = {n: m.points for n, m in methods.items() if isinstance(m, Levels) and n != "embed.weight"}
    assert sum(others.values()) == 2 * 4 + 2 * 8 + 2 * 4
    assert others["unused.weight"] == others["frozen.weight"] == 4  # half of what they had


def test_a_claimed_tensor_needs_a_norm() -> None:
    rules = [Rule(method=Levels(), kinds=(Kind.LINEAR,))]
    with pytest.raises(ConfigError, match=r"frozen.weight needs a finite norm"):
        redistribute_points(Toy(), rules, gradient_norms(Toy(), [0], loss_of))
