"""The machine: which BLAS serves, and random keys."""

import ctypes.util
import importlib.metadata
import os
import platform
import subprocess
import sys

import mlx.core as mx
import pytest

from grpo.backend import blas, device
from grpo.backend.random import derive_key

LINUX_CPU = sys.platform == "linux" and not device.on_gpu()


def python(code: str, **env: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


SHOW = "import {first}, {second}; from grpo.backend import blas; print(blas.describe())"


@pytest.mark.skipif(not LINUX_CPU, reason="BLAS is preloaded on a Linux CPU alone")
@pytest.mark.parametrize("first", ["grpo", "grpo.config", "grpo.model.policy"])
def test_a_fast_blas_is_loaded_before_mlx(first: str) -> None:
    said = python(SHOW.format(first=first, second="mlx.core"))
    assert said.startswith(("MKL (libmkl_rt", "OpenBLAS ("))


@pytest.mark.skipif(not LINUX_CPU, reason="BLAS is preloaded on a Linux CPU alone")
def test_it_serves_mlx() -> None:
    """MKL loads its kernels at the first product: then they are among the process's libraries."""
    code = (
        "import grpo, mlx.core as mx; a = mx.random.normal((64, 64)); mx.eval(a @ a);"
        "print('libmkl_core' in open('/proc/self/maps').read())"
    )
    if "MKL" in python(SHOW.format(first="grpo", second="mlx.core")):
        assert python(code) == "True"
        assert python(code, GRPO_BLAS="off") == "False"


@pytest.mark.skipif(not LINUX_CPU, reason="BLAS is preloaded on a Linux CPU alone")
def test_it_can_be_switched_off() -> None:
    assert "GRPO_BLAS=off" in python(SHOW.format(first="grpo", second="mlx.core"), GRPO_BLAS="off")


@pytest.mark.skipif(not LINUX_CPU, reason="BLAS is preloaded on a Linux CPU alone")
def test_coming_too_late_is_said() -> None:
    assert "import grpo first" in python(SHOW.format(first="mlx.core", second="grpo"))


def test_openblas_is_not_looked_for_where_mkl_is(monkeypatch) -> None:
    """To look for it runs other programs: `import grpo` would wait for them."""
    monkeypatch.setattr(blas, "_mkl_paths", lambda: ["libmkl_rt.so"])
    monkeypatch.setattr(ctypes.util, "find_library", lambda _: pytest.fail("it was looked for"))
    assert next(iter(blas._candidates())) == ("MKL", "libmkl_rt.so")


@pytest.mark.parametrize("name", ["mkl", "mlx", "mlx-lm", "mlx-cuda-12", "no-such-package"])
def test_the_files_of_a_wheel_are_found_without_importing_what_reads_them(name: str) -> None:
    record = blas._record(name)
    assert (record is not None) == blas.installed(name)
    if record is not None:
        listed = {str(path) for path in importlib.metadata.files(name) or []}
        assert {line.partition(",")[0] for line in record.read_text().splitlines()} == listed


def test_none_to_be_had_is_said(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "mlx.core")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(blas, "_candidates", lambda: [("MKL", "/nowhere/libmkl_rt.so")])
    monkeypatch.setattr(blas, "_record", lambda _: None)
    monkeypatch.delenv("GRPO_BLAS", raising=False)
    assert "install grpo-mlx[cpu]" in blas._preload()


def test_the_device_in_one_line() -> None:
    line = device.describe()
    assert "\n" not in line
    assert "MLX" in line
    assert device.on_gpu() or blas.describe() in line


def test_keys_depend_on_seed_purpose_and_position() -> None:
    keys = [derive_key(*args).tolist() for args in [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", 1, 2)]]
    assert len({tuple(key) for key in keys}) == 5
    assert mx.array_equal(derive_key(0, "a", 1), derive_key(0, "a", 1))


@pytest.mark.parametrize("word", ["memory_size", "total_memory"])
def test_memory_is_the_gpus_where_there_is_one(monkeypatch, word: str) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "a GPU", word: 24 * 2**30})
    assert device.memory_bytes() == 24 * 2**30


def test_of_a_macs_memory_counts_what_metal_lends(monkeypatch) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    said = {"memory_size": 16 * 2**30, "max_recommended_working_set_size": 11 * 2**30}
    monkeypatch.setattr(mx, "device_info", lambda: said)
    assert device.memory_bytes() == 11 * 2**30


@pytest.mark.parametrize(("said", "allowed"), [(str(2**28), 2**28), ("max", None), (str(2**62), None)])
def test_memory_is_the_containers_where_it_has_less(monkeypatch, tmp_path, said: str, allowed: int | None) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    monkeypatch.setattr(device, "MEMORY_LIMITS", (str(tmp_path / "limit"), str(tmp_path / "none")))
    machine = device.memory_bytes()
    (tmp_path / "limit").write_text(f"{said}\n")
    assert device.memory_bytes() == (allowed or machine)


def test_a_limit_of_memory_holds_until_there_is_none() -> None:
    own = mx.set_memory_limit(2**33), mx.set_cache_limit(2**32)
    try:
        device.limit_memory(None)  # nothing was set
        device.limit_memory(2**31)
        device.limit_memory(2**30)
        assert (mx.set_memory_limit(2**30), mx.set_cache_limit(2**30)) == (2**30, 2**30)
        device.limit_memory(None)
        assert (mx.set_memory_limit(2**33), mx.set_cache_limit(2**32)) == (2**33, 2**32)
    finally:
        mx.set_memory_limit(own[0])
        mx.set_cache_limit(own[1])


@pytest.mark.skipif(sys.platform != "linux", reason="Metal has a limit of its own")
def test_batches_on_cuda_are_limited_before_mlx_is_imported_unless_the_user_did() -> None:
    show = "import grpo, os, sys; assert 'mlx.core' not in sys.modules; print(os.environ['MLX_MAX_MB_PER_BUFFER'])"
    assert python(show) == device.BATCH_MEGABYTES
    assert python(show, MLX_MAX_MB_PER_BUFFER="7") == "7"


@pytest.mark.skipif(not LINUX_CPU or platform.libc_ver()[0] != "glibc", reason="glibc keeps what MLX frees on a CPU")
def test_memory_that_is_freed_serves_the_next_arrays() -> None:
    """Counts page faults of six arrays at a time, each of 24 MB or 6,144 pages."""
    code = (
        "import grpo, resource, mlx.core as mx; from grpo.backend.device import setup; {setup}\n"
        "def work():\n"
        "    for _ in range(3): mx.eval([mx.zeros((3, 2**21)) + i for i in range(6)])\n"
        "work(); before = resource.getrusage(0).ru_minflt; work()\n"
        "print(resource.getrusage(0).ru_minflt - before)"
    )
    fixed = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # or glibc would move its own limits, now and then far enough
    kept, given_back = (int(python(code.format(setup=setup), **fixed)) for setup in ("setup()", ""))
    assert kept < 1000 < given_back
