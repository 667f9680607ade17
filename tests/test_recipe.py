"""Recipes: what is refused and how it is said, overrides, the round trip, and the recipes that are shipped."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.errors import ConfigError
from hfcompress.methods import BY_NAME, Dense, Uniform
from hfcompress.recipe import SHIPPED, available, dump, find, load
from hfcompress.reparameterization import Kind
from hfcompress.schema import Compression, ImageData, Network, Recipe, Rule

DIGITS = """\
# Digits.
name: digits
images: {embedded: digits, size: 8}
teacher:
  timm: resnet10t
  arguments: {in_chans: 1}
student:
  timm: resnet10t
compression:
  rules:
    - kinds: [linear, conv]
      method:
        uniform: {bits: 4, bucket: 256}
    - {pattern: "*", method: {dense: {dtype: float16}}}
evaluation:
  batch_size: 32
"""

CLDR = """\
name: cldr
description: Dates and numbers, German to Norwegian
translation: {embedded: cldr, source: de, target: no}
vocabulary: {size: 500}
teacher:
  marian: {d_model: 64, dropout: 0.1}
  training:
    learning_rate: 1e-3
    num_train_epochs: 3
    predict_with_generate: true
student:
  from_teacher: {encoder_layers: 2, decoder_layers: 1}
  training: {optim: adamw_torch, report_to: [none], eval_strategy: no}
compression:
  rules: [{method: {uniform: {bits: 2, bucket: null}}}]
  training: {learning_rate: 1e-4}
training: {per_device_train_batch_size: 16}
"""

BOTH = f"{DIGITS}---\n{CLDR}"


def written(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The message with which `load` refuses, the file's name cut from each of its lines."""
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    lines = str(error.value).split("\n")
    assert all(line.startswith(f"{path}:") for line in lines)
    return "\n".join(line.removeprefix(f"{path}:") for line in lines)


def test_a_recipe_is_what_its_file_says(tmp_path: Path) -> None:
    digits, cldr = load(written(tmp_path, BOTH))
    assert digits == Recipe(
        name="digits",
        images=ImageData(embedded="digits", size=8),
        teacher=Network(timm="resnet10t", arguments={"in_chans": 1}),
        student=Network(timm="resnet10t"),
        compression=Compression(
            rules=(
                Rule(method=Uniform(bits=4, bucket=256), kinds=(Kind.LINEAR, Kind.CONV)),
                Rule(method=Dense(dtype="float16")),
            )
        ),
        evaluation=digits.evaluation,
    )
    assert digits.evaluation.batch_size == 32
    assert cldr.translation is not None and cldr.translation.target == "no"
    assert cldr.teacher.training == {"learning_rate": 1e-3, "num_train_epochs": 3, "predict_with_generate": True}
    assert cldr.compression.rules[0].method == Uniform(bits=2, bucket=None)


# Each case: a piece of the recipe, what stands there instead, and all that is said about it.
KINDS = "'conv', 'linear', 'embedding', 'bias', 'norm' or 'other'"
REFUSED_DIGITS = [
    ("seed", "name: digits\n", "name: digits\nsede: 3\n", "3: recipe: there is no key 'sede'; the nearest is 'seed'"),
    ("key", "batch_size", "batchsize", "16: evaluation: there is no key 'batchsize'; the nearest is 'batch_size'"),
    ("far key", "batch_size", "q", "16: evaluation: there is no key 'q'; there are batch_size, beams, max_new_tokens, bootstrap"),
    ("rule's key", "kinds:", "kind:", "11: compression.rules.0: there is no key 'kind'; the nearest is 'kinds'"),
    ("twice", "  batch_size: 32", "  batch_size: 32\n  batch_size: 64", "17: key 'batch_size' is given twice, first at {path}:16; keep one of them"),
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


# -- overrides ----------------------------------------------------------------------------------------------------


def test_overrides_reach_the_recipes_that_have_the_section(tmp_path: Path) -> None:
    digits, cldr = load(
        written(tmp_path, BOTH),
        [
            "seed=1",
            "cldr:seed=2",
            "images.size=9",
            "translation.max_length=64",
            "distillation.soft=1",
            "compression.rules.0.method.uniform.bits=3",
            "compression.rules.1.kinds=[norm, bias]",
            "training.learning_rate=1e-5",
            "digits:card.limits='at 8 x 8: only'",
            "digits:student.training={max_steps: 3}",
            "digits:student.training.max_steps=4",
        ],
    )
    assert (digits.seed, cldr.seed) == (1, 2)
    assert digits.images is not None and digits.images.size == 9
    assert cldr.translation is not None and cldr.translation.max_length == 64
    assert digits.distillation.soft == cldr.distillation.soft == 1.0
    assert digits.compression.rules[0].method == Uniform(bits=3, bucket=256)
    assert cldr.compression.rules[0].method == Uniform(bits=3, bucket=None)
    assert digits.compression.rules[1].kinds == (Kind.NORM, Kind.BIAS)
    assert digits.training == {"learning_rate": 1e-5}
    assert cldr.training == {"per_device_train_batch_size": 16, "learning_rate": 1e-5}
    assert digits.card.limits == "at 8 x 8: only" and cldr.card.limits == ""
    assert digits.student.training == {"max_steps": 4}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sede=1", "recipe: there is no key 'sede'; the nearest is 'seed'"),
        ("traning.bf16=true", "recipe: there is no key 'traning'; the nearest is 'training'"),
        ("evaluation.beam=1", "evaluation: there is no key 'beam'; the nearest is 'beams'"),
        ("training.learning_rat=1", "training: TrainingArguments has no field 'learning_rat'; the nearest is 'learning_rate'"),
        ("compression.rules.0.method.uniform.bit=1", "compression.rules.0.method.uniform: there is no key 'bit'; the nearest is 'bits'"),
        ("compression.rules.0.method.unifrom.bits=1", "compression.rules.0.method: there is no key 'unifrom'; the nearest is 'uniform'"),
        ("compression.rules.1.method.uniform.bits=1", "there is no section 'compression.rules.1.method.uniform' to set it in"),
        ("compression.rules.2.pattern=x", "compression.rules: there is no item '2' in a list of 2, counted from 0"),
        ("compression.rules.-1.pattern=x", "compression.rules: there is no item '-1' in a list of 2, counted from 0"),
        ("compression.rules.pattern=x", "compression.rules: there is no item 'pattern' in a list of 2, counted from 0"),
        ("vocabulary.size=100", "there is no section 'vocabulary' to set it in"),
        ("name.x=1", "name: there is no key 'x', as it is \"digits\""),
        ("digit:seed=1", "no recipe of this file has the name 'digit'; the nearest is 'digits'"),
        ("seed", "expected section.key=value or NAME:section.key=value"),
        ("=3", "expected section.key=value or NAME:section.key=value"),
        ("card..limits=3", "expected section.key=value or NAME:section.key=value"),
        ("seed=two", 'seed: found "two", expected a whole number'),
        ("seed=", "seed: found null, expected a whole number"),
        ("evaluation.beams=0", "evaluation.beams: found 0, expected at least 1"),
        ("card.limits=a: b", "expected a scalar, a [list] or a {mapping}; text with ': ' or '- ' in it needs quotes"),
        ("card.limits=[a", "expected ',' or ']', but got '<stream end>' (while parsing a flow sequence)"),
        ("card.limits=!!python/none", "tag '!!python/none' is refused: only plain values are read"),
    ],
)  # fmt: skip
def test_a_bad_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    assert refusal(written(tmp_path, DIGITS), override) == f" override '{override}': {message}"


def test_a_method_refusing_names_the_override(tmp_path: Path) -> None:
    said = refusal(written(tmp_path, DIGITS), "compression.rules.0.method.uniform.bits=9")
    assert said.startswith("13: compression.rules.0.method.uniform: uniform: bits must be 1 to 8, found 9")
    assert said.endswith("(with override 'compression.rules.0.method.uniform.bits=9')")


def leaves(tree: Any, address: str = "") -> list[tuple[str, Any]]:
    """Every key and index below a tree, as overrides spell them, with its value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = [(f"{address}{key}", value) for key, value in items]
    return found + [leaf for key, value in found for leaf in leaves(value, f"{key}.")]


@pytest.mark.parametrize("text", [DIGITS, CLDR])
def test_setting_what_is_already_there_changes_nothing(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    (recipe,) = load(path)
    spelled = [f"{address}={json.dumps(value)}" for address, value in leaves(yaml.safe_load(dump(recipe)))]
    assert len(spelled) > 40
    assert load(path, spelled) == [recipe]


# -- round trip ---------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | NUMBERS | TEXT,
    lambda items: st.lists(items, max_size=3) | st.dictionaries(TEXT, items, max_size=3),
    max_leaves=6,
)
RULES = st.builds(
    Rule,
    method=st.builds(Dense, dtype=st.sampled_from(["float16", "float32"]))
    | st.builds(Uniform, bits=st.integers(1, 8), bucket=st.none() | st.integers(1), stochastic=st.booleans()),
    pattern=TEXT,
    kinds=st.lists(st.sampled_from(Kind)).map(tuple),
)
RECIPES = st.builds(
    Recipe,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]*", fullmatch=True),
    description=TEXT,
    seed=st.integers(0, 2**63 - 1),
    translation=st.none(),
    images=st.builds(
        ImageData,
        embedded=st.none(),
        hub=TEXT.filter(bool),
        revision=st.none() | TEXT,
        folder=st.none() | TEXT,
        train=TEXT,
        validation=st.none(),
        validation_fraction=st.floats(0.01, 0.99),
        train_rows=st.none() | st.integers(1, 10**6),
        size=st.integers(1, 512),
        mean=st.lists(NUMBERS, max_size=4).map(tuple),
    ),
    vocabulary=st.none(),
    teacher=st.builds(Network, **dict.fromkeys(["marian", "pretrained", "from_teacher"], st.none()), timm=TEXT,
                      arguments=st.dictionaries(TEXT, PLAIN, max_size=4), training=st.none()),
    student=st.builds(Network, **dict.fromkeys(["marian", "timm", "from_teacher"], st.none()), pretrained=TEXT,
                      training=st.none() | st.fixed_dictionaries({"learning_rate": NUMBERS, "bf16": st.booleans(),
                                                                  "label_names": st.lists(TEXT)})),
    compression=st.builds(Compression, rules=st.lists(RULES, min_size=1, max_size=3).map(tuple), training=st.none()),
    training=st.just({}),
)  # fmt: skip


@settings(deadline=None)
@given(RECIPES)
def test_a_dumped_recipe_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = written(tmp_path_factory.getbasetemp(), dump(recipe))
    assert load(path) == [recipe]
    assert dump(load(path)[0]) == dump(recipe)  # 1 and 1.0 are equal, but not as text


def test_a_dump_spells_out_defaults_in_the_order_of_the_schema(tmp_path: Path) -> None:
    digits, cldr = load(written(tmp_path, BOTH))
    assert [*yaml.safe_load(dump(digits))] == [
        "name", "description", "seed", "images", "teacher", "student", "distillation", "compression", "training",
        "evaluation", "card",
    ]  # fmt: skip
    assert yaml.safe_load(dump(cldr))["evaluation"]["beams"] == 1
    assert yaml.safe_load(dump(cldr))["translation"]["target"] == "no"  # also to a reader of YAML 1.1
    assert load(written(tmp_path, f"{dump(digits)}---\n{dump(cldr)}")) == [digits, cldr]


# -- shipped recipes ----------------------------------------------------------------------------------------------


def test_every_shipped_recipe_loads_and_says_what_it_is() -> None:
    shipped = available()
    assert {recipe.path for recipe in shipped} == set(SHIPPED.rglob("*.yaml")) and shipped
    for recipe in shipped:
        assert load(recipe.path) and recipe.description
        assert find(recipe.name) == recipe.path


def test_available_lists_even_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "two.yaml").write_text(f"description: |\n  First.\n  Second.\nsize: 3\n---\n{CLDR}")
    (tmp_path / "comment.yaml").write_text("# Just this.\n# Not this.\nname: [")
    (tmp_path / "nothing.yaml").write_bytes(b"\xff")
    (tmp_path / "notes.txt").write_text("not a recipe")
    found = [(recipe.name, recipe.description) for recipe in available(tmp_path)]
    assert found == [("a/b/two", "First."), ("comment", "Just this."), ("nothing", "")]
    assert available(tmp_path / "absent") == []


def test_find_takes_a_path_or_a_name(tmp_path: Path) -> None:
    path = written(tmp_path, DIGITS)
    assert find(str(path), tmp_path / "absent") == path
    assert find("r", tmp_path) == path
    for asked, message in [
        ("rr", "rr: no such file, nor a shipped recipe's name; the nearest is 'r'"),
        ("../r", "../r: no such file, nor a shipped recipe's name; there are r"),
        (str(tmp_path), f"{tmp_path}: a folder, not a recipe file, nor a shipped recipe's name; there are r"),
    ]:
        with pytest.raises(ConfigError) as error:
            find(asked, tmp_path)
        assert str(error.value) == message


def test_transformers_is_imported_only_to_check_its_fields(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hfcompress.recipe import available, dump, find, load;"
        "available(); path = find(sys.argv[1]); dump(load(path)[0]); assert 'transformers' not in sys.modules;"
        "load(path, ['training.bf16=true']); assert 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(written(tmp_path, DIGITS))], check=True)
