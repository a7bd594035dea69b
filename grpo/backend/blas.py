"""A fast BLAS for MLX on a Linux CPU.

The CPU build of MLX brings the reference BLAS, some fifty times slower than a tuned one. A library with the
same symbols that is already in the process when `mlx.core` loads takes its place, so MKL (or OpenBLAS, where
there is no MKL) is opened here with `RTLD_GLOBAL`. This module imports nothing heavy: it runs on `import grpo`.
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
    """Open the best BLAS there is, unless MLX needs none or `GRPO_BLAS=off`. Never raises."""
    global _state
    _state = _preload()


def describe() -> str:
    """In one line, which BLAS serves MLX's matrix products on the CPU, and why."""
    return _state


def loaded() -> bool:
    """Whether a BLAS was opened in the place of the one in MLX's wheel."""
    return bool(_loaded)


def most_threads() -> int:
    """How many threads MKL takes for a product at most; 1 without it."""
    return int(_loaded[0].MKL_Get_Max_Threads()) if _is_mkl() else 1


def _is_mkl() -> bool:
    return bool(_loaded) and hasattr(_loaded[0], "MKL_Set_Num_Threads")


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let MKL, if it is there, use this number of threads for each product inside the block."""
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
    """One thread inside the block: faster where products are many and small."""
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
    # MKL's threads wait for work by spinning, for 200 ms unless told otherwise. On a machine with anything else to
    # do that makes small products three times slower; 1 ms costs large ones nothing.
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    # The same sums whatever the alignment and the number of threads, so that a resumed run is the same to the bit.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    for name, path in _candidates():
        try:
            library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            library.cblas_sgemm  # noqa: B018  a library without it would not serve MLX
        except (OSError, AttributeError):
            continue
        _loaded.append(library)
        return f"{name} ({Path(path).name})"
    return "the one in MLX's wheel, slow: install grpo-mlx[cpu] (MKL), or OpenBLAS"


def _candidates() -> Iterator[tuple[str, str]]:
    yield from (("MKL", path) for path in _mkl_paths())
    # Looked for only where MKL does not serve: it runs `ldconfig` or a compiler, most of the time of `import grpo`.
    from ctypes.util import find_library

    if openblas := find_library("openblas"):
        yield "OpenBLAS", openblas


def _mkl_paths() -> list[str]:
    """MKL as its wheel has it."""
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
    """The list of an installed wheel's files; None where there is no such wheel.

    To import `importlib.metadata` for it takes longer than all else of `import grpo`, which each worker waits for.
    """
    start = f"{distribution.replace('-', '_')}-"
    for folder in sys.path:
        with suppress(OSError):
            for name in os.listdir(folder or "."):
                if name.startswith(start) and name.endswith(".dist-info"):
                    return Path(folder, name, "RECORD")
    return None
