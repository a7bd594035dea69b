"""The code of the user's own that a run depends on: rewards, losses and loggers, and the modules that they import."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from grpo.plugins import named_rewards, named_tools, source_file
from grpo.runs.checkpoint import hash_of

INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))
"""Where Python and its packages lie. Their versions are another matter: a run notes those that numbers depend on."""


OURS = Path(__file__).resolve().parents[1]
STARTED_WITH = tuple(sys.path)
"""Where modules are looked for, before rewards that are loaded add the folders that they lie in."""


def source_hashes(uses: Iterable[str]) -> dict[str, str]:
    """A SHA-256 for each file of code that a recipe `uses`, and for each that those import, by `use` and file.

    Imports are read from the code, which is not run: modules that it loads by other means, and data files that it
    reads, are not seen.
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
    """The files of the user's own modules that a file of code imports, directly or not: no installed package's."""
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
    """The files that a file's import statements name, wherever they stand in it."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):  # it is said where the function is asked for
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
    """The files of a dotted name below the first root that has one: a module's, and its packages' `__init__.py`."""
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
    """The folder that a module's own package, with all packages around it, is imported from."""
    folder = file.resolve().parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


def _is_installed(path: Path) -> bool:
    """Whether in Python's own folders, this environment's, or any other's."""
    path = path.resolve()
    installed = any(path.is_relative_to(folder) for folder in INSTALLED)
    return installed or bool({"site-packages", "dist-packages"} & set(path.parts)) or path.suffix == ".zip"


def _short(path: Path, beside: Path) -> str:
    """A path as seen from the file that imports it, where it lies below the same folder."""
    folder = _above_packages(beside)
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
