"""Arrays in the host's memory that a CUDA device reads and writes directly while it computes.

MLX has no such memory: arrays of its CPU stream are in managed memory, which the driver may keep on the device and
which MLX counts as the device's. So grpo requests page-locked memory from the driver, and its own kernels copy to and
from it, at the speed of the bus.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from math import prod
from pathlib import Path

import mlx.core as mx

from grpo.backend.cuda import kernel
from grpo.errors import UserError

PIECE = 64 * 2**20
"""Bytes that are locked at a time."""
MOST = 2**42
"""Bytes of reserved addresses, more than any machine's memory. Reserved addresses take no memory until they are locked.
"""
NO_RESERVE = 0x4000
"""Linux's `MAP_NORESERVE`: memory counts only when it is used. Python has no name for it before 3.13."""
ALIGNED = 256
LEAST = 2**30
"""Bytes of the machine's memory that must stay free: Linux kills a process that locks the last of it."""
SETTING = "optim.offload_activations"
BLOCKS, THREADS = 64, 512
"""Size of a copy kernel: enough to keep the bus busy, and few enough for other kernels to run meanwhile."""
PORTABLE = 1
"""The driver's `CU_MEMHOSTREGISTER_PORTABLE`: memory is locked for all contexts of this process."""

SAME_ADDRESSES = 91
"""The driver's attribute for whether a device accesses locked memory by the host's addresses."""

COPY = """
    size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x, step = (size_t)gridDim.x * blockDim.x;
    const char* from = (const char*)FROM;
    char* to = (char*)TO;
    size_t bytes = place[1], whole = ((size_t)from | (size_t)to) % 16 ? 0 : bytes / 16;
    for (size_t i = at; i < whole; i += step) ((uint4*)to)[i] = ((const uint4*)from)[i];
    for (size_t i = 16 * whole + at; i < bytes; i += step) to[i] = from[i];
"""
STORE = COPY.replace("FROM", "x").replace("TO", "place[0]") + "    if (at == 0) done[0] = 1;\n"
LOAD = COPY.replace("FROM", "place[0]").replace("TO", "x")


class Arena:
    """A range of the host's memory that never moves and grows on demand. `bytes` is the locked size so far."""

    def __init__(self) -> None:
        self.bytes = 0
        self._taken = 0
        self._library = _driver()
        try:
            self._map = mmap.mmap(-1, MOST, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        except OSError as error:
            raise UserError(
                f"{SETTING}: the system cannot reserve addresses: {error.strerror}. Remove the setting"
            ) from None
        self._map.madvise(mmap.MADV_DONTFORK)  # otherwise Linux copies locked memory for each child process
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def begin(self) -> None:
        """Reuse the arena from the beginning. Nothing may read earlier contents any more."""
        self._taken = 0

    @property
    def room(self) -> int:
        """Bytes that the arena can hold with the memory that is free now, locked bytes included."""
        return max(self.bytes, self.bytes + available() - LEAST)

    def take(self, size: int) -> int:
        """The address of the next `size` bytes. Raises UserError if the system has too little memory."""
        address = self._start + self._taken
        self._taken += -(-size // ALIGNED) * ALIGNED
        while self.bytes < self._taken:
            self._lock()
        return address

    def _lock(self) -> None:
        if (free := available()) < LEAST:
            raise self._full(f"{free / 2**30:.1f} GB are free")
        place = ctypes.c_void_p(self._start + self.bytes)
        if code := self._library.cuMemHostRegister_v2(place, ctypes.c_size_t(PIECE), PORTABLE):
            raise self._full(f"CUDA's driver says {_name(self._library, code)}")
        self.bytes += PIECE

    def _full(self, why: str) -> UserError:
        return UserError(
            f"{SETTING}: {self.bytes / 2**30:.1f} GB of the machine's memory hold layers' inputs, and the machine has "
            f"no more memory for them ({why}). Remove the setting, or lower optim.micro_batch_tokens"
        )


@cache
def arena() -> Arena:
    """The only arena of this process."""
    return Arena()


def available(root: Path = Path("/")) -> int:
    """Free bytes of the machine's memory, or of the container's limit if that is less. Only on Linux."""
    facts = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    free = 1024 * int(facts["MemAvailable"].split()[0])
    group = root / "sys/fs/cgroup"
    limit = (group / "memory.max").read_text().strip() if (group / "memory.max").is_file() else "max"
    if limit.isdigit():
        files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["file"]
        free = min(free, int(limit) - int((group / "memory.current").read_text()) + int(files))
    return free


def put(x: mx.array, address: int) -> mx.array:
    """Write an array to an address of the arena. Returns an array `[1]`: evaluating it does the write."""
    done: mx.array
    (done,) = kernel("grpo_put_on_host", ("x", "place"), ("done",), STORE)(
        inputs=[x, _place(x.nbytes, address)], output_shapes=[(1,)], output_dtypes=[mx.int32], **_launch_size()
    )
    return done


def get(done: mx.array, address: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Read the array that `put` wrote to an address back to the device. `done` is the result of `put`."""
    x: mx.array
    size = dtype.size * prod(shape)
    (x,) = kernel("grpo_get_from_host", ("done", "place"), ("x",), LOAD)(
        inputs=[done, _place(size, address)], output_shapes=[shape], output_dtypes=[dtype], **_launch_size()
    )
    return x


def _place(size: int, address: int) -> mx.array:
    return mx.array([address, size], mx.uint64)


def _launch_size() -> dict[str, tuple[int, int, int]]:
    return {"grid": (BLOCKS * THREADS, 1, 1), "threadgroup": (THREADS, 1, 1)}


def _driver() -> ctypes.CDLL:
    """CUDA's driver, with MLX's context current on this thread. Raises UserError if the driver fails."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UserError(f"{SETTING}: CUDA's driver does not load: {error}") from None
    context = ctypes.c_void_p()
    code = library.cuInit(0) or library.cuCtxGetCurrent(ctypes.byref(context))
    if not code and not context.value:
        code = library.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) or library.cuCtxSetCurrent(context)
    same = ctypes.c_int()
    code = code or library.cuDeviceGetAttribute(ctypes.byref(same), SAME_ADDRESSES, 0)
    if code:
        raise UserError(f"{SETTING}: CUDA's driver gives no context: {_name(library, code)}")
    if not same.value:
        raise UserError(
            f"{SETTING}: this device cannot access the machine's memory by its addresses. Remove the setting"
        )
    return library


def _name(library: ctypes.CDLL, code: int) -> str:
    """The driver's name for an error code."""
    name = ctypes.c_char_p()
    library.cuGetErrorName(code, ctypes.byref(name))
    return name.value.decode() if name.value else f"error {code}"
