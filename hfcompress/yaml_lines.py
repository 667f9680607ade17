"""YAML that remembers its lines: read strictly into plain values with the place of each, and written back.

Scalars are those of YAML 1.2: `1e-5` is a number, `no`, `on` and `12:30` are text, `012` is twelve. Refused,
beside broken syntax: keys given twice or that are not text, tags, numbers that are not finite or need more
than 64 bits, aliases beyond a few, nesting beyond reason.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from hfcompress.errors import ConfigError

Address: TypeAlias = tuple[str | int, ...]
"""Keys and indices that lead from a document's root to a value."""

_MAX_ALIASES = 16  # few enough that aliases of aliases cannot grow large
_MAX_DEPTH = 32


@dataclass(frozen=True, order=True)
class Place:
    """Where something was written: a line (from 1; column 0: all of it) of a file, or an override of it, which may
    itself stand in a line.
    """

    file: str
    line: int = 0
    column: int = 0
    override: str = ""

    def __str__(self) -> str:
        if self.override:
            return f"{self.file}{f':{self.line}' if self.line else ''}: override '{self.override}'"
        return f"{self.file}:{self.line}" + (f":{self.column}" if self.column else "")


Fault: TypeAlias = tuple[Place, str]
"""What is wrong, and where."""


def refuse(faults: Iterable[Fault]) -> None:
    """Returns if there is no fault.

    Raises ConfigError: all of them, one per line, in the order of the file.
    """
    lines = [f"{place}: {what}".replace("\n", "\\n") for place, what in sorted(set(faults))]
    if lines:
        raise ConfigError("\n".join(lines))


@dataclass
class Document:
    """One YAML document: dicts with text keys, lists, text, numbers, booleans, None; where each was written.

    A value of a mapping stands where its key does.
    """

    tree: Any
    places: dict[Address, Place]

    def known(self, address: Address) -> Address:
        """The longest beginning of `address` that leads to a value."""
        while address not in self.places:
            address = address[:-1]
        return address

    def place(self, address: Address) -> Place:
        return self.places[self.known(address)]

    def at(self, *address: str | int) -> Any:
        """The value at these keys, None where there is none."""
        value = self.tree
        for key in address:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def put(self, container: Any, address: Address, value: Any, place: Place) -> None:
        """Sets the item of `container` that `address` ends in; it and all below it now stand at `place`."""
        container[address[-1]] = value
        below = [other for other in self.places if other[: len(address)] == address]
        for other in below:
            del self.places[other]
        self.places[address] = place


def read(path: Path) -> list[Document]:
    """The documents of a file, one or more.

    Raises ConfigError: it cannot be read, is not UTF-8, is empty, or as `parse`.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text: byte 0x{error.object[error.start]:02x}") from error
    documents = parse(text, lambda line, column: Place(str(path), line, column))
    if not documents:
        raise ConfigError(f"{path}:1: the file is empty; a document was expected")
    return documents


def parse(text: str, locate: Callable[[int, int], Place]) -> list[Document]:
    """The documents in `text`, none if it is empty. `locate`: the place of a line and column (0: all of it).

    Raises ConfigError: broken syntax, or anything that the head of this file lists.
    """
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        place = locate(text.count("\n", 0, error.position) + 1, 0)
        raise ConfigError(f"{place}: character U+{error.character:04X} is not allowed in YAML") from error
    nodes: list[Any] = []
    try:
        while loader.check_node():
            nodes.append(loader.get_node())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark or loader.get_mark()
        context = f" ({error.context})" if error.context else ""
        raise ConfigError(f"{locate(mark.line + 1, mark.column + 1)}: {error.problem}{context}") from error
    except (ValueError, OverflowError) as error:  # PyYAML leaves such numbers to Python
        mark = loader.get_mark()
        what = "the number in an escape or directive is out of range"
        raise ConfigError(f"{locate(mark.line + 1, mark.column + 1)}: {what}") from error
    builders = [_Builder(locate) for _ in nodes]
    documents = [Document(builder.build(node, ()), builder.places) for builder, node in zip(builders, nodes)]
    refuse(fault for builder in builders for fault in builder.faults)
    return documents


def write(tree: Any) -> str:
    """`tree` (as in `Document`) as YAML that `parse` reads back equal, keys in their order.

    Text that YAML 1.1 would take for something else is quoted too.
    """
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _integer(text: str) -> int:
    number = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if not -(2**63) <= number < 2**63:
        raise ValueError("does not fit into 64 bits")
    return number


def _number(text: str) -> float:
    if text[-1].isalpha() or not math.isfinite(float(text)):
        raise ValueError("is not a finite number")
    return float(text)


def _text(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):  # an escape can spell one
        raise ValueError("holds half a surrogate pair")
    return text


_TAG = "tag:yaml.org,2002:"
_INT, _FLOAT = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
_SCALARS: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    _TAG + name: (re.compile(rf"(?s:{pattern})\Z"), convert)
    for name, pattern, convert in (
        ("null", r"~|null|Null|NULL|", lambda text: None),
        ("bool", r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
        ("int", _INT, _integer),
        ("float", rf"{_FLOAT}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", _number),
        ("str", r".*", _text),
    )
}
"""YAML 1.2's core schema: how a scalar is written and what it means; the first that matches a plain one."""


class _Loader(yaml.SafeLoader):
    """Composes nodes (it constructs nothing) with the scalars above."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.aliases = self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        is_alias = isinstance(event, yaml.AliasEvent)
        self.aliases += is_alias
        self.depth += 1
        if self.aliases > _MAX_ALIASES:
            raise yaml.MarkedYAMLError(None, None, f"more than {_MAX_ALIASES} aliases", event.start_mark)
        if self.depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"nested more than {_MAX_DEPTH} deep", event.start_mark)
        node = super().compose_node(parent, index)
        if is_alias and node is not None and node.end_mark is None:  # its end has not been read yet
            raise yaml.MarkedYAMLError(None, None, "an alias within what it stands for", event.start_mark)
        self.depth -= 1
        return node


def _short(tag: str) -> str:
    return tag.replace(_TAG, "!!")


@dataclass
class _Builder:
    """Plain values from the nodes of one document; notes where each stands and what is wrong with it."""

    locate: Callable[[int, int], Place]
    places: dict[Address, Place] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def build(self, node: yaml.Node, address: Address) -> Any:
        self.places.setdefault(address, self._place(node))
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, address)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.build(item, (*address, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node)
        self._fault(node, f"tag '{_short(node.tag)}' is refused: only plain values are read")
        return None

    def _mapping(self, node: yaml.MappingNode, address: Address) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != _TAG + "str":
                found = f"'{key.value}'; put it in quotes" if isinstance(key, yaml.ScalarNode) else "a collection"
                self._fault(key, f"a key must be text, found {found}")
                continue
            name = self._scalar(key)
            here = (*address, name)
            if name in result:
                self._fault(key, f"key '{name}' is given twice, first at {self.places[here]}; keep one of them")
            else:
                self.places[here] = self._place(key)
                result[name] = self.build(value, here)
        return result

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        pattern, convert = _SCALARS[node.tag]
        try:
            if not pattern.match(node.value):
                raise ValueError(f"is not what its tag '{_short(node.tag)}' says")
            return convert(node.value)
        except ValueError as error:
            self._fault(node, f"{node.value[:40]!r} {error}")
            return None

    def _place(self, node: yaml.Node) -> Place:
        return self.locate(node.start_mark.line + 1, 0)

    def _fault(self, node: yaml.Node, what: str) -> None:
        self.faults.append((self._place(node), what))


class _Dumper(yaml.SafeDumper):
    """Block style, text of several lines included, but lists of scalars on one line; no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def items(self, data: list[Any]) -> yaml.Node:
        flat = not any(isinstance(item, dict | list) for item in data)
        return self.represent_sequence(_TAG + "seq", data, flow_style=flat)

    def text(self, data: str) -> yaml.Node:
        style = "|" if "\n" in data else None
        if re.search("[\x85\u2028\u2029]", data):  # line breaks to YAML 1.1, which only this style escapes
            style = '"'
        return self.represent_scalar(_TAG + "str", data, style=style)


_Dumper.add_representer(list, _Dumper.items)
_Dumper.add_representer(str, _Dumper.text)
_Loader.yaml_implicit_resolvers = {}  # YAML 1.1's; the dumper has both: it quotes what either misreads
for _tag, (_pattern, _) in _SCALARS.items():
    if _tag != _TAG + "str":
        _Loader.add_implicit_resolver(_tag, _pattern, None)
        _Dumper.add_implicit_resolver(_tag, _pattern, None)
