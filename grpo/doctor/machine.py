"""The machine: device and memory, matrix products, a compiler, and a sandbox for code."""

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
"""Of the memory; macOS lets a GPU wire two thirds or more unless it was told otherwise."""
PRODUCT = 1024
SLOW_GFLOPS = 10.0
"""The BLAS of MLX's wheel reaches about 5, a tuned one on a single core 50 and more."""


@dataclass(frozen=True, slots=True)
class Device:
    """What MLX computes on. Sizes in bytes; `working_set` is what Metal recommends to hold at most.

    `nvidia` says whether the machine has NVIDIA's driver, and `cuda_build` whether MLX was installed for it.
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
    """What MLX computes on, and whether the machine has something better."""
    here = facts()
    text = f"{here.kind}: {here.name}, {gigabytes(here.memory)}, {here.cores} CPU cores"
    if here.kind != "cpu":
        return Finding("device", "ok", text)
    if here.cuda_build:
        text += "; MLX is built for CUDA and sees no GPU"
        return Finding("device", "warn", text, "see whether `nvidia-smi` lists one, and CUDA_VISIBLE_DEVICES")
    if here.nvidia:
        text += "; there is an NVIDIA driver, and MLX is not built for it"
        remedy = "pip uninstall -y mlx mlx-cpu, then install grpo-mlx[cuda13] (or [cuda12], by what `nvidia-smi` says)"
        return Finding("device", "warn", text, remedy)
    return Finding("device", "ok", text)


def wire(size: int) -> None:
    """Let MLX wire so many bytes, then as many as before."""
    import mlx.core as mx

    mx.set_wired_limit(mx.set_wired_limit(size))


def wired_limit(facts: Callable[[], Device] = this_device, wire: Callable[[int], None] = wire) -> Finding:
    """How much memory Metal may keep in place; what is beyond may be paged out, and comes back slowly."""
    here = facts()
    if here.kind != "metal" or here.working_set is None:
        return Finding("wired limit", "ok", "only Metal has one")
    text = f"Metal may hold {gigabytes(here.working_set)} of {gigabytes(here.memory)}"
    try:
        wire(here.working_set)
    except (ValueError, RuntimeError) as error:
        return Finding("wired limit", "warn", f"{text}, but MLX cannot wire it: {error}", "macOS 15 or newer can")
    if here.working_set < WIRED_FRACTION * here.memory:
        more = int(0.75 * here.memory / 2**20)
        return Finding("wired limit", "warn", text, f"more: sudo sysctl iogpu.wired_limit_mb={more}")
    return Finding("wired limit", "ok", text)


@dataclass(frozen=True, slots=True)
class MatrixProducts:
    """Who computes matrix products, whether it is a tuned library, and how fast it was just now."""

    by: str
    tuned: bool
    gflops: float


def products() -> MatrixProducts:
    tuned = on_gpu() or sys.platform == "darwin" or backend.loaded()
    return MatrixProducts("the GPU" if on_gpu() else backend.describe(), tuned, product_gflops())


def product_gflops(runs: int = 3) -> float:
    """10⁹ floating-point operations a second in a float32 product, the best of some runs after a first one."""
    import mlx.core as mx

    a, seconds = mx.random.normal((PRODUCT, PRODUCT), key=mx.random.key(0)), []
    mx.eval(a @ a)
    for _ in range(runs):
        begun = time.perf_counter()
        mx.eval(a @ a)
        seconds.append(time.perf_counter() - begun)
    return 2 * PRODUCT**3 / min(seconds) / 1e9


def blas(facts: Callable[[], MatrixProducts] = products) -> Finding:
    """Who computes matrix products, and how fast."""
    here = facts()
    text = f"{here.by}; a {PRODUCT} × {PRODUCT} float32 product runs at {here.gflops:,.0f} GFLOP/s"
    if here.tuned and here.gflops >= SLOW_GFLOPS:
        return Finding("blas", "ok", text)
    remedy = f"{install('cpu')} (brings MKL) or install OpenBLAS (libopenblas0), and leave GRPO_BLAS unset"
    return Finding("blas", "warn", f"{text}: slow", remedy)


def compiler(gpu: Callable[[], bool] = on_gpu, find: Callable[[str], str | None] = shutil.which) -> Finding:
    """The C++ compiler that `mx.compile` calls on a CPU. Nothing depends on it, because grpo compiles nothing there."""
    if gpu():
        return Finding("compiler", "ok", "none is needed on a GPU")
    if (found := find("g++")) is None:
        text = "no g++, which `mx.compile` wants on a CPU; grpo needs none, since it compiles nothing there"
        return Finding("compiler", "ok", text)
    return Finding("compiler", "ok", f"{found}; grpo needs none on a CPU, since it compiles nothing there")


SANDBOXED = "python_tests, the tool python and environments with sandbox: true"


def sandbox(missing: Callable[[], str | None] = missing) -> Finding:
    """Whether code that a model wrote, and environments, can be isolated."""
    if (why := missing()) is None:
        return Finding("sandbox", "ok", f"{SANDBOXED} can be isolated")
    remedy = (
        "allow user namespaces (in Docker: --security-opt seccomp=unconfined), or give python_tests and the tool "
        "python {unsafe: true}, and the environments sandbox: false"
    )
    return Finding("sandbox", "warn", f"{SANDBOXED} refuse to start: {why}", remedy)
