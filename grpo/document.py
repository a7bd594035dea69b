"""Reads YAML into plain data, with the file and line of each key.

The text may come from anywhere, so its cost is bounded: its size, its nesting depth, and the expansion of its aliases.
It may contain mappings, lists, texts, numbers, true, false and null, and nothing else.
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
"""Maximum number of keys and values. Repetitions by aliases and merges count, and each 100 characters of a text count
as one more."""

TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
MERGE = "tag:yaml.org,2002:merge"
FLOAT = "tag:yaml.org,2002:float"


class NotPlainError(yaml.MarkedYAMLError):
    """YAML that grpo refuses: nested too deep, too large, or not plain data."""


@dataclass
class Document:
    """Plain data, and the place (`file:line`) of each path of keys. The place of `()` is the file."""

    data: dict[str, Any]
    where: dict[Keys, str]

    def locate(self, path: Keys) -> str:
        """The place of a path, or of the nearest path above it that is in the file."""
        while path not in self.where:
            path = path[:-1]
        return self.where[path]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that `1e-5` is a number, as in YAML 1.2, and that dates are texts."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}
        """Number of nodes in each finished node, itself included, by its id (the tree keeps all nodes alive)."""

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
            raise NotPlainError(problem="this alias is inside the value that it repeats", problem_mark=mark)
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
        """The node's value. Raises NotPlainError for a value that does not fit its explicit tag: `!!bool maybe`."""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError, OverflowError):
            name = node.tag.rpartition(":")[2]
            shown = f"{node.value[:40]!r}" if isinstance(node.value, str) else "this value"
            problem = f"{shown} is not of type {name}"
            raise NotPlainError(problem=problem, problem_mark=node.start_mark) from None
        if isinstance(value, str) and (why := _unwritable(value)):
            raise NotPlainError(problem=f"a text contains {why}", problem_mark=node.start_mark)
        return value

    def construct_unknown(self, node: yaml.Node) -> Any:
        problem = f"a recipe cannot contain {node.tag.replace('tag:yaml.org,2002:', '!!')}"
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
    """Writes YAML that `_Loader` reads back: a text that looks like a number to `_Loader` is quoted.

    libyaml makes it four times faster, and a run writes its recipe twice.
    """


Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


class _Plain(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]
    """Reads the output of `Dumper`, without bounds and places. With libyaml it is ten times faster than `_Loader`."""


_Plain.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def read_written(text: str) -> Any:
    """The data that `Dumper` wrote as `text`."""
    return yaml.load(text, _Plain)  # a SafeLoader


def read_document(path: Path) -> Document:
    """The file's data with the place (`file:line`) of each key.

    Raises UserError, with file and line, for a file that cannot be read, is not YAML, contains a key twice, is not a
    mapping, or exceeds the bounds above.
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
    """A value from the command line, read as YAML, or as a plain text if it is not YAML. `####` is not a comment.

    Raises ValueError, with the reason, for YAML that a recipe cannot contain.
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
    """Raise ValueError, with the reason, for a text that a recipe cannot contain."""
    if (why := _unwritable(text)) is not None:
        raise ValueError(f"a text contains {why}")
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
        return f"not YAML: it contains the character U+{error.character:04X}"
    problem = getattr(error, "problem", None) or one_line(error)
    return problem if isinstance(error, NotPlainError) else f"not YAML: {problem}"


def _unwritable(text: str) -> str | None:
    """A description of the part of a text that cannot be stored as UTF-8 or be in a file name; None without one."""
    if "\0" in text:
        return "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair, which is not UTF-8"
    return None


def _note_places(node: yaml.Node, at: Keys, place: Callable[[yaml.Node], str], where: dict[Keys, str]) -> None:
    """Record the place of each key and item below a node. Raises UserError for a key that is not text, or that occurs
    twice."""
    if isinstance(node, yaml.MappingNode):
        merged = [value for key, value in node.value if key.tag == MERGE]
        for key, value in ((key, value) for key, value in node.value if key.tag != MERGE):
            if key.tag != "tag:yaml.org,2002:str" or not isinstance(key, yaml.ScalarNode):
                what = repr(key.value[:40]) if isinstance(key.value, str) else "a list or mapping"
                raise UserError(f"{place(key)}: the key {what} is not text")
            child = (*at, key.value)
            if child in where:
                dotted = ".".join(map(str, child))
                raise UserError(f"{place(key)}: {dotted} occurs twice (first at {where[child]}): remove one of them")
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
