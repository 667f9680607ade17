"""The teacher stays as it is and out of the way, and one that does not speak of the same classes is refused."""

import copy

import pytest
import torch
from small import (
    arguments,
    bart,
    equal,
    image_trainer,
    marian,
    pad,
    resnet,
    rules,
    t5,
    translation_trainer,
    vit,
    weights,
)
from tokenizers import Tokenizer, models
from transformers import MarianMTModel, PreTrainedTokenizerFast

from hfcompress.errors import TeacherError
from hfcompress.teacher import check, check_vocabularies, logits_of
from hfcompress.trainer import CompressionTrainer


@pytest.mark.parametrize(
    ("make", "teacher"),
    [(image_trainer, lambda: resnet(seed=1)), (translation_trainer, lambda: marian(seed=1, dropout=0.5))],
)
def test_the_teacher_stays_as_it_is(tmp_path, make, teacher):
    teacher = teacher().train()
    before = weights(teacher)  # buffers too: batch norm in training mode would move its statistics
    modes, gradients = [], []
    teacher.register_forward_pre_hook(lambda module, _: modes.append(any(m.training for m in module.modules())))
    teacher.register_forward_hook(lambda module, _, outputs: gradients.append(outputs["logits"].requires_grad))
    trainer = make(
        tmp_path,
        given={"teacher": teacher, "compression": rules()},
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.model.train()
    trainer.train()
    assert len(modes) == 4 and not any(modes) and not any(gradients)
    assert equal(weights(teacher), before)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert trainer.teacher is teacher and trainer.model is not teacher
    assert not any(m is teacher for model in trainer.accelerator._models for m in model.modules())
    assert not any(m is teacher for m in trainer.model.modules())


def test_the_teacher_is_in_no_file(tmp_path):
    """Not by a name, and not by its bytes."""
    teacher = resnet(seed=1)
    taught = image_trainer(
        tmp_path / "taught", given={"teacher": teacher, "compression": rules()}, save_strategy="steps", save_steps=4
    )
    alone = image_trainer(tmp_path / "alone", given={"compression": rules()}, save_strategy="steps", save_steps=4)
    for trainer in (taught, alone):
        trainer.train()
        trainer.save_compressed(tmp_path / trainer.args.output_dir / "file")
    files = [
        {path.relative_to(t.args.output_dir): path for path in (tmp_path / t.args.output_dir).rglob("*.*")}
        for t in (taught, alone)
    ]
    assert files[0].keys() == files[1].keys() and len(files[0]) > 8
    parts = [tensor.detach().numpy().tobytes()[:512] for tensor in teacher.parameters() if tensor.std() > 0]
    for path in files[0].values():
        assert not any(part in path.read_bytes() for part in parts), path


def test_a_teacher_of_another_size_and_precision_teaches(tmp_path):
    teacher = marian(seed=1, width=32, layers=2)
    trainer = translation_trainer(tmp_path, given={"teacher": teacher}, bf16=True)
    seen = []
    teacher.lm_head.register_forward_hook(lambda module, _, output: seen.append(output.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}  # as fast as the student
    assert trainer.state.log_history[0]["kd"] > 0


def test_a_bare_model_teaches(tmp_path):
    """Neither a configuration nor an output with a name: the timm model itself."""
    teacher = resnet(seed=1).timm_model

    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = teacher

        def forward(self, pixel_values):
            return self.inner(pixel_values)

    given = {"teacher": Bare()}
    trainer = image_trainer(tmp_path, copy_of(Bare(), seed=2), given=given, eval_strategy="epoch")
    trainer.train()
    assert trainer.state.log_history[0]["kd"] > 0 and trainer.evaluate()["eval_loss"] > 0


def copy_of(model, seed):
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def test_logits_of():
    logits = torch.zeros(2, 3)
    assert logits_of(logits) is logits and logits_of({"logits": logits}) is logits


# ------------------------------------------------------------------------------------- refused


def changed(make, **config):
    model = make()
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


LABELS = {i: f"digit {9 - i}" for i in range(10)}
GREY = {"input_size": [3, 8, 8], "mean": [0.4] * 3, "std": [0.5] * 3, "crop_pct": 1.0}


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (lambda: bart(), lambda: resnet(), r"the teacher is an encoder-decoder, the student is no encoder-decoder"),
        (lambda: changed(marian, vocab_size=7), marian, rf"vocab_size: 7 / {pad() + 1}"),
        (lambda: changed(marian, decoder_vocab_size=7), marian, rf"decoder_vocab_size: 7 / {pad() + 1}"),
        (lambda: changed(t5, pad_token_id=3), t5, rf"pad_token_id: 3 / {pad()}"),
        (lambda: changed(bart, eos_token_id=5), bart, r"eos_token_id: 5 / 0"),
        (lambda: changed(bart, decoder_start_token_id=0), marian, rf"decoder_start_token_id: 0 / {pad()}"),
        (lambda: resnet(id2label=dict(enumerate("abc")), label2id={}), resnet, r"has 3 labels, the student 10"),
        (lambda: resnet(id2label=LABELS), resnet, r"differently: 10 differ, first 0 \('digit 9' / 'digit 0'\)"),
        (lambda: resnet(pretrained_cfg=GREY), resnet, r"mean: \[0.4, 0.4, 0.4\] / \[0.5, 0.5, 0.5\]"),
        (lambda: resnet(pretrained_cfg={**GREY, "std": [1.0] * 3}), resnet, r"mean: .*; std: \[1.0, 1.0, 1.0\]"),
    ],
)
def test_a_teacher_of_other_classes_is_refused(teacher, student, message):
    with pytest.raises(TeacherError, match=message):
        check(teacher(), student())


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (bart, marian),
        (vit, resnet),
        (lambda: resnet(id2label={i: f"LABEL_{i}" for i in range(10)}), resnet),  # never named
        (lambda: resnet(pretrained_cfg={**GREY, "mean": (0.5, 0.5, 0.5)}), resnet),
    ],
)
def test_a_teacher_of_the_same_classes_is_not(teacher, student):
    check(teacher(), student())


def test_one_model_cannot_be_both(tmp_path):
    model = resnet()
    with pytest.raises(TeacherError, match=r"same object.*copy\.deepcopy"):
        image_trainer(tmp_path, model, given={"teacher": model})
    other = copy.deepcopy(model)
    other.timm_model.conv1.weight = model.timm_model.conv1.weight
    with pytest.raises(TeacherError, match="share 1 weights"):
        CompressionTrainer(model=model, args=arguments(tmp_path), teacher=other)


# -------------------------------------------------------------------------------- vocabularies


def tokenizer(words):
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def test_the_same_vocabulary_passes():
    check_vocabularies(tokenizer("abcdef"), tokenizer("abcdef"))


def test_permuted_ids_are_refused_with_the_first_conflicts():
    with pytest.raises(TeacherError) as refused:
        check_vocabularies(tokenizer("abcdefgh"), tokenizer("abhgfedc"))
    assert "differ in 6 of 11 ids" in str(refused.value)
    conflicts = "5 is 'c' / 'h', 6 is 'd' / 'g', 7 is 'e' / 'f', 8 is 'f' / 'e', 9 is 'g' / 'd'"
    assert f"(id: teacher / student): {conflicts}. Give the student" in str(refused.value)


def test_a_token_more_is_refused():
    with pytest.raises(TeacherError, match=r"differ in 1 of 7 ids .*: 6 is None / 'd'"):
        check_vocabularies(tokenizer("abc"), tokenizer("abcd"))


def test_the_tokenizer_beside_the_teacher_is_the_students(tmp_path, caplog):
    folder = tmp_path / "teacher"
    marian(seed=1).save_pretrained(folder)

    def trainer():
        given = {"teacher": MarianMTModel.from_pretrained(folder), "processing_class": tokenizer("abcd")}
        return translation_trainer(tmp_path / "out", given=given)

    assert trainer() and f"No tokenizer lies beside the teacher in {folder}" in caplog.text
    tokenizer("abdc").save_pretrained(folder)
    with pytest.raises(TeacherError, match="differ in 2 of 7 ids"):
        trainer()
    caplog.clear()
    tokenizer("abcd").save_pretrained(folder)
    assert trainer() and "tokenizer" not in caplog.text
