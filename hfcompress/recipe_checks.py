"""Whether a document is a recipe, and if not, everything that is wrong with it, in words."""

import difflib
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from typing import Any, get_args, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from hfcompress.methods import BY_NAME
from hfcompress.reparameterization import Reparameterization
from hfcompress.schema import STRICT, Recipe
from hfcompress.stream_checks import stream_faults
from hfcompress.yaml_lines import Address, Document, Fault

_TRAINING = (("training",), ("teacher", "training"), ("student", "training"), ("compression", "training"))
_MARIAN = (("teacher", "marian"), ("student", "marian"))
_THE_RUNS = {
    "output_dir": "the run chooses its folders",
    "seed": "the recipe's own 'seed' holds for every stage",
    "data_seed": "the recipe's own 'seed' holds for every stage",
    "save_total_limit": "the run keeps the checkpoints that it can resume from",
    "resume_from_checkpoint": "resuming is asked for when a recipe is run, not in it",
    "push_to_hub": "a finished run can be pushed, one in progress is not",
}
"""Training settings that a recipe may not hold, and why."""


def check(document: Document) -> Recipe | list[Fault]:
    """The recipe that `document` holds, or all of its faults."""
    faults = list(_library_faults(document))
    try:
        # from JSON, strict mode takes lists for tuples and text for enums, and still no text for numbers
        recipe = TypeAdapter(Recipe).validate_json(json.dumps(document.tree))
    except ValidationError as error:
        return faults + list(explain(error, document))
    faults += [(document.place(at), f"{dotted(at)}: {what}") for at, what in stream_faults(recipe)]
    return faults or recipe


def keys_at(address: Address, root: Any = Recipe) -> dict[str, Any] | None:
    """The keys that a document of type `root` may have at `address`, with their defaults; None: any key, or none, goes.

    A section that every recipe has defaults to MISSING, one that is there by choice (so is a method) to None.
    """
    kind: Any = root
    for step in address:
        if kind is Reparameterization:
            kind = BY_NAME.get(str(step))
        elif isinstance(step, str):
            kind = _section(get_type_hints(kind).get(step)) if is_dataclass(kind) else None
    if kind is Reparameterization:
        return dict.fromkeys(BY_NAME)
    return {field.name: default(field) for field in fields(kind)} if is_dataclass(kind) else None


def default(field: Field[Any]) -> Any:
    """A dataclass field's default, also where pydantic's Field holds it."""
    return field.default.default if isinstance(field.default, FieldInfo) else field.default


def _section(hint: Any) -> Any:
    """The dataclass in a field's type: Rule in tuple[Rule, ...], Layers in Layers | None."""
    return next((t for t in (hint, *get_args(hint)) if t is Reparameterization or is_dataclass(t)), None)


def nearest(word: str, known: Collection[str]) -> str:
    """How an error about `word` ends: with the nearest of those known, or all if few and none near."""
    few = len(known) <= 16
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.6 if few else 0.0)
    if match:
        return f"; the nearest is '{match[0]}'"
    return f"; there are {', '.join(known)}" if known else ""


_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
    "model_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
    "too_short": "at least {min_length} item(s)",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "string_pattern_mismatch": "text that matches {pattern}",
}
"""What pydantic's types of error say was expected."""


def explain(error: ValidationError, document: Document, base: Address = (), root: Any = Recipe) -> Iterator[Fault]:
    """What pydantic found wrong with the value at `base`: one fault where no member of a union fits.

    `root`: the dataclass that describes the whole document.
    """
    misfits: dict[Address, list[ErrorDetails]] = defaultdict(list)
    for detail in error.errors(include_url=False):
        address = (*base, *detail["loc"])
        if detail["type"] not in _EXPECTED:
            yield document.place(address), _other_fault(detail, address, root) + _overridden(document, address)
        elif detail["type"] != "too_short" or not detail["input"]:  # pydantic counts valid items only
            misfits[document.known(address)].append(detail)  # without a union's members, which pydantic appends
    for address, details in misfits.items():
        found = details[0]["input"]
        wishes = list(dict.fromkeys(map(_expectation, details)))
        quotes = "; put it in quotes" if "text" in wishes and isinstance(found, int | float) else ""
        what = f"found {show(found)}, expected {' or '.join(wishes)}{quotes}"
        yield document.place(address), f"{dotted(address)}: {what}"


def _expectation(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    values = re.findall("'([^']*)'", str(context.get("expected")))
    if len(values) > 8:
        return f"one of {len(values)} values{nearest(str(detail['input']), values)}"
    return _EXPECTED[detail["type"]].format(**context)


def _other_fault(detail: ErrorDetails, address: Address, root: Any) -> str:
    whole = root.__name__.lower()
    section, key = dotted(address[:-1], whole), str(address[-1]) if address else ""
    match detail["type"]:
        case "missing":
            return f"{section}: '{key}' is missing"
        case "unexpected_keyword_argument" | "extra_forbidden":
            return f"{section}: there is no key '{key}'{nearest(key, keys_at(address[:-1], root) or {})}"
        case "value_error":
            return f"{dotted(address, whole)}: {detail['ctx']['error']}"
    return f"{dotted(address, whole)}: {detail['msg']}, found {show(detail['input'])}"


def _overridden(document: Document, address: Address) -> str:
    """The overrides of keys at `address`, to which a fault in their combination may be due."""
    places = [place for key, place in document.places.items() if key[:-1] == address and key]
    names = [f"'{place.override}'" for place in places if place.override]
    return f" (with override {', '.join(names)})" if names else ""


def dotted(address: Address, whole: str = "recipe") -> str:
    return ".".join(map(str, address)) or whole


def show(value: Any) -> str:
    if isinstance(value, dict | list):
        return ("a " if value else "an empty ") + ("mapping" if isinstance(value, dict) else "list")
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


def _library_faults(document: Document) -> Iterator[Fault]:
    """What is wrong with sections whose keys are fields of transformers' own classes: names and types."""
    if not any(document.at(*address) for address in (*_TRAINING, *_MARIAN)):
        return
    from transformers import MarianConfig, Seq2SeqTrainingArguments, TrainingArguments  # takes seconds

    arguments = Seq2SeqTrainingArguments if document.at("images") is None else TrainingArguments
    for section in _TRAINING:
        yield from _field_faults(document, section, arguments, _THE_RUNS)
    for section in _MARIAN:
        yield from _field_faults(document, section, MarianConfig, {})


def _field_faults(document: Document, section: Address, library: Any, withheld: Mapping[str, str]) -> Iterator[Fault]:
    """Keys at `section` that the dataclass `library` lacks or that are `withheld`; values of a wrong type."""
    given = document.at(*section)
    hints = get_type_hints(library, localns={"torch": torch})  # MarianConfig names it, imports it not
    names = [field.name for field in fields(library) if field.init and field.name not in withheld]
    for name, value in given.items() if isinstance(given, dict) else ():
        address = (*section, name)
        if name in withheld:
            yield document.place(address), f"{dotted(address)} has no place in a recipe: {withheld[name]}"
        elif name not in names:
            what = f"{library.__name__} has no field '{name}'{nearest(name, names)}"
            yield document.place(address), f"{dotted(section)}: {what}"
        else:
            try:
                TypeAdapter(_narrow(hints[name]), config=STRICT).validate_json(json.dumps(value))
            except ValidationError as error:
                yield from explain(error, document, address)


def _narrow(hint: Any) -> Any:
    """A field's type, but SomeEnum for `SomeEnum | str`: transformers then takes only the enum's values."""
    return next((t for t in get_args(hint) if isinstance(t, type) and issubclass(t, Enum)), hint)
