"""Recipes: read from YAML, changed by overrides, checked whole, written back; and those that are shipped."""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hfcompress.errors import ConfigError
from hfcompress.recipe_checks import check, default, dotted, keys_at, nearest, show
from hfcompress.reparameterization import Reparameterization
from hfcompress.schema import Recipe
from hfcompress.yaml_lines import Address, Document, Fault, Place, parse, read, refuse, write

_PACKAGE = Path(__file__).resolve().parent
SHIPPED = (_PACKAGE if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent) / "recipes"
"""Inside the package where it is installed from a wheel, beside it in a checkout."""


def load(path: Path, overrides: Sequence[str] = ()) -> list[Recipe]:
    """The recipes of a file, one per YAML document; their names differ.

    `overrides`: each `section.key=value` sets a key in every recipe that has the section, and each
    `NAME:section.key=value` in the recipe of that name alone. The value is a YAML scalar or flow collection;
    items of lists go by index: `compression.rules.0.method.uniform.bits=2`. All are applied, in order, before
    anything is checked.

    Raises ConfigError: one message with a line for each fault, each with its file and line, or its override.
    """
    documents = read(path)
    if any(document.at("title") and document.at("recipe") for document in documents):
        raise ConfigError(f"{path}: this is a sweep of recipes: it is run by 'hfcompress sweep'")
    return resolve(documents, [(text, Place(str(path), override=text)) for text in overrides])


def resolve(documents: list[Document], overrides: Iterable[tuple[str, Place]] = ()) -> list[Recipe]:
    """The recipes that `documents` hold, changed by overrides (as in `load`), each with the place where it stands.

    The documents are changed too. Raises ConfigError as `load` does.
    """
    faults: list[Fault] = []
    for text, place in overrides:
        faults += _override(text, documents, place)
    faults += _repeated_names(documents)
    recipes: list[Recipe] = []
    for document in documents:
        match check(document):
            case Recipe() as recipe:
                recipes.append(recipe)
            case found:
                faults += found
    refuse(faults)
    return recipes


def dump(recipe: Recipe) -> str:
    """`recipe` as YAML that `load` reads back equal: defaults spelled out, keys in the schema's order."""
    return write(_plain(recipe))


def _plain(value: Any) -> Any:
    """What a recipe holds as a document's tree. Left out: keys that hold None and do so by default."""
    if isinstance(value, Reparameterization):
        return {type(value).__name__.lower(): _fields(value)}
    if is_dataclass(value):
        return _fields(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _fields(value: Any) -> dict[str, Any]:
    items = ((field.name, getattr(value, field.name), default(field)) for field in fields(value))
    return {name: _plain(item) for name, item, usual in items if item is not None or usual is not None}


def _repeated_names(documents: list[Document]) -> Iterator[Fault]:
    names = [document.at("name") for document in documents]
    for document, name in zip(documents, names):
        if name is not None and names.count(name) > 1:
            yield (
                document.place(("name",)),
                f"name: {names.count(name)} recipes of this file are named '{name}'",
            )


# -- overrides ------------------------------------------------------------------------------------------


def _override(text: str, documents: list[Document], place: Place) -> Iterator[Fault]:
    """Sets what `text` says in those documents it is for that have the section; it is a fault if none has."""
    target, equals, value = text.partition("=")
    name, colon, key = target.rpartition(":")
    steps = key.split(".")
    if not equals or not all(steps):
        yield place, "expected section.key=value or NAME:section.key=value"
        return
    names = [str(document.at("name")) for document in documents]
    chosen = [document for document in documents if not colon or document.at("name") == name]
    if not chosen:
        yield place, f"no recipe of this file has the name '{name}'{nearest(name, names)}"
        return
    new = parse_value(value, place)
    misses: list[Fault] = []
    for document in chosen:
        try:
            container, address = _container(document, steps, place)
        except ConfigError as error:
            misses.append((place, str(error)))
        else:
            document.put(container, address, deepcopy(new), place)
    if len(misses) == len(chosen):
        yield from misses


def parse_value(text: str, place: Place) -> Any:
    """What an override says after `=`: a YAML scalar or flow collection. Raises ConfigError."""
    documents = parse(text, lambda line, column: place)
    value = documents[0].tree if documents else None
    if len(documents) > 1 or (isinstance(value, dict | list) and text.lstrip()[0] not in "{["):
        wanted = "expected a scalar, a [list] or a {mapping}; text with ': ' or '- ' in it needs quotes"
        raise ConfigError(f"{place}: {wanted}")
    return value


def _container(document: Document, steps: Sequence[str], place: Place) -> tuple[Any, Address]:
    """The mapping or list in which the last step is a key or an index, and the address of the item it names.

    Sections on the way that every recipe has (`evaluation`) are made; those that are there by choice
    (`translation`, a method's name) are not.

    Raises ConfigError: such a section is absent, or a step is no key or index there.
    """
    node, address = document.tree, _extended((), document.tree, steps[0])
    for step in steps[1:]:
        if isinstance(node, dict) and node.get(address[-1]) is None:
            if (keys_at(address[:-1]) or {}).get(str(address[-1]), MISSING) is not MISSING:
                raise ConfigError(f"there is no section '{dotted(address)}' to set it in")
            node[address[-1]] = {}
            document.places.setdefault(address, place)
        node = node[address[-1]]
        address = _extended(address, node, step)
    return node, address


def _extended(address: Address, node: Any, step: str) -> Address:
    """The address of the item that `step` names in `node`, which is at `address`."""
    if isinstance(node, list):
        indices = [str(index) for index in range(len(node))]
        if step not in indices:
            count = f"a list of {len(node)}, counted from 0"
            raise ConfigError(f"{dotted(address)}: there is no item '{step}' in {count}")
        return (*address, int(step))
    if not isinstance(node, dict):
        raise ConfigError(f"{dotted(address)}: there is no key '{step}', as it is {show(node)}")
    keys = keys_at(address)
    if keys is not None and step not in keys:
        raise ConfigError(f"{dotted(address)}: there is no key '{step}'{nearest(step, keys)}")
    return (*address, step)


# -- shipped recipes ------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Shipped:
    """A recipe file that comes with the package; its name is its path below the folder, without `.yaml`."""

    name: str
    path: Path
    description: str


def available(folder: Path = SHIPPED) -> list[Shipped]:
    """Every recipe file in `folder` and below, by name; none is validated.

    Its description: a sweep's title, the first line of its first recipe's `description`, or of the comment that opens
    it.
    """
    return [Shipped(name, path, _description(path)) for name, path in _named(folder).items()]


def find(name_or_path: str, folder: Path = SHIPPED) -> Path:
    """The recipe file at this path, or the one in `folder` of this name, which may be given as `recipes/NAME.yaml`.

    Raises ConfigError: there is neither.
    """
    path, named = Path(name_or_path), _named(folder)
    if path.is_file():
        return path
    name = name_or_path.removeprefix("recipes/").removesuffix(".yaml")
    if name in named:
        return named[name]
    found = "a folder, not a recipe file" if path.is_dir() else "no such file"
    raise ConfigError(f"{name_or_path}: {found}, nor a shipped recipe's name{nearest(name_or_path, named)}")


def command_line(verb: str, path: Path, overrides: Sequence[str], data_root: Path | None) -> str:
    """What reproduces a run or a sweep, for its card or table: no folder of this machine is named."""
    shipped = path.resolve().is_relative_to(SHIPPED)
    name = Path("recipes") / path.resolve().relative_to(SHIPPED) if shipped else Path(path.name)
    root = ["--data-root", "FOLDER"] if data_root else []
    return shlex.join(["hfcompress", verb, name.as_posix(), *overrides, *root])


def _named(folder: Path) -> dict[str, Path]:
    paths = sorted(path for path in folder.rglob("*.yaml") if path.is_file())
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def _description(path: Path) -> str:
    try:
        document = read(path)[0]
        title = document.at("title")  # a sweep's
        text = f"sweep: {title}" if isinstance(title, str) else document.at("description")
    except ConfigError:  # a broken file is listed too: running it tells what is wrong with it
        text = None
    if not isinstance(text, str) or not text:
        opening = path.read_text("utf-8", errors="replace").partition("\n")[0]
        text = opening.lstrip("# ") if opening.startswith("#") else ""
    return text.strip().partition("\n")[0]
