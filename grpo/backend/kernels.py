"""Sets the folder where MLX stores the kernels that it builds for an NVIDIA GPU.

MLX's default is the folder for temporary files, which many machines clear at startup. Each kernel takes seconds to
build, so grpo uses the user's cache folder.
"""

from __future__ import annotations

import fcntl
import os
from itertools import count
from pathlib import Path
from typing import TextIO

from grpo.backend.cache import cache_folder
from grpo.backend.launched import LAUNCHED

VARIABLE = "MLX_PTX_CACHE_DIR"
WHEELS = ("mlx-cuda-13", "mlx-cuda-12")
GPUS = Path("/proc/driver/nvidia/gpus")
_locks: list[TextIO] = []
"""Locked files, open as long as this process runs."""


def keep() -> None:
    """Set MLX's variable, unless it is set. Does nothing without an NVIDIA GPU, or if the folder cannot be written."""
    if VARIABLE in os.environ:
        return
    try:
        if (folder := _folder()) is not None:
            folder = _unused(folder)
            _tidy(folder)
            os.environ[VARIABLE] = str(folder)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        return


def _folder() -> Path | None:
    """The folder for this version of MLX, this GPU model and this process of a run; None if MLX builds no such kernels.

    Kernels run only on the GPU model that they were built for, and several machines may share a home folder. MLX does
    not write kernels atomically, so processes that start together must not share a folder.
    """
    models = sorted(
        {line for path in GPUS.glob("*/information") for line in path.read_text().splitlines() if "Model" in line}
    )
    wheel = next((found for name in WHEELS if (found := _version(name))), None) if models else None
    if wheel is None:
        return None
    kind = "+".join("-".join(model.partition(":")[2].split()) for model in models)
    rank = next((os.environ[name] for name in LAUNCHED if name in os.environ), "0")
    return cache_folder().absolute() / "kernels" / wheel / kind / rank


def _unused(folder: Path) -> Path:
    """Create and lock the folder, or the first of `0-1`, `0-2`, and so on, that no running process has locked.

    Two runs on one machine may build the same kernel simultaneously, and MLX fails on a half-written kernel.
    """
    for number in count():
        place = folder.with_name(f"{folder.name}-{number}") if number else folder
        place.mkdir(parents=True, exist_ok=True)
        lock = (place / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        except OSError:  # a file system without locks
            lock.close()
            return place
        _locks.append(lock)
        return place
    raise AssertionError("unreachable: count() is infinite")


def _version(wheel: str) -> str | None:
    import importlib.metadata

    try:
        return f"{wheel}-{importlib.metadata.version(wheel)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def _tidy(folder: Path) -> None:
    """Remove incomplete kernels, which remain after a process was killed or the disk was full.

    MLX would fail on them every time. It writes a kernel's source last.
    """
    for kernel in folder.rglob("*.ptx"):
        source = kernel.with_suffix(".cu")
        if not (source.is_file() and source.stat().st_size and kernel.stat().st_size):
            kernel.unlink(missing_ok=True)
