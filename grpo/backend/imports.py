"""What the imports of other packages bring along."""

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
    """Let imports inside the block do without the optional package `name`, as if it were not installed.

    A package that is already imported stays. After the block it can be imported as always.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # Python's own mark of what cannot be imported
    try:
        yield
    finally:
        sys.modules.pop(name, None)


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """A block with imports that need the extra `name` of this package. Raises UserError, which says that `what` needs
    it, where it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "grpo":
            raise
        raise UserError(f"{what} needs {error.name}, which is not installed: {install(name)}") from None


def install(name: str) -> str:
    """The command that installs this package with the extra `name`: from its checkout, if it runs from one."""
    root = Path(__file__).resolve().parents[2]
    checkout = (root / "pyproject.toml").is_file()
    return f"pip install -e '{root}[{name}]'" if checkout else f"pip install 'grpo-mlx[{name}]'"


def alone(name: str) -> ModuleType:
    """The module `name`, without what the packages around it import when they are imported.

    Afterward nothing of the outermost package is in `sys.modules`: it can be imported as always, and has a module of
    its own for this one. Where it is there already, or the module cannot do without it, the import is a usual one.
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
