"""Where MLX keeps the kernels that it builds for an NVIDIA GPU.

By default that is the folder for temporary files, which many machines clear when they start. Each kernel takes seconds
to build, so here it is the user's cache folder.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

VARIABLE = "MLX_PTX_CACHE_DIR"
WHEELS = ("mlx-cuda-13", "mlx-cuda-12")
GPUS = Path("/proc/driver/nvidia/gpus")
RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def keep() -> None:
    """Set MLX's variable, unless it is set. Nothing happens without an NVIDIA GPU, or where the folder is read-only."""
    if VARIABLE in os.environ:
        return
    try:
        if (folder := _folder()) is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
    except (OSError, RuntimeError):  # the latter where a user has no home
        return
    if os.access(folder, os.W_OK):
        os.environ[VARIABLE] = str(folder)


def _folder() -> Path | None:
    """A folder for this MLX, this kind of GPU and this process of a run; None where MLX builds no such kernels.

    Kernels run on the kind of GPU that they were built for, and a home may be shared by machines. MLX's kernels are
    not written as a whole, so processes that start together must not share a folder.
    """
    models = sorted(
        {line for path in GPUS.glob("*/information") for line in path.read_text().splitlines() if "Model" in line}
    )
    wheel = next((found for name in WHEELS if (found := _version(name))), None)
    if not models or wheel is None:
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kind = "+".join("-".join(model.partition(":")[2].split()) for model in models)
    rank = next((os.environ[name] for name in RANKS if name in os.environ), "0")
    return cache / "grpo" / "kernels" / wheel / kind / rank


def _version(wheel: str) -> str | None:
    try:
        return f"{wheel}-{importlib.metadata.version(wheel)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def _tidy(folder: Path) -> None:
    """Remove kernels that were not written to the end, when a process was killed or the disk was full.

    MLX would fail on each of them for ever. It writes a kernel's source last.
    """
    for kernel in folder.rglob("*.ptx"):
        source = kernel.with_suffix(".cu")
        if not (source.is_file() and source.stat().st_size and kernel.stat().st_size):
            kernel.unlink(missing_ok=True)
