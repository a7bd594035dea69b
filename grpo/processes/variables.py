"""The environment of a worker process: the trainer's, without secrets that the recipe does not name."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from grpo.backend.secrets import is_secret
from grpo.errors import UserError

VARIABLE = "_env"
"""Suffix of arguments whose value names an environment variable that the reward reads, such as `api_key_env` of
`llm_judge`."""


def environment(names: Collection[str]) -> dict[str, str]:
    """The variables of this process, without the secrets that are not in `names`."""
    return {name: value for name, value in os.environ.items() if name in names or not is_secret(name)}


def with_hint(error: str, environment: Mapping[str, str]) -> str:
    """A worker's error, with a hint if it names a variable that is not in the worker's `environment`."""
    what, newline, rest = error.partition("\n")
    hidden = [name for name in re.findall(r"\w+", what) if name in os.environ and name not in environment]
    if not hidden:
        return error
    why = f"{hidden[0]} is set, but the process gets no secrets that `env` does not name: env: [{hidden[0]}]"
    return f"{what} ({why}){newline}{rest}"


def named_variables(env: Collection[str], where: str, kwargs: Mapping[str, Any]) -> set[str]:
    """The variables that a recipe names for a reward: in its `env`, and in arguments such as `api_key_env`.

    `where` is `file.py:function`; the defaults of the function's arguments count too. Raises UserError for a variable
    in `env` that is not set.
    """
    if missing := [name for name in env if name not in os.environ]:
        raise UserError(f"env: the environment has no variable {missing[0]}")
    given = {**_defaults(where), **kwargs}
    return {*env, *(value for name, value in given.items() if name.endswith(VARIABLE) and isinstance(value, str))}


def _defaults(where: str) -> dict[str, Any]:
    """The constant defaults of a function's arguments, read without importing it; empty if it is not in a file."""
    file, _, name = where.rpartition(":")
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, ValueError, SyntaxError):  # a module, or a file whose import will fail with an error
        return {}
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    arguments = [node.args for node in found if node.name == name]
    return {
        argument.arg: default.value
        for signature in arguments
        for argument, default in [
            *zip(reversed([*signature.posonlyargs, *signature.args]), reversed(signature.defaults), strict=False),
            *zip(signature.kwonlyargs, signature.kw_defaults, strict=True),
        ]
        if isinstance(default, ast.Constant)
    }
