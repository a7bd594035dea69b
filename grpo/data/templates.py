"""Prompts from a template over columns, `"{question} Think first."`, with values as people write them."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from grpo.data.rows import is_null
from grpo.errors import UserError


def columns_of(template: str) -> list[str]:
    """The columns that a template names. Raises UserError for what is not a template."""
    try:
        fields = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"data.prompt: {template!r} is not a template: {error}; write {{{{ for a brace") from None
    for name, spec, conversion in fields:
        if not name.isidentifier() or spec or conversion:
            raise UserError(
                f"data.prompt: a template holds names of columns, {{like_this}}; {{{{ is a brace: {template!r}"
            )
    return [name for name, _, _ in fields]


def filled(template: str, values: Mapping[str, Any], where: str) -> str | None:
    """The template with the values of its columns, or None where one of them is null or NaN.

    Raises UserError, with `where` in it, for a value that is neither text nor a number nor a list of numbers.
    """
    texts = {name: _written(name, value, where) for name, value in values.items() if not is_null(value)}
    return template.format_map(texts) if len(texts) == len(values) else None


def _written(name: str, value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray):
        raise UserError(
            f"data.prompt: column {name!r} of {where} is binary ({len(value)} bytes), not text; decode it before, or "
            "name another column"
        )
    if _is_number(value):
        return _number(value)
    if isinstance(value, list) and value and all(_is_number(item) and not is_null(item) for item in value):
        return ", ".join(map(_number, value))
    raise UserError(
        f"data.prompt: column {name!r} of {where} is no text for a template, but {value!r:.80}; a template takes text, "
        "numbers and lists of numbers (data.columns reaches inside: {first: " + name + ".0})"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _number(value: int | float) -> str:
    """3 for 3.0: a CSV file's whole numbers are floats as soon as one of the column is missing."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value)
