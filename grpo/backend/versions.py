"""Versions of the packages that results depend on, and the versions that grpo was tested with.

Works without MLX, so that `grpo doctor` can report a missing MLX.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Mapping

from grpo import __version__
from grpo.errors import UserError

PACKAGES = ("mlx", "mlx-lm", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mkl", "numpy", "mlx-lm-lora", "trl")


def versions() -> dict[str, str]:
    """Installed versions of Python, grpo and the packages that measurements depend on."""
    found = {"python": platform.python_version(), "grpo": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def requirements() -> dict[str, str]:
    """grpo's version requirement of each package, without extras: `{"mlx-lm": "<0.33,>=0.32", "numpy": ""}`.

    Empty if grpo runs from a folder and is not installed.
    """
    try:
        lines = importlib.metadata.requires("grpo-mlx") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    matches = (re.fullmatch(r"\s*([\w.-]+)\s*\(?([^;()\[\]]*)\)?\s*", line) for line in lines)  # `;` begins a condition
    return {match[1]: match[2].replace(" ", "") for match in matches if match}


def untested(installed: Mapping[str, str], required: Mapping[str, str]) -> dict[str, str]:
    """Packages newer than any version that grpo was tested with, each with the first untested version."""
    limits = {name: re.search(r"<([\d.]+)", wanted) for name, wanted in required.items() if name in installed}
    return {name: limit[1] for name, limit in limits.items() if limit and numbers(installed[name]) >= numbers(limit[1])}


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparisons: `0.32.2.dev1+abc` is (0, 32, 2)."""
    match = re.match(r"[\d.]*", version)
    return tuple(int(part) for part in match.group().split(".") if part) if match else ()


def changed(package: str, error: ImportError) -> UserError:
    """The error for a user whose version of `package` lacks a name that grpo imports."""
    found = versions().get(package, "")
    wanted = f"{package}{requirements().get(package, '')}"
    return UserError(
        f"{package} {found} lacks something that grpo needs: {error}. Install a supported version: "
        f"pip install '{wanted}'"
    )
