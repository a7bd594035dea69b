"""Checks the `kwargs` of rewards that are not functions, like sections of a recipe."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from grpo.config.section import Section

S = TypeVar("S", bound=Section)


def settings_of(kind: type[S], kwargs: Mapping[str, Any], who: str) -> S:
    """The settings of `kind` in `kwargs`; `who` is the subject of errors, such as "A judge".

    Raises ValueError for an unknown setting, and for an invalid value.
    """
    try:
        return kind.model_validate_json(json.dumps(dict(kwargs), default=str))
    except ValidationError as error:
        raise ValueError("; ".join(_said(kind, detail, who) for detail in error.errors())) from None


def _said(kind: type[Section], detail: Any, who: str) -> str:
    if not detail["loc"]:
        return f"kwargs.{detail['msg'].removeprefix('Value error, ')}"
    name = ".".join(map(str, detail["loc"]))
    if detail["type"] != "extra_forbidden":
        expected = detail["msg"].replace("Input should be", "expected", 1).replace("an object", "keys and values")
        if detail["type"] == "too_short":
            expected = f"expected at least {detail['ctx']['min_length']}"
        return f"kwargs.{name}: {expected}, got {json.dumps(detail['input'], default=str)}"
    known = list(kind.model_fields)
    close = difflib.get_close_matches(name, known, n=1)
    meant = f"Did you mean {close[0]!r}?" if close else f"{who} takes {', '.join(known)}."
    return f"kwargs.{name}: there is no such argument. {meant}"
