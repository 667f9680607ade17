# ruff: noqa: E501  (a case is a line)
"""What is refused in a recipe, and every word that is then said."""

from dataclasses import fields
from pathlib import Path

import pytest
from recipe_texts import CLDR, DIGITS, refusal, written

from hfcompress.methods import BY_NAME
from hfcompress.recipe import load
from hfcompress.schema import Evaluation

# Each case: a piece of the recipe, what stands there instead, and all that is said about it.
KINDS = "'conv', 'linear', 'embedding', 'bias', 'norm' or 'other'"
REFUSED_DIGITS = [
    ("seed", "name: digits\n", "name: digits\nsede: 3\n", "3: recipe: there is no key 'sede'; the nearest is 'seed'"),
    ("key", "batch_size", "batchsize", "16: evaluation: there is no key 'batchsize'; the nearest is 'batch_size'"),
    ("far key", "batch_size", "q", f"16: evaluation: there is no key 'q'; there are {', '.join(f.name for f in fields(Evaluation))}"),
    ("rule's key", "kinds:", "kind:", "11: compression.rules.0: there is no key 'kind'; the nearest is 'kinds'"),
    ("twice", "  batch_size: 32", "  batch_size: 32\n  batch_size: 64", "17: key 'batch_size' is given twice, first at {path}:16; keep one of them"),
    ("key of two lines", "batch_size", '"a\\nb"', f"16: evaluation: there is no key 'a\\nb'; there are {', '.join(f.name for f in fields(Evaluation))}"),
    ("missing", "name: digits\n", "", "2: recipe: 'name' is missing"),
    ("missing in list", "method: {dense: {dtype: float16}}", "", "14: compression.rules.1: 'method' is missing"),
    ("missing in section", ", size: 8", "", "3: images: 'size' is missing"),
    ("text for int", "32", '"32"', '16: evaluation.batch_size: found "32", expected a whole number'),
    ("bool for int", "32", "true", "16: evaluation.batch_size: found true, expected a whole number"),
    ("float for int", "32", "32.0", "16: evaluation.batch_size: found 32.0, expected a whole number"),
    ("null for int", "32", "", "16: evaluation.batch_size: found null, expected a whole number"),
    ("list for int", "32", "[32]", "16: evaluation.batch_size: found a list, expected a whole number"),
    ("int for text", "name: digits", "name: 17", "2: name: found 17, expected text; put it in quotes"),
    ("bool for text", 'pattern: "*"', "pattern: true", "14: compression.rules.1.pattern: found true, expected text; put it in quotes"),
    ("bool for float", "evaluation:", "distillation: {soft: true}\nevaluation:", "15: distillation.soft: found true, expected a number"),
    ("text for float", "evaluation:", "distillation: {soft: 1,5}\nevaluation:", "15: a key must be text, found '5'; put it in quotes"),
    ("text for bool", "evaluation:", "  warm_start: yes\nevaluation:", '15: compression.warm_start: found "yes", expected true or false'),
    ("text for section", "evaluation:\n  batch_size: 32", "evaluation: fast", '15: evaluation: found "fast", expected a mapping'),
    ("text for list", "[linear, conv]", "linear", '11: compression.rules.0.kinds: found "linear", expected a list'),
    ("list for section", "evaluation:\n  batch_size: 32", "evaluation: []", "15: evaluation: found an empty list, expected a mapping"),
    ("enum", "[linear, conv]", "[linear, conf]", f'11: compression.rules.0.kinds.1: found "conf", expected {KINDS}'),
    ("literal", "embedded: digits", "embedded: digit", "3: images.embedded: found \"digit\", expected 'digits' or 'cldr'"),
    ("below", "32", "0", "16: evaluation.batch_size: found 0, expected at least 1"),
    ("not above", "evaluation:", "distillation: {temperature: 0}\nevaluation:", "15: distillation.temperature: found 0, expected more than 0.0"),
    ("not finite", "evaluation:", "distillation: {temperature: .inf}\nevaluation:", "15: '.inf' is not a finite number"),
    ("name", "name: digits", "name: a/b", '2: name: found "a/b", expected text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$'),
    ("no rule", DIGITS[DIGITS.index("    - kinds") : DIGITS.index("evaluation")], "    []\n", "10: compression.rules: found an empty list, expected at least 1 item(s)"),
    ("two tasks", "teacher:", "translation: {embedded: cldr, source: de, target: en}\nteacher:", "2: recipe: give exactly one of 'translation' and 'images'"),
    ("two sources", "embedded: digits", "embedded: digits, hub: mnist", "3: images: give either 'embedded', or 'hub' and/or 'folder'"),
    ("two networks", "student:", "student:\n  pretrained: x", "7: student: give exactly one of pretrained, marian, timm, from_teacher; found ['pretrained', 'timm']"),
    ("method", "uniform:", "unifrom:", "13: compression.rules.0.method: there is no key 'unifrom'; the nearest is 'uniform'"),
    ("method's key", "bits:", "bit:", "13: compression.rules.0.method.uniform: there is no key 'bit'; the nearest is 'bits'"),
    ("method's type", "bits: 4", "bits: true", "13: compression.rules.0.method.uniform.bits: found true, expected a whole number"),
    ("method's range", "bits: 4", "bits: 9", "13: compression.rules.0.method.uniform: uniform: bits must be 1 to 8, found 9"),
    ("method's bucket", "bucket: 256", "bucket: 0", "13: compression.rules.0.method.uniform: uniform: bucket must be at least 1, or null for the whole tensor, found 0"),
    ("method's literal", "float16", "float15", "14: compression.rules.1.method.dense.dtype: found \"float15\", expected 'float16' or 'float32'"),
    ("method's name alone", "{dense: {dtype: float16}}", "dense", '14: compression.rules.1.method: found "dense", expected a mapping'),
    ("method without fields", "{dense: {dtype: float16}}", "{dense}", "14: compression.rules.1.method.dense: found null, expected a mapping"),
    ("two methods", "{dense: {dtype: float16}}", "{dense: {}, uniform: {}}", f"14: compression.rules.1.method: give exactly one of {', '.join(BY_NAME)}; found dense and uniform"),
    ("no method", "{dense: {dtype: float16}}", "{}", f"14: compression.rules.1.method: give exactly one of {', '.join(BY_NAME)}; found none"),
    ("tag", "in_chans: 1", "in_chans: !!python/object/apply:os.getpid []", "6: tag '!!python/object/apply:os.getpid' is refused: only plain values are read"),
    ("tab", "  timm: resnet10t\n  arg", "\ttimm: resnet10t\n  arg", "5:1: found character '\\t' that cannot start any token (while scanning for the next token)"),
    ("syntax", "size: 8}", "size: 8", "4:8: expected ',' or '}', but got ':' (while parsing a flow mapping)"),
    ("text document", DIGITS, "digits", '1: recipe: found "digits", expected a mapping'),
    ("list document", DIGITS, "- name: digits", "1: recipe: found a list, expected a mapping"),
    ("empty document", "  batch_size: 32\n", "  batch_size: 32\n---\n", "18: recipe: found null, expected a mapping"),
    ("same names", DIGITS, f"{DIGITS}---\n{DIGITS}", "2: name: 2 recipes of this file are named 'digits'\n19: name: 2 recipes of this file are named 'digits'"),
]  # fmt: skip
REFUSED_CLDR = [
    ("field", "learning_rate: 1e-3", "learning_rates: 1e-3", "8: teacher.training: Seq2SeqTrainingArguments has no field 'learning_rates'; the nearest is 'learning_rate'"),
    ("field's type", "num_train_epochs: 3", "num_train_epochs: three", '9: teacher.training.num_train_epochs: found "three", expected a number'),
    ("field's bool", "predict_with_generate: true", "predict_with_generate: 1", "10: teacher.training.predict_with_generate: found 1, expected true or false"),
    ("field's enum", "eval_strategy: no", "eval_strategy: never", "13: student.training.eval_strategy: found \"never\", expected 'no', 'steps' or 'epoch'"),
    ("section", "{learning_rate: 1e-4}", "[learning_rate]", "16: compression.training: found a list, expected a mapping"),
    ("folder", "{learning_rate: 1e-4}", "{output_dir: out}", "16: compression.training.output_dir has no place in a recipe: the run chooses its folders"),
    ("seed", "{per_device_train_batch_size: 16}", "{seed: 3}", "17: training.seed has no place in a recipe: the recipe's own 'seed' holds for every stage"),
    ("marian", "d_model: 64", "d_modle: 64", "6: teacher.marian: MarianConfig has no field 'd_modle'; the nearest is 'd_model'"),
    ("marian's type", "dropout: 0.1", "dropout: high", '6: teacher.marian.dropout: found "high", expected a number or a whole number'),
    ("vocabulary", "vocabulary: {size: 500}\n", "", "1: recipe: a 'marian' teacher from scratch needs a 'vocabulary' section, and only it may have one"),
    ("language code", "target: no", "target: false", "3: translation.target: found false, expected text; put it in quotes"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [pytest.param(text, *case[1:], id=case[0]) for text, cases in ((DIGITS, REFUSED_DIGITS), (CLDR, REFUSED_CLDR)) for case in cases],
)  # fmt: skip
def test_a_bad_recipe_is_refused(tmp_path: Path, text: str, old: str, new: str, message: str) -> None:
    assert text.count(old) >= 1
    path = written(tmp_path, text.replace(old, new, 1))
    assert refusal(path) == message.replace("{path}", str(path))


@pytest.mark.parametrize("name", ["data_seed", "save_total_limit", "resume_from_checkpoint", "push_to_hub"])
def test_what_belongs_to_the_run_is_refused(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, CLDR)
    said = refusal(path, f"training.{name}=1")
    assert said.startswith(f" override 'training.{name}=1': training.{name} has no place in a recipe: ")


def test_image_recipes_take_plain_training_arguments(tmp_path: Path) -> None:
    path = written(tmp_path, DIGITS)
    assert load(path, ["training.bf16=true"])[0].training == {"bf16": True}
    assert "TrainingArguments has no field 'predict_with_generate'" in refusal(
        path, "training.predict_with_generate=true"
    )


def test_all_faults_are_told_in_the_order_of_the_file(tmp_path: Path) -> None:
    bad = DIGITS.replace("size: 8", "size: 0").replace("bits: 4", "bits: 0").replace("32", "all")
    said = refusal(written(tmp_path, f"{bad}---\n{CLDR.replace('optim', 'optimizer')}"))
    assert said.split("\n") == [
        "3: images.size: found 0, expected at least 1",
        "13: compression.rules.0.method.uniform: uniform: bits must be 1 to 8, found 0",
        '16: evaluation.batch_size: found "all", expected a whole number',
        "30: student.training: Seq2SeqTrainingArguments has no field 'optimizer'; the nearest is 'optim'",
    ]
