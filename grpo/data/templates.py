"""Prompts from a template with column names, such as `"{question} Think first."`."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from grpo.data.rows import is_null
from grpo.errors import UserError


def columns_of(template: str) -> list[str]:
    """The columns that a template names. Raises UserError for a malformed template."""
    try:
        fields = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"data.prompt: {template!r} is not a template: {error}; write {{{{ for a brace") from None
    for name, spec, conversion in fields:
        if not name.isidentifier() or spec or conversion:
            raise UserError(
                f"data.prompt: a template may contain only column names, {{like_this}}; write {{{{ for a brace: "
                f"{template!r}"
            )
    return [name for name, _, _ in fields]


def filled(template: str, values: Mapping[str, Any], where: str) -> str | None:
    """The template with its columns' values filled in, or None if one of the values is null or NaN.

    Raises UserError, which contains `where`, for a value that is neither text, a number nor a list of numbers.
    """
    texts = {name: _written(name, value, where) for name, value in values.items() if not is_null(value)}
    return template.format_map(texts) if len(texts) == len(values) else None


def _written(name: str, value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray):
        raise UserError(
            f"data.prompt: column {name!r} of {where} is binary ({len(value)} bytes), not text; decode it first, or "
            "name another column"
        )
    if _is_number(value):
        return _number(value)
    if isinstance(value, list) and value and all(_is_number(item) and not is_null(item) for item in value):
        return ", ".join(map(_number, value))
    raise UserError(
        f"data.prompt: column {name!r} of {where} is {value!r:.80}; a template takes only text, numbers and lists of "
        "numbers (data.columns can select a part: {first: " + name + ".0})"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _number(value: int | float) -> str:
    """A number as text, 3.0 as `3`: whole numbers from a CSV file are floats if a value of the column is missing."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value)
