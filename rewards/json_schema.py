"""Whether the completion is JSON that matches a schema (JSON Schema, by the jsonschema package)."""

import json
import re
from collections.abc import Callable
from typing import Any

from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import SchemaError, ValidationError

from grpo.scoring.text import texts

CALLS = "completion"

FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


def reward(schema: dict[str, Any] | None = None, fenced: bool = True) -> Callable[..., list[float | None]]:
    """1.0 if the completion is JSON that matches the schema, else 0.0; None if the row's schema is null.

    The schema is the argument `schema`, or else the dataset's column `json_schema` (an object, or its text). `fenced`:
    if the completion has code fences, the last fenced block counts instead of the whole completion.
    """
    fixed = None if schema is None else _validator(schema)

    def same(completions: list[Any], **_: Any) -> list[float | None]:
        return [_grade(text, fixed, fenced) for text in texts(completions)]

    def by_row(completions: list[Any], json_schema: list[Any], **_: Any) -> list[float | None]:
        wanted = [None if one is None else _validator(one) for one in json_schema]
        return [_grade(text, one, fenced) for text, one in zip(texts(completions), wanted, strict=True)]

    return same if fixed is not None else by_row


def _validator(schema: Any) -> Any:
    schema = json.loads(schema) if isinstance(schema, str) else schema
    kind = validators.validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"not a valid JSON Schema: {error.message}") from None
    return kind(schema)


def _grade(completion: str, validator: Any, fenced: bool) -> float | None:
    if validator is None:
        return None
    blocks = FENCED.findall(completion) if fenced else []
    try:
        validator.validate(json.loads(blocks[-1] if blocks else completion, parse_constant=_no_number))
    except (ValueError, RecursionError, ValidationError):
        return 0.0
    return 1.0


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


_AGE = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}
CASES = [
    {"completion": '{"age": 7}', "kwargs": {"schema": _AGE}, "score": 1.0},
    {"completion": 'Here:\n```json\n{"age": 7}\n```\n', "kwargs": {"schema": _AGE}, "score": 1.0},
    {"completion": '```\n{"age": 7}\n```', "kwargs": {"schema": _AGE, "fenced": False}, "score": 0.0},
    {"completion": '{"age": -7}', "kwargs": {"schema": _AGE}, "score": 0.0},
    {"completion": '{"age": NaN}', "kwargs": {"schema": {}}, "score": 0.0},
    {"completion": "{}", "kwargs": {"schema": _AGE}, "score": 0.0},
    {"completion": "[" * 100_000, "kwargs": {"schema": _AGE}, "score": 0.0},
    {"completion": "7", "json_schema": '{"type": "integer"}', "score": 1.0},
    {"completion": "7", "json_schema": None, "score": None},
    {"completion": "", "kwargs": {"schema": _AGE}, "score": 0.0},
]
