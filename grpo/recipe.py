"""Reads a recipe: YAML and `key.sub=value` overrides in, a checked `Recipe` out, or an error that points at the line.

PyYAML builds a tree of nodes that know their lines; `grpo.mistakes` asks them where a path of keys was written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from grpo.backend.hub import one_line
from grpo.config import Recipe
from grpo.errors import UserError
from grpo.mistakes import Keys, dotted, explanations, named, section_of


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


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: a text that looks like one of its numbers is quoted."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


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
    return _resolved(_checked(_read(path), overrides), path)


def recipe_of(data: dict[str, Any], what: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe that is in no file, as `load_recipe` would give it. Errors are said to be of `what`."""
    return _resolved(_checked(_Source(data, {(): what}), overrides), Path(what))


def _checked(source: _Source, overrides: Sequence[str]) -> Recipe:
    for override in overrides:
        _override(source, override)
    try:
        # Through JSON, because there strict means "no coercion" and yet lists may fill tuples.
        return Recipe.model_validate_json(json.dumps(source.data, default=str))
    except ValidationError as error:
        raise UserError("\n".join(explanations(error, source.data, source.locate))) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every setting written out."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def _resolved(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with a folder for its run, and with files that are found named absolutely."""

    def beside(name: str) -> str:
        for found in (path.parent / name, Path(name)):
            try:
                if name and found.exists():
                    return str(found.resolve())
            except OSError:  # a name that no file can have
                continue
        return name

    def function_path(use: str) -> str:
        file, colon, function = use.partition(":")
        return beside(file) + colon + function if file.endswith(".py") else use

    rewards = tuple(reward.model_copy(update={"use": function_path(reward.use)}) for reward in recipe.rewards)
    update: dict[str, Any] = {
        "output_dir": recipe.output_dir or f"runs/{path.stem}{_trial()}",
        "model": recipe.model.model_copy(update={"name": beside(recipe.model.name)}),
        "data": recipe.data.model_copy(update={"source": beside(recipe.data.source)}),
        "rewards": rewards,
        "log": recipe.log.model_copy(update={"use": tuple(function_path(use) for use in recipe.log.use)}),
    }
    if recipe.adapter.path is not None:
        update["adapter"] = recipe.adapter.model_copy(update={"path": beside(recipe.adapter.path)})
    if recipe.loss.use is not None:
        update["loss"] = recipe.loss.model_copy(update={"use": function_path(recipe.loss.use)})
    if recipe.eval is not None and recipe.eval.source is not None:
        update["eval"] = recipe.eval.model_copy(update={"source": beside(recipe.eval.source)})
    return recipe.model_copy(update=update)


def _trial() -> str:
    """What tells the trials of a W&B sweep apart: its agent gives each an id. Nothing outside of sweeps."""
    return f"-{os.environ['WANDB_RUN_ID']}" if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ else ""


def _read(path: Path) -> _Source:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        where: dict[Keys, str] = {(): str(path)}
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: a recipe is a mapping of keys to values; `grpo recipes list` shows examples")
        _note_lines(root, (), path, where)
        data = loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or one_line(error)}") from None
    except (ValueError, RecursionError) as error:  # a date that is none, a list that holds itself
        raise UserError(f"{path}: not YAML that can be read: {one_line(error)}") from None
    return _Source(data, where)


def _note_lines(node: yaml.Node, at: Keys, path: Path, where: dict[Keys, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child = (*at, str(key.value))
            place = f"{path}:{key.start_mark.line + 1}"
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise UserError(f"{place}: the key {key.value!r} is not text")
            if child in where:
                raise UserError(f"{place}: {dotted(child)} is given twice (first at {where[child]})")
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
    keys: Keys = tuple(int(key) if key.isdecimal() else key for key in name.split("."))
    value = _override_value(keys, text)
    target: Any = source.data
    try:
        for key in keys[:-1]:
            target = _section(target, key)
        target[keys[-1]] = value
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{place}: there is no {name} in the recipe") from None
    for path in [path for path in source.where if path[: len(keys)] == keys]:
        del source.where[path]
    for depth in range(1, len(keys) + 1):
        source.where.setdefault(keys[:depth], place)


def _override_value(keys: Keys, text: str) -> Any:
    """The value as YAML; where the schema wants a text, as written: `data.prompt={question}` needs no quotes."""
    value = value_of(text)
    return value if value is None or isinstance(value, str) or not _wants_text(keys) else text


def value_of(text: str) -> Any:
    """A value of the command line as YAML, or as the text that it is: `####` is no comment there."""
    if text.lstrip().startswith("#"):
        return text
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError):
        return text


def _wants_text(keys: Keys) -> bool:
    section: Any = Recipe
    try:
        for part in named(keys)[:-1]:
            section = section_of(section.model_fields[part].annotation)
        return section.model_fields[keys[-1]].annotation in (str, str | None)
    except (KeyError, AttributeError):  # no such key: the schema will say so
        return False


def _section(target: Any, key: str | int) -> Any:
    """What is at `key`: an item of a list, or a section, made if it is not there yet."""
    if isinstance(target, dict) and target.get(key) is None:
        target[key] = {}
    return target[key]
