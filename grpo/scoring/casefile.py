"""Reads the cases of a reward (completions with expected scores) from its own file or from a separate file."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.errors import UserError
from grpo.plugins import Located, load_file

FORMS = "a list of cases, or a dictionary from function names to lists of cases"


def find_cases(
    function: Callable[..., Any] | None, located: Located, file: str | None
) -> tuple[list[Any], Callable[[], Any]]:
    """The cases of `function` (None for a model), and the context manager that provides their arguments.

    The cases are the `CASES` of the function's module, or the content of `file`: Python with `CASES`, JSON, or JSON
    lines. In a file with several functions, cases name their function: as the key in a dictionary of lists, or in each
    case under `reward`. Raises UserError for a Python file without `CASES`, and for a name that is not a function of
    the module.
    """
    home = None if function is None else sys.modules.get(function.__module__)
    if file is None:
        given, module = getattr(home, "CASES", []), home
    else:
        given, module = _read(Path(file))
    cases = _by_function(given)
    if file is None and (unknown := [name for name in cases if name is not None and not hasattr(home, name)]):
        raise UserError(f"CASES has cases for {unknown[0]!r}, but the file has no function of that name")
    names = {None, located.where.rpartition(":")[2], located.name}
    found = [case for name, listed in cases.items() if name in names for case in listed]
    return found, getattr(module, "case_kwargs", contextlib.nullcontext)


def _by_function(given: Any) -> dict[str | None, list[Any]]:
    """The cases by function name; cases without a name are under None."""
    if isinstance(given, dict):
        if not all(isinstance(listed, list | tuple) for listed in given.values()):
            raise UserError(f"CASES: expected {FORMS}, got {given!r:.80}")
        return {name: list(listed) for name, listed in given.items()}
    if not isinstance(given, list | tuple):
        raise UserError(f"CASES: expected {FORMS}, got {given!r:.80}")
    cases: dict[str | None, list[Any]] = {}
    for case in given:
        name = case.get("reward") if isinstance(case, dict) else None
        if isinstance(name, str):
            case = {key: value for key, value in case.items() if key != "reward"}
        cases.setdefault(name if isinstance(name, str) else None, []).append(case)
    return cases


def _read(path: Path) -> tuple[Any, Any]:
    """The cases in a file, and the module if the file is Python."""
    try:
        if path.suffix == ".py":
            module = load_file(f"cases {path}", path)
            if not hasattr(module, "CASES"):
                raise UserError(f"cases {path}: the file defines no CASES")
            return module.CASES, module
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()], None
        return json.loads(text), None
    except (OSError, ValueError) as error:
        raise UserError(f"cases {path}: cannot be read: {error}") from None
