"""Reads a recipe from YAML and `key.sub=value` overrides into a checked `Recipe`, with errors that name the line.

`grpo.document` reads the file, `grpo.overrides` applies the overrides, and `grpo.mistakes` explains the errors of the
schema.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from grpo.config import (
    DataConfig,
    EnvironmentConfig,
    EvalConfig,
    Recipe,
    RewardConfig,
    SourceConfig,
    TeacherConfig,
    ToolConfig,
)
from grpo.config.data import is_pattern
from grpo.config.environment import looks_like_file
from grpo.config.section import Section
from grpo.document import Document, Dumper, read_document
from grpo.errors import UserError
from grpo.mistakes import explanations, keys_of
from grpo.overrides import COMMAND_LINE, override
from grpo.plugins import MODEL, model_in

S = TypeVar("S", bound=Section)
U = TypeVar("U", RewardConfig, ToolConfig)


def load_recipe(
    path: Path, overrides: Sequence[str] = (), said_by: str = COMMAND_LINE, kind: type[Recipe] = Recipe
) -> Recipe:
    """The recipe in `path` with `key.sub=value` overrides applied; `said_by` is the overrides' origin in errors.

    The recipe is checked as a `kind`.

    Raises UserError for a file that is missing or is not YAML, an unknown key, a duplicate key, and a value of the
    wrong type or out of bounds; the message names the file, line, key, the given value and the expected value.
    grpo looks for files and folders that the recipe names next to the recipe, then in the working directory.
    """
    return _resolved(_checked(read_document(path), overrides, kind, said_by), path)


def recipe_of(data: dict[str, Any], what: str, overrides: Sequence[str] = (), kind: type[Recipe] = Recipe) -> Recipe:
    """A recipe from data instead of a file, checked and resolved like in `load_recipe`; errors name `what`."""
    return _resolved(_checked(Document(data, {(): what}), overrides, kind), Path(what))


def _checked(document: Document, overrides: Sequence[str], kind: type[Recipe], said_by: str = COMMAND_LINE) -> Recipe:
    for text in overrides:
        override(document, text, said_by)
    data = without_single_turn(document.data)
    try:
        # Through JSON, because strict mode then allows lists for tuples, but no other coercion.
        return kind.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise UserError("\n".join(explanations(error, data, document.locate))) from None


def without_single_turn(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe's data without `rollout.environment: single_turn`, which earlier versions wrote into each run's recipe,
    and which was the default."""
    rollout = data.get("rollout")
    if not isinstance(rollout, dict) or rollout.get("environment") != "single_turn":
        return data
    return {**data, "rollout": {name: value for name, value in rollout.items() if name != "environment"}}


def with_settings(section: S, settings: Mapping[str, Any], what: str = "a recipe that was changed in code") -> S:
    """A recipe or a section with other values: `{"optim.steps": 5}` for a recipe, `{"steps": 5}` for `optim`.

    Values have the schema's types, which may be whole sections; a list may replace a tuple, and a path a text. The
    result is checked like a recipe from a file, including the checks across settings, which `model_copy(update=...)`
    skips. Raises UserError, which names each key, with `what` as the place of the mistake.
    """
    values_of_section: dict[str, Any] = dict(section)
    below: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        first, _, rest = name.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = value
        else:
            values_of_section[first] = _as_held(section, first, value)
    for name, values in below.items():
        inner = values_of_section.get(name)
        values_of_section[name] = with_settings(inner, values, what) if isinstance(inner, Section) else values
    try:
        return type(section).model_validate(values_of_section)
    except ValidationError as error:
        lines = explanations(error, values_of_section, lambda _: what, keys_of(type(section)))
        raise UserError("\n".join(lines)) from None


def _as_held(section: Section, name: str, value: Any) -> Any:
    """A setting's value in the schema's type: a path as text, and a list as a tuple if the schema has a tuple."""
    if isinstance(value, Path):
        return str(value)
    field = type(section).model_fields.get(name)
    if isinstance(value, list) and field is not None and "tuple[" in str(field.annotation):
        return tuple(str(item) if isinstance(item, Path) else item for item in value)
    return value


def _matches(pattern: Path) -> bool:
    """Whether a file matches the pattern; for a pattern with `**`, only whether its first folder exists."""
    if "**" not in pattern.parts:
        return any(glob.iglob(str(pattern)))
    return Path(*takewhile(lambda part: not is_pattern(part), pattern.parts)).is_dir()


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with every setting."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=Dumper, sort_keys=False)


class _Finder:
    """Finds the files that a recipe names: next to the recipe, then in the working directory."""

    def __init__(self, path: Path) -> None:
        """`path` is the path of the recipe."""
        self.path = path

    def beside(self, name: str) -> str:
        """The absolute path of a file, folder or pattern, if it exists; otherwise the name unchanged."""
        for found in (self.path.parent / name, Path(name)):
            try:
                if name and found.exists():
                    return str(found.resolve())
                if is_pattern(name) and _matches(found):
                    return str(found.absolute())
            except (OSError, ValueError):  # not a valid file name
                continue
        return name

    def code(self, use: str) -> str:
        """A `use` with an absolute path, if its file or model folder exists."""
        if model := model_in(use):
            return MODEL + self.beside(model)
        file, colon, function = use.partition(":")
        return self.beside(file) + colon + function if file.endswith(".py") else use

    def used(self, section: U) -> U:
        """A reward's or tool's section with an absolute path in `use`."""
        return with_settings(section, {"use": section.use and self.code(section.use)}, str(self.path))

    def partner(self, section: EnvironmentConfig) -> EnvironmentConfig:
        """An environment's section with absolute paths of its class, agent or program."""
        found: dict[str, Any] = {name: (use := getattr(section, name)) and self.code(use) for name in ("use", "agent")}
        if section.command is not None:
            found["command"] = tuple(self.word(w) if looks_like_file(w) else w for w in section.command)
        return with_settings(section, found, str(self.path))

    def word(self, word: str) -> str:
        """A word of a command, with an absolute path if it is a file or folder. Links are not resolved: the Python of a
        virtual environment is a link, and its target is another Python."""
        for found in (self.path.parent / word, Path(word)):
            try:
                if found.exists():
                    return os.path.abspath(found)
            except (OSError, ValueError):  # not a valid file name
                continue
        return word

    def taught_by(self, teacher: TeacherConfig) -> TeacherConfig:
        """A teacher's section with an absolute path of its model or adapter."""
        if teacher.model is not None:
            return with_settings(teacher, {"model.name": self.beside(teacher.model.name)}, str(self.path))
        return with_settings(teacher, {"adapter": teacher.adapter and self.beside(teacher.adapter)}, str(self.path))

    def data(self, data: DataConfig) -> DataConfig:
        """The section `data` with absolute paths, also in its sources."""
        sources = tuple(
            with_settings(source, {**self.rows(source), **self._chosen(source)}, str(self.path))
            for source in data.sources
        )
        return with_settings(data, {**self.rows(data), **self._chosen(data), "sources": sources}, str(self.path))

    def rows(self, section: DataConfig | SourceConfig | EvalConfig) -> dict[str, Any]:
        """The settings for the origin of a section's rows, with absolute paths."""
        source = section.source
        found = tuple(map(self.beside, source)) if isinstance(source, tuple) else source and self.beside(source)
        return {"source": found, "use": section.use and self.code(section.use)}

    def _chosen(self, section: DataConfig | SourceConfig) -> dict[str, Any]:
        """The settings that choose rows, with absolute paths."""
        sampler, rates = section.sampler, section.solve_rates
        return {"sampler": sampler and self.code(sampler), "solve_rates": rates and self.beside(rates)}


def _resolved(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with a folder for its run, and with absolute paths of the files that exist."""
    find = _Finder(path)
    settings: dict[str, Any] = {
        "output_dir": recipe.output_dir or f"runs/{path.stem}{_trial()}",
        "model.name": find.beside(recipe.model.name),
        "data": find.data(recipe.data),
        "rewards": tuple(map(find.used, recipe.rewards)),
        "log.use": tuple(map(find.code, recipe.log.use)),
        "adapter.path": recipe.adapter.path and find.beside(recipe.adapter.path),
        "teacher": recipe.teacher and find.taught_by(recipe.teacher),
        "loss.use": recipe.loss.use and find.code(recipe.loss.use),
        "environment": recipe.environment and find.partner(recipe.environment),
        "environments": {name: find.partner(config) for name, config in recipe.environments.items()},
        "tools": tuple(map(find.used, recipe.tools)),
        "eval": recipe.eval and with_settings(recipe.eval, find.rows(recipe.eval), str(path)),
    }
    return with_settings(recipe, settings, str(path))


def _trial() -> str:
    """A suffix that distinguishes the trials of a W&B sweep: the id from the sweep's agent; empty outside of sweeps."""
    return f"-{os.environ['WANDB_RUN_ID']}" if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ else ""
