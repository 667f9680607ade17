"""Recipes: read, overridden, written back; the ones that are shipped."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_texts import BOTH, CLDR, DIGITS, refusal, written

from hfcompress.errors import ConfigError
from hfcompress.methods import Dense, Uniform
from hfcompress.recipe import SHIPPED, available, dump, find, load
from hfcompress.reparameterization import Kind
from hfcompress.schema import Compression, ImageData, Network, Recipe, Rule


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
        (
            "training.learning_rat=1",
            "training: TrainingArguments has no field 'learning_rat'; the nearest is 'learning_rate'",
        ),
        (
            "compression.rules.0.method.uniform.bit=1",
            "compression.rules.0.method.uniform: there is no key 'bit'; the nearest is 'bits'",
        ),
        (
            "compression.rules.0.method.unifrom.bits=1",
            "compression.rules.0.method: there is no key 'unifrom'; the nearest is 'uniform'",
        ),
        (
            "compression.rules.1.method.uniform.bits=1",
            "there is no section 'compression.rules.1.method.uniform' to set it in",
        ),
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
)
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
    | st.builds(Uniform, bits=st.integers(1, 8), bucket=st.none() | st.integers(1, 2**40), stochastic=st.booleans()),
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


@settings(deadline=None, max_examples=60)
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
        assert find(recipe.name) == recipe.path and recipe.description
        sweep = recipe.description.startswith("sweep: ")
        assert sweep or recipe.path.parent.name != "papers"
        if sweep:
            with pytest.raises(ConfigError, match="it is run by 'hfcompress sweep'"):
                load(recipe.path)
        else:
            assert load(recipe.path)


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
    assert find("r", tmp_path) == path == find("recipes/r.yaml", tmp_path)
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


def test_a_wheel_holds_the_recipes_and_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built as setuptools builds a wheel's files, without network."""
    setuptools = pytest.importorskip("setuptools")
    root, before = SHIPPED.parent, {recipe.name: recipe.path for recipe in available()}
    monkeypatch.chdir(root)
    distribution = setuptools.Distribution({"script_name": "setup.py"})
    distribution.parse_config_files()
    distribution.include_package_data = False  # what the manifest adds, for which files would be written here
    build = distribution.get_command_obj("build_py")
    build.build_lib = str(tmp_path)
    build.ensure_finalized()
    build.run()
    held = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    package = [path for path in (root / "hfcompress").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    recipes = {f"hfcompress/recipes/{name}.yaml" for name in before}
    assert held == recipes | {path.relative_to(root).as_posix() for path in package}

    code = "from hfcompress.recipe import SHIPPED, available, command_line, find; print(SHIPPED);"
    code += (
        "print(*(r.name for r in available())); print(command_line('run', find('recipes/quickstart.yaml'), [], None))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path.parent,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    where, names, command = done.stdout.splitlines()
    assert Path(where) == tmp_path / "hfcompress" / "recipes" and names.split() == [*before]
    assert command == "hfcompress run recipes/quickstart.yaml"
