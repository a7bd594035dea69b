"""The user's code that a run depends on: rewards, losses and loggers, and the modules that they import."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from grpo.plugins import named_rewards, named_tools, source_file
from grpo.runs.checkpoint import hash_of

INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))
"""Folders of Python and its packages. Their code is not hashed: checkpoints record the versions that matter."""


OURS = Path(__file__).resolve().parents[1]
STARTED_WITH = tuple(sys.path)
"""The module search path at startup, before loaded rewards add their folders to it."""


def source_hashes(uses: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each code file that a recipe `uses`, and of each file that these import, by `use` and file.

    Imports are found by parsing the code, not by running it: modules that it loads by other means and data files that
    it reads are not included.
    """
    hashes = {}
    for use in uses:
        file = source_file(use, lambda: [*named_rewards(), *named_tools()])
        if file is None or not file.is_file():
            continue
        hashes[use] = hash_of(file)
        hashes |= {f"{use}, {_short(path, file)}": hash_of(path) for path in imported_files(file)}
    return hashes


def imported_files(file: Path) -> list[Path]:
    """The files of the user's own modules that a code file imports, directly or indirectly. Excludes installed code."""
    file = file.resolve()
    top = _above_packages(file)
    roots = [file.parent, top, Path.cwd(), *(Path(entry).resolve() for entry in STARTED_WITH)]
    own = [root for root in dict.fromkeys(roots) if not _is_installed(root)]
    packages = [folder / "__init__.py" for folder in file.parents if folder != top and folder.is_relative_to(top)]
    seen, waiting = {file, *packages}, [file, *packages]
    if _is_installed(file):
        return []
    while waiting:
        found = _imports(waiting.pop(), own) - seen
        seen |= found
        waiting += found
    return sorted(seen - {file})


def _imports(file: Path, roots: Sequence[Path]) -> set[Path]:
    """The files that a file's import statements name, anywhere in the file."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):  # loading the function reports the error
        return set()
    found: set[Path] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(*(_module_files(alias.name.split("."), roots) for alias in node.names))
        elif isinstance(node, ast.ImportFrom):
            above = [file.parents[node.level - 1]] if 0 < node.level <= len(file.parents) else roots
            module = node.module.split(".") if node.module else []
            found.update(*(_module_files([*module, alias.name], above) for alias in node.names))
    return found


def _module_files(parts: Sequence[str], roots: Sequence[Path]) -> set[Path]:
    """The files of a dotted name below the first root that has any: the module's, and its packages' `__init__.py`."""
    for root in roots:
        found, folder = set(), root
        for part in parts:
            places = [folder / f"{part}.py", folder / part / "__init__.py"]
            found |= {place.resolve() for place in places if place.is_file()}
            folder = folder / part
        if found:
            return {path for path in found if not _is_installed(path) and not path.is_relative_to(OURS)}
    return set()


def _above_packages(file: Path) -> Path:
    """The folder that contains a module's top-level package; for a module outside packages, the module's folder."""
    folder = file.resolve().parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


def _is_installed(path: Path) -> bool:
    """Whether a file is in the package folders of this Python environment or any other."""
    path = path.resolve()
    installed = any(path.is_relative_to(folder) for folder in INSTALLED)
    return installed or bool({"site-packages", "dist-packages"} & set(path.parts)) or path.suffix == ".zip"


def _short(path: Path, beside: Path) -> str:
    """A path relative to the folder that the importing file's package is in; absolute if it is elsewhere."""
    folder = _above_packages(beside)
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
