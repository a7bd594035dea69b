"""A fast BLAS for MLX on a Linux CPU.

The CPU build of MLX contains the reference BLAS, about fifty times slower than a tuned BLAS. A library with the same
symbols that is loaded before `mlx.core` replaces it, so MKL (or OpenBLAS, if MKL is missing) is opened here with
`RTLD_GLOBAL`. This module imports nothing heavy: it runs on `import grpo`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

GPU_BUILDS = ("mlx-cuda-12", "mlx-cuda-13")

_state = "not looked for"
_loaded: list[ctypes.CDLL] = []


def preload() -> None:
    """Open the best available BLAS, unless MLX needs none or `GRPO_BLAS=off`. Never raises."""
    global _state
    _state = _preload()


def describe() -> str:
    """One line that says which BLAS MLX uses for matrix products on the CPU, and why."""
    return _state


def loaded() -> bool:
    """Whether a BLAS was opened that replaces the BLAS in MLX's wheel."""
    return bool(_loaded)


def most_threads() -> int:
    """The largest number of threads that MKL uses for a product; 1 without MKL."""
    return int(_loaded[0].MKL_Get_Max_Threads()) if _is_mkl() else 1


def _is_mkl() -> bool:
    return bool(_loaded) and hasattr(_loaded[0], "MKL_Set_Num_Threads")


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Set MKL's number of threads per product inside the block. Does nothing without MKL."""
    if not _is_mkl():
        yield
        return
    former = _loaded[0].MKL_Get_Max_Threads()
    _loaded[0].MKL_Set_Num_Threads(number)
    try:
        yield
    finally:
        _loaded[0].MKL_Set_Num_Threads(former)


def one_thread(wanted: bool = True) -> AbstractContextManager[None]:
    """Use one thread inside the block, which is faster for many small products."""
    return threads(1) if wanted else nullcontext()


def _preload() -> str:
    if sys.platform != "linux":
        return "Accelerate (macOS)"
    if any(_record(name) for name in GPU_BUILDS):
        return "none needed (CUDA build of MLX)"
    if os.environ.get("GRPO_BLAS", "").lower() == "off":
        return "the one in MLX's wheel (GRPO_BLAS=off)"
    if "mlx.core" in sys.modules:
        return "the one in MLX's wheel: mlx was imported before grpo; import grpo first for a faster one"
    # MKL's threads wait for work by spinning, by default for 200 ms. On a machine with other work this makes small
    # products three times slower; 1 ms costs large products nothing.
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    # Sums that do not depend on alignment and number of threads, so that a resumed run is identical to the bit.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    for name, path in _candidates():
        try:
            library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            library.cblas_sgemm  # noqa: B018  MLX needs this symbol
        except (OSError, AttributeError):
            continue
        _loaded.append(library)
        return f"{name} ({Path(path).name})"
    return "the one in MLX's wheel, slow: install grpo-mlx[cpu] (MKL), or OpenBLAS"


def _candidates() -> Iterator[tuple[str, str]]:
    yield from (("MKL", path) for path in _mkl_paths())
    # Only if MKL is missing: `find_library` runs `ldconfig` or a compiler, most of the time of `import grpo`.
    from ctypes.util import find_library

    if openblas := find_library("openblas"):
        yield "OpenBLAS", openblas


def _mkl_paths() -> list[str]:
    """The paths of MKL's library in its wheel."""
    record = _record("mkl")
    if record is None or not record.is_file():
        return []
    paths = [line.partition(",")[0] for line in record.read_text(encoding="utf-8").splitlines()]
    return [str(record.parents[1] / path) for path in paths if path.rpartition("/")[2].startswith("libmkl_rt.so")]


def installed(distribution: str) -> bool:
    """Whether a package is installed, by its name on the package index."""
    import importlib.metadata

    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _record(distribution: str) -> Path | None:
    """The file that lists an installed wheel's files; None if the wheel is not installed.

    Importing `importlib.metadata` instead takes longer than the rest of `import grpo`, which every worker waits for.
    """
    start = f"{distribution.replace('-', '_')}-"
    for folder in sys.path:
        with suppress(OSError):
            for name in os.listdir(folder or "."):
                if name.startswith(start) and name.endswith(".dist-info"):
                    return Path(folder, name, "RECORD")
    return None
