"""YAML into plain data that knows where each of its keys was written.

The text may come from anywhere, so what it can cost is bounded: its size, how deep it nests, and how much its aliases
expand to. It holds mappings, lists, text, numbers, true, false and null, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grpo.backend.hub import one_line
from grpo.errors import UserError

Keys = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NODES = 20_000
"""Keys and values, as often as aliases and merges repeat them; a text counts once more for each 100 characters."""

TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
MERGE = "tag:yaml.org,2002:merge"
FLOAT = "tag:yaml.org,2002:float"


class NotPlainError(yaml.MarkedYAMLError):
    """YAML, but of a kind that is not read: too deep, too much, or something that is no plain data."""


@dataclass
class Document:
    """Plain data, and where each path of keys was written. The place of `()` is the file's own."""

    data: dict[str, Any]
    where: dict[Keys, str]

    def locate(self, path: Keys) -> str:
        """The place of a path, or of the nearest one above it that was written."""
        while path not in self.where:
            path = path[:-1]
        return self.where[path]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, with `1e-5` a number, as in YAML 1.2 and as everyone means it, and dates as text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}
        """Nodes in each finished node, itself included, by its id (the tree keeps all nodes alive)."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise NotPlainError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        assert node is not None
        self._depth -= 1
        if is_alias and id(node) not in self._sizes:
            raise NotPlainError(problem="this alias stands inside of what it stands for", problem_mark=mark)
        size = self._sizes[id(node)] = self._sizes.get(id(node)) or self._size(node)
        if size > MAX_NODES:
            problem = f"more than {MAX_NODES:,} keys and values, counting what aliases repeat"
            raise NotPlainError(problem=problem, problem_mark=mark)
        return node

    def _size(self, node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1 + len(node.value) // 100
        pairs = node.value if isinstance(node, yaml.MappingNode) else [(node,) for node in node.value]
        return 1 + sum(self._sizes[id(inner)] for pair in pairs for inner in pair)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The node's value; what does not fit an explicit tag, such as `!!bool maybe`, is an error like any other."""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError, OverflowError):
            name = node.tag.rpartition(":")[2]
            problem = f"{node.value[:40]!r} is no {name}" if isinstance(node.value, str) else f"this is no {name}"
            raise NotPlainError(problem=problem, problem_mark=node.start_mark) from None
        if isinstance(value, str) and (why := _unwritable(value)):
            raise NotPlainError(problem=f"a text holds {why}", problem_mark=node.start_mark)
        return value

    def construct_unknown(self, node: yaml.Node) -> Any:
        problem = f"{node.tag.replace('tag:yaml.org,2002:', '!!')} is nothing that a recipe can hold"
        raise NotPlainError(problem=problem, problem_mark=node.start_mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag in {*TAGS, MERGE} - {FLOAT}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    FLOAT,
    re.compile(r"[-+]?(\.\d+|\d+\.\d*)([eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
_Loader.yaml_constructors = {tag: how for tag, how in yaml.SafeLoader.yaml_constructors.items() if tag in TAGS}
_Loader.add_constructor(None, _Loader.construct_unknown)


class Dumper(yaml.CSafeDumper if yaml.__with_libyaml__ else yaml.SafeDumper):  # type: ignore[misc]
    """Writes what is read here: a text that looks like one of its numbers is quoted.

    With libyaml it is four times as fast: a run writes its recipe twice.
    """


Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


class _Plain(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]
    """Reads what `Dumper` wrote, without bounds and places. With libyaml it is ten times as fast as `_Loader`."""


_Plain.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def read_written(text: str) -> Any:
    """The data that `Dumper` wrote as `text`."""
    return yaml.load(text, _Plain)  # a SafeLoader


def read_document(path: Path) -> Document:
    """The file's data with the place (`file:line`) of each key.

    Raises UserError, with file and line, for what cannot be read, is not YAML, holds a key twice, is no mapping, or
    goes beyond the bounds above.
    """
    text = _text_of(path)
    where: dict[Keys, str] = {(): str(path)}

    def place(node: yaml.Node) -> str:
        return f"{path}:{node.start_mark.line + 1}"

    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: a recipe is a mapping of keys to values; `grpo recipes list` shows examples")
        _note_places(root, (), place, where)
        return Document(loader.construct_document(root), where)
    except yaml.YAMLError as error:
        raise UserError(f"{path}:{_line(error, text)}: {_problem(error)}") from None


def value_of(text: str) -> Any:
    """A value of the command line as YAML, or as the text that it is: `####` is no comment there.

    Raises ValueError, which says why, for YAML that is not read here.
    """
    check_text(text)
    if text.lstrip().startswith("#"):
        return text
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except NotPlainError as error:
        raise ValueError(error.problem) from None
    except yaml.YAMLError:
        return text


def check_text(text: str) -> None:
    """Raise ValueError, which says why, for a text that no recipe can hold."""
    if (why := _unwritable(text)) is not None:
        raise ValueError(f"a text holds {why}")
    if len(text) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} characters")


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES:,} bytes: not a recipe")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not a text file in UTF-8") from None


def _line(error: yaml.YAMLError, text: str) -> int:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return mark.line + 1 if mark else text.count("\n", 0, getattr(error, "position", 0)) + 1


def _problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        return f"not YAML: it holds the character U+{error.character:04X}"
    problem = getattr(error, "problem", None) or one_line(error)
    return problem if isinstance(error, NotPlainError) else f"not YAML: {problem}"


def _unwritable(text: str) -> str | None:
    """What in a text no file can hold or be named by, in words."""
    if "\0" in text:
        return "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair, which is not UTF-8"
    return None


def _note_places(node: yaml.Node, at: Keys, place: Callable[[yaml.Node], str], where: dict[Keys, str]) -> None:
    """Note where each key and item below a node stands. Raises UserError for a key that is no text or given twice."""
    if isinstance(node, yaml.MappingNode):
        merged = [value for key, value in node.value if key.tag == MERGE]
        own = [(key, value) for key, value in node.value if key.tag != MERGE]
        for key, value in own:
            if key.tag != "tag:yaml.org,2002:str" or not isinstance(key, yaml.ScalarNode):
                what = repr(key.value[:40]) if isinstance(key.value, str) else "a list or mapping"
                raise UserError(f"{place(key)}: the key {what} is not text")
            child = (*at, key.value)
            if child in where:
                dotted = ".".join(map(str, child))
                raise UserError(f"{place(key)}: {dotted} is given twice (first at {where[child]})")
            where[child] = place(key)
            _note_places(value, child, place, where)
        for value in merged:
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                inner = {at: where[at]}
                _note_places(source, at, place, inner)
                for path, found in inner.items():
                    where.setdefault(path, found)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            where[(*at, index)] = place(value)
            _note_places(value, (*at, index), place, where)
