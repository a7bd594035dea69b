"""Checks of the machine: device and memory, matrix products, compiler, and sandbox."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from grpo.backend import blas as backend
from grpo.backend.device import cpu_cores, memory_bytes, on_gpu
from grpo.backend.imports import install
from grpo.backend.versions import versions
from grpo.doctor.finding import Finding, gigabytes
from grpo.processes.sandbox.runner import missing

WIRED_FRACTION = 0.6
"""Expected share of the memory that can be wired: by default, macOS lets a GPU wire two thirds or more."""
PRODUCT = 1024
SLOW_GFLOPS = 10.0
"""Threshold for slow products. The BLAS of MLX's wheel reaches about 5, a tuned BLAS on a single core at least 50."""


@dataclass(frozen=True, slots=True)
class Device:
    """The device on which MLX computes. Sizes are in bytes.

    `working_set` is Metal's recommended maximum of memory in use. `nvidia`: the machine has NVIDIA's driver.
    `cuda_build`: the installed MLX is a CUDA build.
    """

    kind: Literal["cpu", "cuda", "metal"]
    name: str
    memory: int
    cores: int
    working_set: int | None = None
    nvidia: bool = False
    cuda_build: bool = False


def this_device() -> Device:
    import mlx.core as mx

    info: dict[str, Any] = mx.device_info()
    return Device(
        kind="cpu" if not on_gpu() else "metal" if mx.metal.is_available() else "cuda",
        name=str(info.get("device_name", "unknown")),
        memory=memory_bytes(),
        cores=cpu_cores(),
        working_set=info.get("max_recommended_working_set_size"),
        nvidia=shutil.which("nvidia-smi") is not None,
        cuda_build=not versions().keys().isdisjoint(backend.GPU_BUILDS),
    )


def device(facts: Callable[[], Device] = this_device) -> Finding:
    """Check on which device MLX computes, and whether the machine has a better device."""
    here = facts()
    text = f"{here.kind}: {here.name}, {gigabytes(here.memory)}, {here.cores} CPU cores"
    if here.kind != "cpu":
        return Finding("device", "ok", text)
    if here.cuda_build:
        text += "; MLX is built for CUDA but sees no GPU"
        return Finding("device", "warn", text, "check that `nvidia-smi` lists a GPU, and check CUDA_VISIBLE_DEVICES")
    if here.nvidia:
        text += "; there is an NVIDIA driver, but MLX is not built for CUDA"
        remedy = "pip uninstall -y mlx mlx-cpu, then install grpo-mlx[cuda13] (or [cuda12], according to `nvidia-smi`)"
        return Finding("device", "warn", text, remedy)
    return Finding("device", "ok", text)


def wire(size: int) -> None:
    """Set MLX's wired limit to `size` bytes, and then restore it."""
    import mlx.core as mx

    mx.set_wired_limit(mx.set_wired_limit(size))


def wired_limit(facts: Callable[[], Device] = this_device, wire: Callable[[int], None] = wire) -> Finding:
    """Check how much memory Metal may wire. Memory beyond this limit may be paged out, which is slow."""
    here = facts()
    if here.kind != "metal" or here.working_set is None:
        return Finding("wired limit", "ok", "only Metal has a wired limit")
    text = f"Metal may wire {gigabytes(here.working_set)} of {gigabytes(here.memory)}"
    try:
        wire(here.working_set)
    except (ValueError, RuntimeError) as error:
        return Finding("wired limit", "warn", f"{text}, but MLX cannot wire it: {error}", "update to macOS 15 or newer")
    if here.working_set < WIRED_FRACTION * here.memory:
        more = int(0.75 * here.memory / 2**20)
        return Finding("wired limit", "warn", text, f"raise it: sudo sysctl iogpu.wired_limit_mb={more}")
    return Finding("wired limit", "ok", text)


@dataclass(frozen=True, slots=True)
class MatrixProducts:
    """What computes matrix products, whether it is a tuned library, and its measured speed."""

    by: str
    tuned: bool
    gflops: float


def products() -> MatrixProducts:
    tuned = on_gpu() or sys.platform == "darwin" or backend.loaded()
    return MatrixProducts("the GPU" if on_gpu() else backend.describe(), tuned, product_gflops())


def product_gflops(runs: int = 3) -> float:
    """Measure a float32 product in GFLOP/s: the best of `runs` runs after a warm-up run."""
    import mlx.core as mx

    a, seconds = mx.random.normal((PRODUCT, PRODUCT), key=mx.random.key(0)), []
    mx.eval(a @ a)
    for _ in range(runs):
        begun = time.perf_counter()
        mx.eval(a @ a)
        seconds.append(time.perf_counter() - begun)
    return 2 * PRODUCT**3 / min(seconds) / 1e9


def blas(facts: Callable[[], MatrixProducts] = products) -> Finding:
    """Check what computes matrix products, and how fast."""
    here = facts()
    text = f"{here.by}; a {PRODUCT} × {PRODUCT} float32 product runs at {here.gflops:,.0f} GFLOP/s"
    if here.tuned and here.gflops >= SLOW_GFLOPS:
        return Finding("blas", "ok", text)
    remedy = f"{install('cpu')} (with MKL), or install OpenBLAS (libopenblas0), and leave GRPO_BLAS unset"
    return Finding("blas", "warn", f"{text}: slow", remedy)


def compiler(gpu: Callable[[], bool] = on_gpu, find: Callable[[str], str | None] = shutil.which) -> Finding:
    """Report the C++ compiler that `mx.compile` calls on a CPU. Always ok, because grpo compiles nothing on a CPU."""
    if gpu():
        return Finding("compiler", "ok", "not needed on a GPU")
    if (found := find("g++")) is None:
        text = "no g++, which `mx.compile` needs on a CPU; grpo does not need it, because it compiles nothing there"
        return Finding("compiler", "ok", text)
    return Finding("compiler", "ok", f"{found}; grpo does not need it on a CPU, because it compiles nothing there")


SANDBOXED = "python_tests, the tool python and environments with sandbox: true"


def sandbox(missing: Callable[[], str | None] = missing) -> Finding:
    """Check whether the model's code, and environments, can be sandboxed."""
    if (why := missing()) is None:
        return Finding("sandbox", "ok", f"{SANDBOXED} can be isolated")
    remedy = (
        "allow user namespaces (in Docker: --security-opt seccomp=unconfined), or set {unsafe: true} for python_tests "
        "and the tool python, and sandbox: false for environments"
    )
    return Finding("sandbox", "warn", f"{SANDBOXED} refuse to start: {why}", remedy)
