"""Applies `key.sub=value` overrides to a recipe's data."""

from __future__ import annotations

from typing import Any

from grpo.config import Recipe
from grpo.document import MAX_DEPTH, Document, Keys, check_text, value_of
from grpo.errors import UserError
from grpo.mistakes import named, section_of, shortened

COMMAND_LINE = "command line"
"""The default origin of an override, for errors."""


def override(document: Document, text: str, said_by: str = COMMAND_LINE) -> None:
    """Set one value, and create missing sections above it. Errors name the override's origin, `said_by`.

    Raises UserError for an invalid override, and for a missing item of a list.
    """
    name, equals, written = text.partition("=")
    place = f"{said_by}: {shortened(text)}"
    parts = name.split(".")
    if not equals or not name:
        missing = "the value is missing" if name else "the key is missing"
        raise UserError(f"{place}: {missing}: write {shortened(name) or 'key.sub'}=value")
    if "" in parts:
        raise UserError(f"{place}: a part of the key {shortened(name)} is empty: write key.sub=value")
    if len(parts) > MAX_DEPTH:
        raise UserError(f"{place}: the key has more than {MAX_DEPTH} parts")
    keys: Keys = ()
    target: Any = document.data
    for part in parts[:-1]:
        key = _key(target, part, parts, place)
        if isinstance(target, dict) and target.get(key) is None:
            target[key] = {}
        if keys == ("tools",) and isinstance(target[key], str):
            target[key] = {"use": target[key]}
        target, keys = target[key], (*keys, key)
    last = _key(target, parts[-1], parts, place)
    keys = (*keys, last)
    try:
        target[last] = _value(keys, written)
    except ValueError as error:
        raise UserError(f"{place}: {name}: {error}") from None
    for path in [path for path in document.where if path[: len(keys)] == keys]:
        del document.where[path]
    for depth in range(1, len(keys) + 1):
        document.where.setdefault(keys[:depth], place)


def _items(count: int) -> str:
    """The numbers of a list's items, in words."""
    if count < 2:
        return "the list has only the item 0" if count else "the list is empty"
    return f"the list has only the items 0 to {count - 1}"


def _key(target: Any, part: str, parts: list[str], place: str) -> str | int:
    """A part of a dotted name as a key of `target`: an index if `target` is a list."""
    if isinstance(target, dict):
        return part
    if not isinstance(target, list):
        raise UserError(
            f"{place}: there is no {shortened('.'.join(parts))} in the recipe: the key above it is not a section"
        )
    if part.isdecimal() and len(part) < 10 and int(part) < len(target):
        return int(part)
    items = _items(len(target))
    raise UserError(f"{place}: there is no {shortened('.'.join(parts))} in the recipe: {items}")


def _value(keys: Keys, text: str) -> Any:
    """The value, read as YAML; for a setting of type text, as written: `data.prompt={question}` needs no quotes."""
    if not _wants_text(keys):
        return value_of(text)
    check_text(text)
    try:
        value = value_of(text)
    except ValueError:  # not valid as YAML, but valid as a text
        return text
    return value if value is None or isinstance(value, str) else text


def _wants_text(keys: Keys) -> bool:
    section: Any = Recipe
    try:
        for part in named(keys)[:-1]:
            section = section_of(section.model_fields[part].annotation)
        return section.model_fields[keys[-1]].annotation in (str, str | None)
    except (KeyError, AttributeError):  # no such key: the schema reports it later
        return False
