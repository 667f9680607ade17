"""Rules and slots; weights written, gradients pulled back; draws; state."""

import copy
import io

import pytest
import torch
from methods import TABLE, Scaled, name_of
from torch import nn
from toys import Toy, compress, loss_of

from hfcompress.claims import kind_of
from hfcompress.compressor import Compressor
from hfcompress.errors import ConfigError
from hfcompress.methods import Dense, Uniform
from hfcompress.reparameterization import Kind, Reparameterization
from hfcompress.schema import Rule

EVERY_WEIGHT = {name for name, _ in Toy().named_parameters()}
NOISY = Uniform(bits=2, bucket=16, stochastic=True)
every_method = pytest.mark.parametrize("method", [*TABLE, Scaled()], ids=name_of)


# -------------------------------------------------------------------------------------------------- rules


def test_the_first_rule_that_matches_wins() -> None:
    first, second, third = Uniform(bits=2), Uniform(bits=3), Dense()
    rules = [
        Rule(method=first, pattern="inner.*", kinds=(Kind.LINEAR,)),
        Rule(method=second, kinds=(Kind.LINEAR, Kind.CONV, Kind.EMBEDDING)),
        Rule(method=third, pattern="norm.*"),
    ]
    entries = Compressor(Toy(), rules).entries
    by_method = {method: {n for n, e in entries.items() if e.method == method} for method in (first, second, third)}
    assert by_method[first] == {"inner.0.weight", "inner.2.weight"}
    assert by_method[second] == {"embed.weight", "conv.weight", "frozen.weight", "unused.weight"}
    assert by_method[third] == {"norm.weight", "norm.bias"}


def test_slots_lie_side_by_side_in_their_group() -> None:
    entries = Compressor(Toy(), [Rule(method=Dense(), kinds=(Kind.CONV,)), Rule(method=Dense())]).entries
    assert (entries["conv.weight"].slot.offset, entries["conv.weight"].slot.total) == (0, 192)
    offset = 0
    for name, entry in entries.items():
        if name != "conv.weight":
            assert (entry.slot.offset, entry.slot.shape) == (offset, tuple(entry.parameter.shape))
            offset += entry.slot.numel
    assert {e.slot.total for n, e in entries.items() if n != "conv.weight"} == {offset}


def test_kinds() -> None:
    model = Toy()
    found = {
        name: kind_of(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], parameter)
        for name, parameter in model.named_parameters()
    }
    assert found["embed.weight"] == Kind.EMBEDDING and found["conv.weight"] == Kind.CONV
    assert found["norm.weight"] == Kind.NORM and found["norm.bias"] == Kind.BIAS and found["inner.0.bias"] == Kind.BIAS
    batch_norm, attention = nn.BatchNorm2d(3), nn.MultiheadAttention(4, 2)
    assert kind_of(batch_norm, "weight", batch_norm.weight) == Kind.NORM
    assert kind_of(attention, "in_proj_weight", attention.in_proj_weight) == Kind.OTHER


@pytest.mark.parametrize("pattern", ["nothing.*", "embed.bias"])
def test_a_rule_without_weights_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"rule 0 .* claims no weight.*embed.weight"):
        compress(Toy(), Dense(), pattern)


def test_a_rule_left_without_weights_by_earlier_ones_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rule 1 .*earlier rules took them all"):
        Compressor(Toy(), [Rule(method=Dense()), Rule(method=Uniform(), pattern="conv.*")])


@pytest.mark.parametrize("pattern", ["embed.*", "head.*", "[eh]*d.weight"])
def test_a_tied_weight_is_claimed_once_by_any_of_its_names(pattern: str) -> None:
    model = Toy()
    assert list(compress(model, Uniform(), pattern).entries) == ["embed.weight"]
    assert model.head.weight is model.embed.weight


def test_a_tied_weight_claimed_by_two_rules_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"embed\.weight by rule 1, head\.weight by rule 0"):
        Compressor(Toy(), [Rule(method=Dense(), pattern="head.*"), Rule(method=Dense(), pattern="embed.*")])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    model = Toy()
    model.conv.weight.data[0, 0, 0] = value
    for pattern in ("*", "head.*"):  # claimed or not, it would be in the file
        with pytest.raises(ConfigError, match=r"conv.weight: .*NaN or infinity"):
            Compressor(model, [Rule(method=Uniform(), pattern=pattern)])


@pytest.mark.parametrize("method", [Uniform(), Dense()], ids=name_of)
def test_weights_beyond_the_methods_format_are_refused(method: Reparameterization) -> None:
    model = Toy()
    model.conv.weight.data[0, 0, 0] = -1e6
    with pytest.raises(ConfigError, match=r"conv.weight: .*1e\+06.*wider"):
        compress(model, method)
    assert model.conv.weight[0, 0, 0] == -1e6


# ---------------------------------------------------------------------------------- weights and gradients


@every_method
def test_the_model_holds_the_hard_decode(method: Reparameterization) -> None:
    model = Toy()
    before = {id(p) for p in model.parameters()}
    compressor = compress(model, method)
    for entry in compressor.entries.values():
        assert torch.equal(entry.parameter, method.decode(entry.latents, entry.slot, hard=True))
    assert {id(p) for p in model.parameters()} == before and all(p.is_leaf for p in model.parameters())
    assert compressor.entries.keys() == EVERY_WEIGHT
    assert compressor.parameters == sum(p.numel() for p in model.parameters())


@every_method
@pytest.mark.parametrize("rate_weight", [0.0, 0.3])
def test_pull_back_is_autograd_through_decode(method: Reparameterization, rate_weight: float) -> None:
    """The gradient of loss(decode(latents)) + rate_weight · bits / weights, taken in one piece."""
    if rate_weight and not compress(Toy(), method).rate().requires_grad:
        with pytest.raises(ConfigError, match="rate_weight"):
            compress(Toy(), method, rate_weight=rate_weight)
        return
    model = Toy()
    compressor = compress(model, method, rate_weight=rate_weight, seed=4)
    compressor.write(hard=False)
    loss_of(model, 0).backward()
    copies = copy.deepcopy({name: entry.latents for name, entry in compressor.entries.items()})
    shared = {key: copies["embed.weight"][key] for key in method.shared}
    drawn = {name: compressor._drawn(entry) for name, entry in compressor.entries.items()}
    compressor.pull_back()

    weights, rates = {}, []
    for name, latents in copies.items():
        latents.update(shared)
        weights[name] = method.decode(latents, drawn[name], hard=False)
        rates.append(method.rate(latents, drawn[name]))
    used = {n: w if n.partition(".")[0] not in ("frozen", "unused") else w.detach() for n, w in weights.items()}
    wanted = loss_of(lambda tokens: torch.func.functional_call(model, used, tokens), 0)
    if rate_weight:
        wanted = wanted + rate_weight / compressor.parameters * sum(rates)
    wanted.backward()
    for name, latents in copies.items():
        for key, latent in latents.items():
            found = compressor.entries[name].latents[key].grad
            if latent.grad is None or (name.startswith(("frozen", "unused")) and not rate_weight and key not in shared):
                assert found is None, (name, key)
            else:
                assert torch.allclose(found, latent.grad, rtol=1e-5, atol=1e-8), (name, key)


def test_accumulated_gradients_are_pulled_back_once() -> None:
    model = Toy()
    compressor = compress(model, Uniform(bits=2))
    for step in range(3):
        (loss_of(model, step) / 3).backward()
    gradients = {name: entry.parameter.grad for name, entry in compressor.entries.items()}
    compressor.pull_back()
    for name, entry in compressor.entries.items():
        assert (gradients[name] is None) == (entry.latents["weight"].grad is None)
        assert gradients[name] is None or torch.equal(gradients[name], entry.latents["weight"].grad)
        assert entry.parameter.grad is None  # or the peak would hold both


def test_rules_name_weights_of_timm_as_files_do() -> None:
    model = nn.ModuleDict({"timm_model": Toy()})
    found = {pattern: set(compress(model, Uniform(), pattern).entries) for pattern in ("conv.*", "timm_model.conv.*")}
    assert found["conv.*"] == found["timm_model.conv.*"] == {"timm_model.conv.weight", "timm_model.conv.bias"}
    with pytest.raises(ConfigError, match=r"weights are called embed\.weight"):
        compress(model, Uniform(), "nothing.*")


def test_shared_latents_are_one_tensor() -> None:
    compressor = compress(Toy(), Scaled())
    assert len({id(e.latents["log_scale"]) for e in compressor.entries.values()}) == 1
    scales = [latent for _, latent, decayed in compressor.trained() if not decayed]
    assert len(scales) == 1 and scales[0].shape == ()


def test_rate_is_in_bits() -> None:
    model = Toy()
    weights = sum(p.numel() for p in model.parameters())
    assert compress(model, Dense()).rate() == 16 * weights
    assert compress(Toy().to(torch.float16), Dense()).rate() == 16 * weights  # beyond what float16 can count


# ------------------------------------------------------------------------------------------ noise and state


def test_noise_is_for_training_steps_only() -> None:
    model = Toy()
    compressor = compress(model, NOISY)
    hard = copy.deepcopy(model.state_dict())
    assert compressor.noisy
    compressor.write(hard=False)
    noisy = copy.deepcopy(model.state_dict())
    assert not torch.equal(hard["conv.weight"], noisy["conv.weight"])
    compressor.write()
    assert all(torch.equal(hard[name], value) for name, value in model.state_dict().items())


def test_draws_depend_on_seed_step_and_slot() -> None:
    def drawn(seed: int, steps: int) -> dict[str, torch.Tensor]:
        model = Toy()
        compressor = compress(model, NOISY, seed=seed)
        for _ in range(steps):
            torch.rand(5)  # whatever the global generator did meanwhile
            compressor.pull_back()
        compressor.write(hard=False)
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    first = drawn(0, 2)
    assert all(torch.equal(first[name], p) for name, p in drawn(0, 2).items())
    for other in (drawn(1, 2), drawn(0, 3)):
        assert not torch.equal(first["conv.weight"], other["conv.weight"])
    model = Toy()
    model.unused.weight.data.copy_(model.frozen.weight)  # equal weights in two slots draw differently
    compress(model, NOISY).write(hard=False)
    assert not torch.equal(model.unused.weight, model.frozen.weight)


@every_method
def test_state_round_trip(method: Reparameterization) -> None:
    model, other = Toy(), Toy(seed=1)
    saved, loaded = compress(model, method), compress(other, method)
    saved.pull_back()
    with torch.no_grad():
        for _, latent, _ in saved.trained():
            latent.mul_(0.9)
    saved.write()
    buffer = io.BytesIO()
    torch.save(saved.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert loaded.step == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    for name, entry in saved.entries.items():
        assert all(torch.equal(latent, loaded.entries[name].latents[key]) for key, latent in entry.latents.items())


def test_state_of_other_slots_is_refused() -> None:
    compressor = compress(Toy(), Uniform(), "conv.*")
    before = copy.deepcopy(compressor.state_dict())
    for other in (compress(Toy(), Uniform()), compress(Toy(), Scaled(), "conv.*")):
        with pytest.raises(ConfigError, match="are not this model's"):
            compressor.load_state_dict(other.state_dict())
    assert torch.equal(compressor.entries["conv.weight"].latents["weight"], before["latents"]["conv.weight"]["weight"])


def test_loading_in_the_middle_of_a_step_forgets_its_draws() -> None:
    model = Toy()
    compressor = compress(model, Scaled())
    loss_of(model, 0).backward()
    compressor.load_state_dict(compress(Toy(seed=1), Scaled()).state_dict())
    compressor.pull_back()
    assert compressor.entries["conv.weight"].latents["direction"].grad.isfinite().all()
