"""Turns names into things: a reward into its callable, a recipe's name into its file.

Bundled recipes and rewards lie in `recipes/` and `rewards/` at the top of a checkout, and inside the package in
a wheel. Ours enter by the same door as a researcher's.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.errors import UserError

Reward = Callable[..., Any]


def bundled(kind: str) -> Path:
    """The folder of bundled `recipes` or `rewards`, wherever the package was installed from."""
    package = Path(__file__).parent
    in_wheel = package / "_bundled" / kind
    return in_wheel if in_wheel.is_dir() else package.parent / kind


def bundled_names(kind: str, suffix: str) -> list[str]:
    """The names of the bundled `recipes` (`.yaml`) or `rewards` (`.py`), sorted."""
    return sorted(path.stem for path in bundled(kind).glob(f"*{suffix}"))


def find_recipe(name: str) -> Path:
    """A recipe's file: a path, or the name of a bundled one with or without `recipes/` and `.yaml`."""
    path = Path(name)
    if path.is_file():
        return path
    inside = bundled("recipes") / path.with_suffix(".yaml").name
    if path.parent in (Path(), Path("recipes")) and path.suffix in ("", ".yaml") and inside.is_file():
        return inside
    known = bundled_names("recipes", ".yaml")
    raise UserError(f"{name}: there is no such recipe.{_suggest(path.stem, known)} Bundled: {', '.join(known)}")


def find_reward(use: str) -> tuple[str, Reward]:
    """A reward's name and callable.

    `use` is a bundled name (its `reward` function), `file.py:function`, or
    `package.module:function`. Raises UserError for one that cannot be imported, and says why.
    """
    module_name, colon, function = use.partition(":")
    if not colon:
        path = bundled("rewards") / f"{use}.py"
        if not path.is_file():
            known = bundled_names("rewards", ".py")
            raise UserError(
                f"reward {use!r}: not a bundled name.{_suggest(use, known)} Bundled: {', '.join(known)}; "
                "your own: file.py:function or package.module:function"
            )
        return use, _attribute(use, _load_file(use, path), "reward")
    if module_name.endswith(".py"):
        return function, _attribute(use, _load_file(use, Path(module_name)), function)
    return function, _attribute(use, _import(use, lambda: importlib.import_module(module_name)), function)


def _load_file(use: str, path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"reward {use!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"grpo_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a module up by its name
    loader = spec.loader
    _import(use, lambda: loader.exec_module(module))
    return module


def _import(use: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # other people's code: whatever it raises is theirs to see
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename}:{frame.lineno}"
        raise UserError(f"reward {use!r}: cannot be imported: {type(error).__name__}: {error} ({where})") from error


def _attribute(use: str, module: Any, function: str) -> Reward:
    found = getattr(module, function, None)
    if not callable(found):
        functions = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
        raise UserError(f"reward {use!r}: no function {function!r} there.{_suggest(function, functions)}")
    reward: Reward = found
    return reward


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
