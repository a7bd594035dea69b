"""Imports of other packages without unwanted dependencies, and errors for missing extras."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from grpo.errors import UserError


@contextmanager
def unseen(name: str) -> Iterator[None]:
    """Hide the optional package `name` from imports inside the block, as if it were not installed.

    A package that is already imported stays imported. After the block the package can be imported as usual.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # Python's mark for a module that cannot be imported
    try:
        yield
    finally:
        sys.modules.pop(name, None)


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """A block with imports that need the extra `name` of this package. Raises UserError, which says that `what` needs
    the extra, if it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "grpo":
            raise
        raise UserError(f"{what} needs {error.name}, which is not installed: pip install 'grpo-mlx[{name}]'") from None


def alone(name: str) -> ModuleType:
    """Import the module `name` without running the `__init__` of its packages.

    Afterward nothing of the outermost package is in `sys.modules`: a later import of the package works as usual, and
    creates a separate copy of this module. If the package is already imported, or the module needs it, this is an
    ordinary import.
    """
    packages = [name[:end] for end, letter in enumerate(name) if letter == "."]
    outermost = packages[0]
    if outermost in sys.modules or (spec := importlib.util.find_spec(outermost)) is None or not spec.origin:
        return importlib.import_module(name)
    try:
        for package in packages:
            sys.modules[package] = bare = ModuleType(package)
            bare.__path__ = [str(Path(spec.origin).parent.joinpath(*package.split(".")[1:]))]
        with suppress(Exception):
            return importlib.import_module(name)
    finally:
        _forget(outermost)
    return importlib.import_module(name)


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
