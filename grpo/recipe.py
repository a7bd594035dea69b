"""Reads a recipe: YAML and `key.sub=value` overrides in, a checked `Recipe` out, or an error that points at the line.

PyYAML builds a tree of nodes that know their lines; the errors of pydantic name a path of keys. This module
joins the two.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from grpo.config import Recipe
from grpo.errors import UserError

Keys = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-5` is a number, as in YAML 1.2 and as everyone means it."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.\d+|\d+\.\d*)([eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


@dataclass
class _Source:
    """A recipe's plain data, and where each path of keys was written."""

    data: dict[str, Any]
    where: dict[Keys, str]

    def locate(self, path: Keys) -> str:
        """The place of a path, or of the nearest one above it that was written."""
        while path not in self.where:
            path = path[:-1]
        return self.where[path]


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `path` with `key.sub=value` overrides applied.

    Raises UserError for a file that is not there or is not YAML, an unknown key, a key given twice, a value of
    a wrong type or out of bounds; the message names file, line, key, what was given and what was expected.
    Files and folders that the recipe names are looked for beside it, then in the working directory.
    """
    source = _read(path)
    for override in overrides:
        _override(source, override)
    try:
        # Through JSON, because there strict means "no coercion" and yet lists may fill tuples.
        recipe = Recipe.model_validate_json(json.dumps(source.data, default=str))
    except ValidationError as error:
        raise UserError("\n".join(_explanations(error, source))) from None
    return _resolved(recipe, path)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every setting written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _resolved(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with a folder for its run, and with files found beside it named absolutely."""

    def beside(name: str) -> str:
        found = path.parent / name
        return str(found.resolve()) if found.exists() else name

    def function_path(use: str) -> str:
        file, colon, function = use.partition(":")
        return beside(file) + colon + function if file.endswith(".py") else use

    rewards = tuple(reward.model_copy(update={"use": function_path(reward.use)}) for reward in recipe.rewards)
    update: dict[str, Any] = {
        "output_dir": recipe.output_dir or f"runs/{path.stem}",
        "model": recipe.model.model_copy(update={"name": beside(recipe.model.name)}),
        "data": recipe.data.model_copy(update={"source": beside(recipe.data.source)}),
        "rewards": rewards,
    }
    if recipe.loss.use is not None:
        update["loss"] = recipe.loss.model_copy(update={"use": function_path(recipe.loss.use)})
    if recipe.eval is not None and recipe.eval.source is not None:
        update["eval"] = recipe.eval.model_copy(update={"source": beside(recipe.eval.source)})
    return recipe.model_copy(update=update)


def _read(path: Path) -> _Source:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        where: dict[Keys, str] = {(): str(path)}
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: a recipe is a mapping of keys to values; `grpo recipes list` shows examples")
        _note_lines(root, (), path, where)
        data = loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    finally:
        loader.dispose()
    return _Source(data, where)


def _note_lines(node: yaml.Node, at: Keys, path: Path, where: dict[Keys, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child = (*at, str(key.value))
            place = f"{path}:{key.start_mark.line + 1}"
            if child in where:
                raise UserError(f"{place}: {_dotted(child)} is given twice (first at {where[child]})")
            where[child] = place
            _note_lines(value, child, path, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            where[(*at, index)] = f"{path}:{value.start_mark.line + 1}"
            _note_lines(value, (*at, index), path, where)


def _override(source: _Source, override: str) -> None:
    name, equals, text = override.partition("=")
    place = f"command line: {override}"
    if not equals or not name:
        raise UserError(f"{place}: an override is key.sub=value")
    try:
        value = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError:
        raise UserError(f"{place}: the value is not YAML; quote it") from None
    keys: Keys = tuple(int(key) if key.isdigit() else key for key in name.split("."))
    target: Any = source.data
    try:
        for key in keys[:-1]:
            target = _section(target, key)
        target[keys[-1]] = value
    except (IndexError, TypeError):
        raise UserError(f"{place}: there is no {name} in the recipe") from None
    for path in [path for path in source.where if path[: len(keys)] == keys]:
        del source.where[path]
    source.where[keys] = place


def _section(target: Any, key: str | int) -> Any:
    """What is at `key`: an item of a list, or a section, made if it is not there yet."""
    if isinstance(target, dict) and target.get(key) is None:
        target[key] = {}
    return target[key]


def _explanations(error: ValidationError, source: _Source) -> list[str]:
    """A line for each mistake. That a key is missing is not said where it was misspelt."""
    details = _one_per_place(error.errors())
    misspelt = {_meant(_keys(detail)) for detail in details if detail["type"] == "extra_forbidden"}
    return [
        _explain(detail, source)
        for detail in details
        if detail["type"] != "missing" or _dotted(_named(_keys(detail))) not in misspelt
    ]


def _one_per_place(errors: Iterable[ErrorDetails]) -> list[ErrorDetails]:
    """The innermost errors, one for each place: a union reports once for each of its members, a list again."""
    by_place: dict[Keys, ErrorDetails] = {}
    for detail in errors:
        by_place.setdefault(_keys(detail), detail)
    inner = {keys[:depth] for keys in by_place for depth in range(len(keys))}
    return [detail for keys, detail in by_place.items() if keys not in inner or keys == ()]


def _keys(detail: ErrorDetails) -> Keys:
    """The path of keys, without the names that pydantic adds for the members of a union."""
    return tuple(part for part in detail["loc"] if isinstance(part, int) or part.isidentifier())


def _explain(detail: ErrorDetails, source: _Source) -> str:
    path = _keys(detail)
    place, key = source.locate(path), _dotted(path)
    match detail["type"]:
        case "extra_forbidden":
            return f"{place}: unknown key {key}.{_hint(path)}"
        case "missing":
            return f"{place}: {key} is missing. {_help(path)}".rstrip()
        case "value_error":
            return f"{place}: {detail['msg'].removeprefix('Value error, ')}"
    expected = detail["msg"].replace("Input should be", "expected", 1)
    given = json.dumps(detail["input"], default=str)
    hint = " Write it without quotes." if isinstance(detail["input"], str) and "number" in expected else ""
    return f"{place}: {key}: {expected}, got {given}.{hint}"


def _hint(path: Keys) -> str:
    if meant := _meant(path):
        return f" Did you mean {meant}?"
    beside = _keys_beside(path)
    return f" Valid here: {', '.join(key.rpartition('.')[2] for key in beside)}." if beside else ""


def _meant(path: Keys) -> str | None:
    """The valid key that an unknown one was probably meant to be: one beside it, or else one anywhere."""
    for keys in (_keys_beside(path), list(_all_keys(Recipe))):
        by_name = {key.rpartition(".")[2]: key for key in keys}
        if close := difflib.get_close_matches(str(path[-1]), by_name, n=1, cutoff=0.6):
            return by_name[close[0]]
    return None


def _keys_beside(path: Keys) -> list[str]:
    section = _dotted(_named(path[:-1]))
    return [key for key in _all_keys(Recipe) if key.rpartition(".")[0] == section]


def _named(path: Keys) -> Keys:
    """The path without positions in lists, as the schema knows it."""
    return tuple(part for part in path if isinstance(part, str))


def _help(path: Keys) -> str:
    """What the schema says about a key."""
    *above, name = _named(path)
    section: Any = Recipe
    for part in above:
        section = _section_of(section.model_fields[part].annotation)
    return (section.model_fields[name].description or "").replace("\n", " ")


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if inner := _section_of(field.annotation):
            yield from _all_keys(inner, f"{prefix}{name}.")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section in `Section`, `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_of, getattr(annotation, "__args__", ()))), None)


def _dotted(path: Keys) -> str:
    return ".".join(map(str, path))
