"""The trainers: as their parents where nothing is asked of them; right gradients, hard weights and exact resumption."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import (
    SEQ2SEQ,
    VARIANTS,
    Seen,
    arguments,
    collate,
    difference,
    digits,
    equal,
    first_gradient,
    image_trainer,
    marian,
    names,
    one_step,
    pad,
    resnet,
    rules,
    translation_trainer,
    vit,
    weights,
    whole_gradient,
    with_decoder_inputs,
)
from transformers import AutoModelForImageClassification, AutoModelForSeq2SeqLM, Seq2SeqTrainer, Trainer

from hfcompress import load
from hfcompress.errors import ConfigError, ResumeError
from hfcompress.optimizer import CompressedOptimizer
from hfcompress.schema import Augmentation, Distillation, Rule
from hfcompress.stages import TellEpochs
from hfcompress.tasks import AugmentedImages
from hfcompress.trainer import CompressionTrainer, Seq2SeqCompressionTrainer, hold_padding_row

# -------------------------------------------------------------------------------- as the parents


def timeless(history):
    return [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in history]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("make", "parent", "ours", "given"),
    [
        (image_trainer, Trainer, CompressionTrainer, {}),
        (translation_trainer, Seq2SeqTrainer, Seq2SeqCompressionTrainer, {"data_collator": with_decoder_inputs}),
    ],
)
def test_as_the_parent_loss_for_loss(tmp_path, make, parent, ours, given, smoothing):
    settings = {"label_smoothing_factor": smoothing, "eval_strategy": "steps", "eval_steps": 3, "max_steps": 6}
    trainers = [make(tmp_path, trainer=kind, given=given, **settings) for kind in (parent, ours)]
    wanted, found = [timeless(t.state.log_history) for t in trainers if t.train()]
    # the parent's label smoother sums in another order than torch's cross-entropy
    tolerance = {"rel": 1e-6} if smoothing else {"rel": 0, "abs": 0}
    assert len(found) == len(wanted) == 9
    for mine, theirs in zip(found, wanted):
        assert mine == pytest.approx(theirs, **tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_the_gradient_is_that_of_the_whole_step(tmp_path, kind, variant):
    assert difference(first_gradient(kind, variant, 8, 4, tmp_path), whole_gradient(kind, variant)) < 1e-6


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "mixed up"])
def test_images_count_as_rows(tmp_path, soft):
    """Labels may be probabilities, as mixup gives them; every image is one term."""
    rows = digits()[:32]
    if soft:
        rows = [{**row, "labels": torch.nn.functional.one_hot(row["labels"], 10) * 0.8 + 0.02} for row in rows]
    given = {"train_dataset": rows, "teacher": vit(seed=1)}
    wanted, found = (one_step(image_trainer, vit(), given, *step, tmp_path) for step in ((32, 1), (8, 4)))
    assert difference(found, wanted) < 1e-6


# ------------------------------------------------------------------------------------ the log


@pytest.mark.parametrize("accumulation", [1, 4])
def test_both_parts_are_logged_and_make_the_loss(tmp_path, accumulation):
    mix = Distillation(soft=0.6, hard=0.5, temperature=3.0)
    trainer = translation_trainer(
        tmp_path,
        given={"teacher": marian(seed=1, layers=2), "distillation": mix, "compression": rules()},
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        logging_steps=2,
        max_steps=6,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    for entry in logged:
        assert entry["ce"] > 0 and entry["kd"] > 0
        assert entry["loss"] == pytest.approx(0.5 * entry["ce"] + 0.6 * entry["kd"], rel=1e-6)


def test_the_parts_after_resuming_are_those_of_the_uninterrupted_run(tmp_path):
    def trainer():
        given = {"teacher": marian(seed=1), "compression": rules()}
        return translation_trainer(tmp_path, given=given, save_strategy="steps", save_steps=4, max_steps=8)

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert timeless(resumed.state.log_history)[:8] == timeless(whole.state.log_history)[:8]


# ------------------------------------------------------------------- generation, best model, precision


def test_evaluation_generates(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {"right": float((prediction.predictions[:, 1] == prediction.label_ids[:, 0]).mean())}

    trainer = translation_trainer(
        tmp_path,
        given={"compute_metrics": metrics, "teacher": marian(seed=1), "compression": rules(stochastic=True)},
        predict_with_generate=True,
        generation_max_length=12,
        eval_strategy="steps",
        eval_steps=4,
    )
    trainer.train()
    batch = collate(names(32, 8))
    wanted = trainer.model.eval().generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_length=12)
    assert torch.equal(torch.from_numpy(seen[0][:8, : wanted.shape[1]]), wanted)
    assert "eval_right" in trainer.state.log_history[-2] and math.isfinite(trainer.state.log_history[-2]["eval_loss"])


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("make", [image_trainer, translation_trainer])
def test_the_best_weights_come_back_with_their_latents(tmp_path, make, stochastic):
    best_step = 2

    trainer = make(
        tmp_path,
        given={"compression": rules(stochastic=stochastic), "compute_metrics": Falling(best_step)},
        load_best_model_at_end=True,
        metric_for_best_model="quality",
        greater_is_better=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        max_steps=6,
    )
    trainer.train()
    best = tmp_path / f"checkpoint-{best_step}"
    assert Path(trainer.state.best_model_checkpoint) == best
    wanted = saved_weights(best)
    assert not equal(saved_weights(tmp_path / "checkpoint-6"), wanted)
    trainer.save_compressed(tmp_path / "file")
    for found in (trainer.model, load(tmp_path / "file")):
        assert equal({name: weights(found)[name] for name in wanted}, wanted)


class Falling:
    """A metric that is best at the first evaluation."""

    def __init__(self, first):
        self.value = first

    def __call__(self, prediction):
        self.value -= 1
        return {"quality": self.value}


def saved_weights(checkpoint):
    return load_file(checkpoint / "model.safetensors")


@pytest.mark.parametrize("make", [image_trainer, translation_trainer])
def test_bfloat16(tmp_path, make):
    teacher = resnet(seed=1) if make is image_trainer else marian(seed=1)
    given = {"teacher": teacher, "compression": rules()}
    low, full = (make(tmp_path, given=given, bf16=bf16, eval_strategy="epoch") for bf16 in (True, False))
    found, wanted = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in (low, full) if t.train())
    assert found == pytest.approx(wanted, rel=0.05) and found != wanted
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}
    low.save_compressed(tmp_path / "file")
    assert equal(weights(load(tmp_path / "file")), weights(low.model))


# ---------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("compression", [rules(4, 64), rules(2, None, stochastic=True), rules(8, 7)])
@pytest.mark.parametrize("kind", [*SEQ2SEQ, "resnet"])
def test_the_file_is_the_trained_model(tmp_path, kind, compression):
    if kind == "resnet":
        trainer = image_trainer(tmp_path, given={"compression": compression}, max_steps=2)
        inputs, auto = {"pixel_values": torch.stack([d["pixel_values"] for d in digits()[:4]])}, "image"
    else:
        model = SEQ2SEQ[kind]()
        trainer = translation_trainer(tmp_path, model, given={"compression": compression}, max_steps=2)
        inputs, auto = with_decoder_inputs(names(40, 4)), "text"
        inputs.pop("labels")
    trainer.train()
    sizes = trainer.save_compressed(tmp_path / "file")
    assert sizes.total == (tmp_path / "file" / "model.hfcompress.safetensors").stat().st_size
    family = AutoModelForImageClassification if auto == "image" else AutoModelForSeq2SeqLM
    loaded = family.from_pretrained(tmp_path / "file").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, trainer.model.eval()(**inputs).logits)


# ------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("stochastic", [False, True])
def test_resuming_is_exact(tmp_path, stochastic):
    """Four steps an epoch: from inside the first, at its end and inside the second. Dropout draws too."""

    def trainer():
        return translation_trainer(
            tmp_path,
            marian(dropout=0.1),
            given={"teacher": marian(seed=1), "compression": rules(2, stochastic=stochastic)},
            save_strategy="steps",
            save_steps=1,
            max_steps=9,
            weight_decay=0.1,
            logging_steps=20,
        )

    assert_resumes(trainer, tmp_path, (2, 4, 7))


def test_resuming_sees_the_same_augmented_images(tmp_path):
    rows = AugmentedImages(digits()[:64], Augmentation(crop_padding=2, flip=True), seed=0)

    def trainer():
        given = {"compression": rules(), "train_dataset": rows, "callbacks": [TellEpochs()]}
        return image_trainer(
            tmp_path,
            given=given,
            save_strategy="steps",
            save_steps=1,
            max_steps=10,
            per_device_train_batch_size=16,
            logging_steps=20,
        )

    assert_resumes(trainer, tmp_path, (3, 6, 8))


def assert_resumes(make, folder, steps):
    whole = make()
    whole.train()
    for step in steps:
        resumed = make()
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert resumed.state.global_step == whole.state.global_step
        assert equal(weights(resumed.model), weights(whole.model))
        ours, theirs = (t.compressor.state_dict() for t in (resumed, whole))
        assert ours["step"] == theirs["step"]
        assert all(equal(ours["latents"][name], theirs["latents"][name]) for name in theirs["latents"])


def test_restore_gives_weights_and_latents_without_training(tmp_path):
    def trainer():
        return image_trainer(tmp_path, given={"compression": rules()}, save_strategy="steps", save_steps=2)

    trained, other = trainer(), trainer()
    trained.train()
    other.restore(tmp_path / "checkpoint-4")
    assert equal(weights(other.model), weights(trained.model))
    assert other.save_compressed(tmp_path / "a").total == trained.save_compressed(tmp_path / "b").total
    plain = image_trainer(tmp_path / "plain", save_strategy="steps", save_steps=4)
    plain.train()
    with pytest.raises(ResumeError, match="saved without compression"):
        other.restore(tmp_path / "plain" / "checkpoint-4")
    with pytest.raises(ResumeError, match=r"no model\.safetensors"):
        other.restore(tmp_path)


def test_training_twice_goes_on(tmp_path):
    """The second call finds the optimizer of the first, already prepared."""
    trainer = translation_trainer(tmp_path, given={"teacher": marian(seed=1), "compression": rules()}, logging_steps=3)
    trainer.train()
    before = weights(trainer.model)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, CompressedOptimizer)
    assert isinstance(trainer.optimizer.optimizer.base, torch.optim.AdamW)
    assert not equal(weights(trainer.model), before)
    entry = next(e for e in trainer.state.log_history if "ce" in e)
    assert entry["loss"] == pytest.approx(0.3 * entry["ce"] + 0.7 * entry["kd"], rel=1e-6)


# ------------------------------------------------------------------------------------ labels, noise, padding


@pytest.mark.parametrize("given", [{}, {"compression": rules(), "teacher": marian(seed=1)}], ids=["plain", "both"])
def test_a_batch_without_labels_changes_nothing(tmp_path, given):
    nothing = [{**row, "labels": [-100] * len(row["labels"])} for row in names(0, 8)]
    look = Seen(weights, "step_begin", "step_end")
    trainer = translation_trainer(
        tmp_path,
        given={**given, "train_dataset": nothing + names(8, 8), "eval_dataset": nothing, "callbacks": [look]},
        train_sampling_strategy="sequential",
        label_smoothing_factor=0.1,
        logging_nan_inf_filter=False,
        max_steps=2,
    )
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert first["loss"] == 0 and first["grad_norm"] == 0
    assert math.isfinite(second["loss"]) and second["loss"] > 0
    assert equal(look.seen["step_end"][0], look.seen["step_begin"][0])
    assert all(tensor.isfinite().all() for tensor in weights(trainer.model).values())
    assert trainer.evaluate()["eval_loss"] == 0


def test_noise_is_for_training_steps_alone(tmp_path):
    model = marian()

    def is_hard(model):
        entries = trainer.compressor.entries.values()
        with torch.no_grad():
            return all(torch.equal(e.method.decode(e.latents, e.slot, hard=True), e.parameter) for e in entries)

    events = ("step_begin", "substep_end", "pre_optimizer_step", "optimizer_step", "step_end", "evaluate", "save")
    look = Seen(is_hard, *events, "train_end")
    trainer = translation_trainer(
        tmp_path,
        model,
        given={"compression": rules(2, stochastic=True), "callbacks": [look]},
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
    )
    in_forward = {True: [], False: []}
    model.register_forward_pre_hook(lambda module, _: in_forward[module.training].append(is_hard(module)))
    trainer.train()
    assert all(len(look.seen[event]) >= 1 and all(look.seen[event]) for event in look.seen)
    assert in_forward[True] and not any(in_forward[True])
    assert in_forward[False] and all(in_forward[False])
    last = saved_weights(tmp_path / "checkpoint-4")
    assert equal({name: weights(model)[name] for name in last}, last)


@pytest.mark.parametrize("given", [{"compression": rules(4, bucket=16)}, {"teacher": marian(seed=1)}], ids=str)
def test_the_padding_row_stays_zero(tmp_path, given):
    model = marian(width=16)
    assert model.model.shared.weight is model.lm_head.weight
    trainer = translation_trainer(tmp_path, model, given=given, weight_decay=0.1, max_steps=8)
    trainer.train()
    assert not model.model.shared.weight[pad()].any()
    assert model.model.shared.weight[pad() - 1].any()


def test_the_parents_padding_row_drifts_unless_it_is_held(tmp_path):
    for hold in (False, True):
        model = marian()
        if hold:
            hold_padding_row(model)
        translation_trainer(tmp_path, model).train()
        assert bool(model.lm_head.weight[pad()].any()) != hold


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({"distillation": Distillation()}, {}, "without teacher="),
        ({"teacher": resnet(1), "compute_loss_func": lambda *a, **k: None}, {}, "compute_loss_func="),
        ({"compression": rules()}, {"save_only_model": True}, "save_only_model leaves out"),
        ({"compression": (Rule(method=rules().rules[0].method, pattern="nowhere.*"),)}, {}, "claims no weight"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, given, settings, message):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"} if settings else {}
    with pytest.raises(ConfigError, match=message):
        image_trainer(tmp_path, given=given, **settings, **best)


def test_latents_are_of_one_model(tmp_path):
    with pytest.raises(ConfigError, match="not model_init="):
        CompressionTrainer(model_init=lambda: resnet(), args=arguments(tmp_path), compression=rules())


def test_a_made_scheduler_is_refused(tmp_path):
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ConfigError, match="optimizers="):
        image_trainer(tmp_path, model, given={"compression": rules(), "optimizers": (optimizer, scheduler)})


def test_ones_own_optimizer_steps_on_latents(tmp_path):
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = image_trainer(tmp_path, model, given={"compression": rules(), "optimizers": (optimizer, None)})
    trainer.train()
    claimed = {id(entry.parameter) for entry in trainer.compressor.entries.values()}
    latents = {id(z) for entry in trainer.compressor.entries.values() for z in entry.latents.values()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not held & claimed and latents <= held


def test_save_compressed_needs_compression(tmp_path):
    with pytest.raises(ConfigError, match="no compression="):
        image_trainer(tmp_path).save_compressed(tmp_path / "file")
