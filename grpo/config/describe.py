"""Describes the schema, for people and for editors: every key with its type, default and meaning."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from grpo.config import Recipe
from grpo.config.section import MANY
from grpo.errors import UserError

WIDTH = 100
NAMES = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "null"}
BOUNDS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}


@dataclass(frozen=True, slots=True)
class RecipeKey:
    """One key, dotted as on the command line (`rewards.0.use`). `default` is None for a required key."""

    key: str
    type: str
    default: str | None
    meaning: str

    def lines(self) -> list[str]:
        """The key as lines for the terminal."""
        default = "required" if self.default is None else f"= {self.default}"
        return [f"{self.key}  {default}  ({self.type})", *textwrap.wrap(self.meaning, WIDTH - 4, **_INDENT)]


_INDENT: dict[str, Any] = {"initial_indent": "    ", "subsequent_indent": "    "}


def json_schema() -> dict[str, Any]:
    """The recipe's JSON Schema, with all descriptions; unknown keys are not allowed."""
    schema: dict[str, Any] = _joined({"$schema": GenerateJsonSchema.schema_dialect, **Recipe.model_json_schema()})
    return schema


def settings(under: str = "") -> list[RecipeKey]:
    """Every key, or the key `under` and the keys below it. Raises UserError for an unknown key."""
    schema = json_schema()
    every = list(_settings(schema, schema["$defs"], ""))
    found = [setting for setting in every if not under or setting.key == under or setting.key.startswith(f"{under}.")]
    if not found:
        close = difflib.get_close_matches(under, [setting.key for setting in every], n=1)
        raise UserError(f"{under}: a recipe has no such key.{f' Did you mean {close[0]}?' if close else ''}")
    return found


def _settings(section: Mapping[str, Any], sections: Mapping[str, Any], prefix: str) -> Iterable[RecipeKey]:
    for name, field in section["properties"].items():
        key = f"{prefix}{name}"
        inner, within = _section(field, sections)
        if inner is None:
            yield RecipeKey(key, _type(field), _default(field), field["description"])
            continue
        # A section's default is the defaults of its keys, unless the section is absent by default.
        default = None if name in section.get("required", ()) else _default(field) if within else _null_or_some(field)
        yield RecipeKey(key, WITHIN[within], default, field["description"])
        yield from _settings(inner, sections, f"{key}.{within}")


WITHIN = {"": "section", "0.": "list of sections", "<name>.": "sections by name"}
"""The type of a field with sections, by the text between its key and the keys of its sections."""


def _section(field: Mapping[str, Any], sections: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str]:
    """The section that a field contains (once, in a list or by name), and the key of `WITHIN`; None and "" for a field
    without a section."""
    for form in (field, *field.get("anyOf", ())):
        if "$ref" in form:
            return sections[form["$ref"].rpartition("/")[2]], ""
    for several, within in (("items", "0."), ("additionalProperties", "<name>.")):
        inner, _ = _section(field[several], sections) if isinstance(field.get(several), dict) else (None, "")
        if inner is not None:
            return inner, within
    return None, ""


def _null_or_some(section: Mapping[str, Any]) -> str:
    return "null" if section.get("default") is None else "{…}"


def _default(field: Mapping[str, Any]) -> str | None:
    return json.dumps(field["default"], ensure_ascii=False) if "default" in field else None


def _type(form: Mapping[str, Any]) -> str:
    if "anyOf" in form:
        return " or ".join(_type(one) for one in form["anyOf"])
    if "const" in form or "enum" in form:
        return " | ".join(str(one) for one in form.get("enum", [form.get("const")]))
    if form.get("type") == "array":
        return _list(form)
    if form.get("type") == "object":
        inner = form.get("additionalProperties")
        return f"keys and values: {_type(inner)}" if isinstance(inner, dict) else "keys and values"
    # Bounds of a million and more only catch typos, so they are not shown.
    bounds = [f"{words} {form[name]:g}" for name, words in BOUNDS.items() if abs(form.get(name, MANY)) < MANY]
    return " ".join([NAMES[form["type"]], " and ".join(bounds)]).strip()


def _list(form: Mapping[str, Any]) -> str:
    if "prefixItems" in form:
        return f"[{', '.join(_type(one) for one in form['prefixItems'])}]"
    return f"list of {_type(form['items'])}"


def _joined(value: Any) -> Any:
    """The same schema with each description on one line."""
    if isinstance(value, dict):
        return {
            key: " ".join(inner.split()) if key == "description" and isinstance(inner, str) else _joined(inner)
            for key, inner in value.items()
        }
    return [_joined(inner) for inner in value] if isinstance(value, list) else value
