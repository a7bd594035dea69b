"""Versions of what measurements depend on. Works without MLX, so that `grpo doctor` can tell that it is not there."""

from __future__ import annotations

import importlib.metadata
import platform

from grpo import __version__

PACKAGES = ("mlx", "mlx-lm", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mkl", "numpy", "mlx-lm-lora", "trl")


def versions() -> dict[str, str]:
    """Versions of what the measurements depend on, of the packages that are installed."""
    found = {"python": platform.python_version(), "grpo": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
