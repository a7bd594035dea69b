"""The cases that a reward must get right, where they are written: in its own file, or in one beside it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.errors import UserError
from grpo.plugins import Located, load_file

FORMS = "a list of cases, or a dictionary of such lists by function"


def find_cases(
    function: Callable[..., Any] | None, located: Located, file: str | None
) -> tuple[list[Any], Callable[[], Any]]:
    """The cases of `function` (None: of a model), and the context manager that gives them arguments.

    They are the `CASES` of its own module, or those of `file`: Python with `CASES`, JSON, or JSON lines. Cases that
    belong to one of several functions name it: as keys of a dictionary of lists, or each under `reward`. Raises
    UserError for a file that has none, and for a name that is no function of the module.
    """
    own = None if function is None else sys.modules.get(function.__module__)
    if file is None:
        given, module = getattr(own, "CASES", []), own
    else:
        given, module = _read(Path(file))
    cases = _by_function(given)
    if file is None and (unknown := [name for name in cases if name is not None and not hasattr(own, name)]):
        raise UserError(f"CASES: there are cases for {unknown[0]!r}, and the file has no function of that name")
    names = {None, located.where.rpartition(":")[2], located.name}
    found = [case for name, listed in cases.items() if name in names for case in listed]
    return found, getattr(module, "case_kwargs", contextlib.nullcontext)


def _by_function(given: Any) -> dict[str | None, list[Any]]:
    """The cases under the names of their functions, None for those without."""
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
    """What a file of cases holds, and its module if it is Python."""
    try:
        if path.suffix == ".py":
            module = load_file(f"cases {path}", path)
            if not hasattr(module, "CASES"):
                raise UserError(f"cases {path}: there is no CASES in it")
            return module.CASES, module
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()], None
        return json.loads(text), None
    except (OSError, ValueError) as error:
        raise UserError(f"cases {path}: cannot be read: {error}") from None
