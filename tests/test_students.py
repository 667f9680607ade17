"""Students cut from a teacher: the layers that were asked for, with the teacher's weights."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import bart, collate, equal, marian, names, resnet, t5, translation_trainer, weights

from hfcompress import load
from hfcompress.errors import ConfigError
from hfcompress.schema import Layers
from hfcompress.students import evenly_spaced, from_teacher


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


@pytest.mark.parametrize(
    ("teacher", "layers", "message"),
    [
        (lambda: marian(layers=2), (2, 3), "asks for 3 decoder layers; the teacher has 2"),
        (lambda: marian(layers=1), (4, 1), "asks for 4 encoder layers; the teacher has 1"),
        (t5, (1, 1), r"T5ForConditionalGeneration has no model\.encoder\.layers"),
        (resnet, (1, 1), "TimmWrapperForImageClassification has no"),
    ],
)
def test_what_cannot_be_cut_is_refused(teacher, layers, message):
    with pytest.raises(ConfigError, match=message):
        from_teacher(teacher(), Layers(encoder_layers=layers[0], decoder_layers=layers[1]))
