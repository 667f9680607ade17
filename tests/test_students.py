"""Students cut from a teacher: the layers that were asked for, with the teacher's weights."""

from itertools import pairwise

import pytest
import torch
from conftest import _HALVES, _TOKENS, TRANSLATORS
from hypothesis import given
from hypothesis import strategies as st
from small import bart, collate, equal, marian, names, resnet, t5, translation_trainer, weights
from transformers import AutoModelForSeq2SeqLM, MBartConfig, set_seed

from hfcompress import load
from hfcompress.claims import unsaved
from hfcompress.errors import ConfigError
from hfcompress.schema import Layers
from hfcompress.students import cut_of, evenly_spaced, from_teacher


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_layers_are_spread_evenly(sizes):
    available, wanted = sizes
    kept = evenly_spaced(available, wanted)
    assert len(kept) == len(set(kept)) == wanted and kept == sorted(kept)
    assert kept[0] == 0 and (kept[-1] == available - 1 or wanted == 1)
    gaps = {b - a for a, b in pairwise(kept)}
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("make", [marian, bart])
def test_what_is_kept_is_the_teachers(make):
    teacher = make(layers=5).requires_grad_(False).eval()
    before = weights(teacher)
    student = from_teacher(teacher, Layers(encoder_layers=3, decoder_layers=2))
    theirs, ours = weights(teacher), weights(student)
    kept = {"encoder": [0, 2, 4], "decoder": [0, 4]}
    layers = 0
    for name in ours:
        side, _, rest = name.removeprefix("model.").partition(".layers.")
        source = name
        if rest:
            number, _, leaf = rest.partition(".")
            source = f"model.{side}.layers.{kept[side][int(number)]}.{leaf}"
            layers += 1
        assert torch.equal(ours[name], theirs[source])
        assert ours[name].data_ptr() != theirs[source].data_ptr()
    assert layers and equal(before, theirs)
    assert (student.config.encoder_layers, student.config.decoder_layers) == (3, 2)
    assert (teacher.config.encoder_layers, teacher.config.decoder_layers) == (5, 5)


@pytest.mark.parametrize("make", [marian, bart])
def test_what_was_tied_stays_tied_and_trains(make):
    teacher = make(layers=2).requires_grad_(False).eval()
    student = from_teacher(teacher, Layers(encoder_layers=1, decoder_layers=1))
    shared = student.get_input_embeddings().weight
    assert shared is student.get_output_embeddings().weight is student.model.decoder.embed_tokens.weight
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in make().named_parameters() if not p.requires_grad}
    assert student.training and not teacher.training


def test_all_layers_give_the_teacher_again():
    teacher = marian(layers=2).eval()
    student = from_teacher(teacher, Layers(encoder_layers=2, decoder_layers=2)).eval()
    batch = collate(names(count=4))
    with torch.no_grad():
        assert torch.equal(student(**batch).logits, teacher(**batch).logits)


@pytest.mark.parametrize("decoder_layers", [1, 3])
def test_a_cut_student_trains_generates_and_comes_back(tmp_path, decoder_layers):
    """What it generates with its cache, before it was ever saved, is what its file generates."""
    student = from_teacher(marian(layers=4), Layers(encoder_layers=2, decoder_layers=decoder_layers))
    trainer = translation_trainer(tmp_path, student, given={"teacher": marian(layers=4)}, max_steps=2)
    trainer.train()
    student.save_pretrained(tmp_path / "student")
    batch = {k: v for k, v in collate(names(count=6)).items() if k != "labels"}
    here, back = (m.eval().generate(**batch, max_new_tokens=12) for m in (student, load(tmp_path / "student")))
    assert torch.equal(here, back)


FAMILIES = ("marian", "bart", "mbart", "m2m_100", "pegasus", "t5", "mt5")


def family(name, layers=3):
    """A teacher of a family, of so many layers, with random weights."""
    if name in ("marian", "bart"):
        return {"marian": marian, "bart": bart}[name](layers=layers).eval()
    config = MBartConfig(**_HALVES, **_TOKENS) if name == "mbart" else TRANSLATORS[name]()
    for field in ("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"):
        if field in config.to_dict():
            setattr(config, field, layers)
    set_seed(0)
    return AutoModelForSeq2SeqLM.from_config(config).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_cut(name, tmp_path):
    """Named layers, narrower, saved and loaded; a layer that was kept computes what it computed."""
    teacher = family(name)
    student = from_teacher(teacher, Layers(encoder_layers=(0, 2), decoder_layers=(1,), ffn_dim=10)).eval()
    cut = cut_of(student)
    assert (cut.encoder_layers, cut.decoder_layers, cut.layers, cut.ffn_dim[1]) == ((0, 2), (1,), (3, 3), 10)
    assert "encoder layers 0, 2 of 3; decoder layers 1 of 3; 10 of" in str(cut)
    assert cut.parameters == (numbers(teacher), numbers(student)) and cut.parameters[1] < cut.parameters[0]
    tied = teacher.get_input_embeddings().weight is teacher.get_output_embeddings().weight
    assert tied == (student.get_input_embeddings().weight is student.get_output_embeddings().weight)
    student.save_pretrained(tmp_path)
    back = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert cut_of(back) == cut and cut_of(teacher) is None
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(*(m(input_ids=ids, decoder_input_ids=ids).logits for m in (student, back)))


def numbers(model):
    return sum(p.numel() for n, p in model.named_parameters() if n not in unsaved(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_left_out_are_as_if_they_did_nothing(name):
    """The teacher whose other layers add nothing to the residual stream is the student, T5's position biases too."""
    teacher = family(name)
    student = from_teacher(teacher, Layers(encoder_layers=(1,), decoder_layers=(0, 2))).eval()
    for side, left_out in (("encoder", (0, 2)), ("decoder", (1,))):
        blocks = getattr(teacher.get_encoder() if side == "encoder" else teacher.get_decoder(), "block", None)
        layers = blocks or (teacher.get_encoder() if side == "encoder" else teacher.get_decoder()).layers
        for i in left_out:
            for path, parameter in layers[i].named_parameters():
                if path.endswith((".o.weight", ".wo.weight", "out_proj.weight", "out_proj.bias")) or "fc2" in path:
                    parameter.data.zero_()
    if name in ("marian", "bart"):
        pytest.skip("these normalise after every layer: a layer that adds nothing is not nothing")
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        logits = [m(input_ids=ids, decoder_input_ids=ids).logits for m in (teacher, student)]
    assert torch.allclose(*logits, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_units_that_do_nothing_go_first(name):
    teacher = family(name, layers=1)
    dead = torch.tensor([0, 3, 4])
    for path, parameter in teacher.named_parameters():
        if path.endswith(("fc2.weight", ".wo.weight")):
            parameter.data[:, dead] = 0
    width = {**teacher.config.to_dict()}.get("encoder_ffn_dim") or teacher.config.d_ff
    student = from_teacher(teacher, Layers(encoder_layers=1, decoder_layers=1, ffn_dim=width - 3)).eval()
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        logits = [m(input_ids=ids, decoder_input_ids=ids).logits for m in (teacher, student)]
    assert torch.allclose(*logits, atol=1e-6)
    with pytest.raises(ConfigError, match=f"ffn_dim {width + 1}; the teacher has {width} units in"):
        from_teacher(teacher, Layers(encoder_layers=1, decoder_layers=1, ffn_dim=width + 1))


@pytest.mark.parametrize(
    ("teacher", "layers", "message"),
    [
        (lambda: marian(layers=2), (2, 3), "asks for 3 decoder layers; the teacher has 2"),
        (lambda: marian(layers=1), (4, 1), "asks for 4 encoder layers; the teacher has 1"),
        (lambda: marian(layers=3), ((0, 3), 1), r"encoder layers \[0, 3\]: give them in rising order.* out of 0 … 2"),
        (lambda: marian(layers=3), (1, (1, 0)), r"decoder layers \[1, 0\]: give them in rising order"),
        (lambda: t5(layers=3), ((1, 1), 1), r"encoder layers \[1, 1\]"),
        (resnet, (1, 1), r"TimmWrapperForImageClassification has no model\.encoder\.layers or encoder\.block"),
    ],
)
def test_what_cannot_be_cut_is_refused(teacher, layers, message):
    with pytest.raises(ConfigError, match=message):
        from_teacher(teacher(), Layers(encoder_layers=layers[0], decoder_layers=layers[1]))
