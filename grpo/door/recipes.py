"""`grpo.recipe`: a recipe with settings changed from Python, checked like a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo.config import Recipe
from grpo.door.checks import kind_of
from grpo.errors import UserError
from grpo.mistakes import section_of
from grpo.plugins import find_recipe
from grpo.recipes import load_recipe

SAID_BY = "grpo.recipe"
SEVERAL = ("rewards", "tools", "environments", "sources")
"""Sections with several entries: their keys contain a number or a name."""


def recipe(name: str | Path, **settings: Any) -> Recipe:
    """Load a recipe with changed settings, checked exactly like a file.

    `name` is a recipe's file, or the name of a bundled recipe (`grpo recipes list`). Name a setting by its dotted key,
    `**{"optim.steps": 20}`, or by the last part of its key if this part is unique: `steps=20`. Values are the same as
    in YAML: numbers, text, lists, dicts. A dict for a section replaces the whole section, as on the command line.

    Raises UserError for a recipe that does not exist, and for a setting that is unknown, ambiguous, of a wrong type,
    out of bounds, or without effect; the message names the key.

    >>> cfg = grpo.recipe("quickstart", steps=20, learning_rate=1e-3)
    >>> cfg.optim.steps, cfg.rollout.prompts_per_step
    (20, 16)
    """
    if not isinstance(name, str | Path):
        raise UserError(
            f"{SAID_BY}: expected a recipe's name or file, got {kind_of(name)}; pass settings as keyword arguments: "
            'grpo.recipe("quickstart", steps=20)'
        )
    texts = [f"{_whole(key)}={_as_yaml(key, value)}" for key, value in settings.items()]
    return load_recipe(find_recipe(str(name)), texts, SAID_BY)


def _whole(key: str) -> str:
    """Return the dotted key whose last part is `key`. If there is none, return `key`: the schema then refuses it."""
    keys = list(_keys(Recipe))
    if key in keys or "." in key:
        return key
    ending = [whole for whole in keys if whole.rpartition(".")[2] == key]
    if len(ending) > 1:
        written = " or ".join(f'**{{"{whole}": ...}}' for whole in ending)
        raise UserError(f"{SAID_BY}: {key} is the last part of {len(ending)} keys: write {written}")
    return ending[0] if ending else key


def _keys(section: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a section and of its subsections."""
    for name, field in section.model_fields.items():
        yield prefix + name
        below = section_of(field.annotation)
        if below is not None and name not in SEVERAL:
            yield from _keys(below, f"{prefix}{name}.")


def _as_yaml(key: str, value: Any) -> str:
    """Return a value as YAML."""
    if callable(value):
        raise UserError(f"{SAID_BY}: {key} is a function, but a recipe holds names: pass it to grpo.Trainer instead")
    try:
        return json.dumps(value, default=_plain, ensure_ascii=False)  # YAML does not support surrogate pairs
    except (TypeError, ValueError) as error:
        raise UserError(f"{SAID_BY}: {key}: {error}; a recipe holds numbers, text, lists, and dicts") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a value of type {type(value).__name__}")
