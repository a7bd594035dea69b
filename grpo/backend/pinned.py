"""Arrays in the memory of the host, which a CUDA device writes and reads by itself in the midst of its work.

MLX has no such memory: what it computes on a CPU stream lies in managed memory, which the driver may keep on the device
and which MLX counts as the device's. So the driver is asked for page-locked memory, and kernels of our own copy there
and back, at the speed of the bus.
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
"""Addresses that are set aside, in bytes: more than any machine has memory. They take none before they are locked."""
NO_RESERVE = 0x4000
"""Linux's flag for memory that is not counted before it is used; Python has no name for it before 3.13."""
ALIGNED = 256
LEAST = 2**30
"""Bytes of the machine's memory that are left to others: Linux ends a process that locks the last of them."""
SETTING = "optim.offload_activations"
BLOCKS, THREADS = 64, 512
"""Of a copy: enough to keep the bus busy, and few enough to leave the device to what is computed meanwhile."""
PORTABLE = 1
"""The driver's flag for memory that is locked for all contexts of this process."""

SAME_ADDRESSES = 91
"""The driver's number for whether a device reads and writes locked memory by the host's addresses."""

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
    """A stretch of the host's memory that never moves and grows as it is asked for. `bytes` are locked so far."""

    def __init__(self) -> None:
        self.bytes = 0
        self._taken = 0
        self._library = _driver()
        try:
            self._map = mmap.mmap(-1, MOST, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        except OSError as error:
            raise UserError(f"{SETTING}: the system sets no addresses aside: {error.strerror}. Leave it out") from None
        self._map.madvise(mmap.MADV_DONTFORK)  # Linux would copy what is locked for each process that is started
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def begin(self) -> None:
        """What was taken so far may be taken again. Nobody may still want to read it."""
        self._taken = 0

    @property
    def room(self) -> int:
        """Bytes that may be taken as things are, whatever is locked already included."""
        return max(self.bytes, self.bytes + available() - LEAST)

    def take(self, size: int) -> int:
        """The address of so many bytes. Raises UserError if the system does not give them."""
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
            f"{SETTING}: {self.bytes / 2**30:.1f} GB of the machine's memory hold layers' inputs, and there is no more "
            f"for them ({why}). Leave it out, or take fewer tokens at once (optim.micro_batch_tokens)"
        )


@cache
def arena() -> Arena:
    """This process's."""
    return Arena()


def available(root: Path = Path("/")) -> int:
    """Bytes of the machine's memory, or of as much of it as the container has, that nobody needs. On Linux."""
    said = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    free = 1024 * int(said["MemAvailable"].split()[0])
    group = root / "sys/fs/cgroup"
    limit = (group / "memory.max").read_text().strip() if (group / "memory.max").is_file() else "max"
    if limit.isdigit():
        files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["file"]
        free = min(free, int(limit) - int((group / "memory.current").read_text()) + int(files))
    return free


def put(x: mx.array, address: int) -> mx.array:
    """Write an array to an address of the arena. Returns an array `[1]` to evaluate: it is written then."""
    done: mx.array
    (done,) = kernel("grpo_put_on_host", ("x", "place"), ("done",), STORE)(
        inputs=[x, _place(x.nbytes, address)], output_shapes=[(1,)], output_dtypes=[mx.int32], **_all_at_it()
    )
    return done


def get(done: mx.array, address: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """The array that `put` wrote there, on the device again; `done` is what `put` returned."""
    x: mx.array
    size = dtype.size * prod(shape)
    (x,) = kernel("grpo_get_from_host", ("done", "place"), ("x",), LOAD)(
        inputs=[done, _place(size, address)], output_shapes=[shape], output_dtypes=[dtype], **_all_at_it()
    )
    return x


def _place(size: int, address: int) -> mx.array:
    return mx.array([address, size], mx.uint64)


def _all_at_it() -> dict[str, tuple[int, int, int]]:
    return {"grid": (BLOCKS * THREADS, 1, 1), "threadgroup": (THREADS, 1, 1)}


def _driver() -> ctypes.CDLL:
    """CUDA's driver, with MLX's context current on this thread. Raises UserError where there is none."""
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
            f"{SETTING}: this device does not reach the machine's memory by its own addresses. Leave it out"
        )
    return library


def _name(library: ctypes.CDLL, code: int) -> str:
    """The driver's own name for an error."""
    name = ctypes.c_char_p()
    library.cuGetErrorName(code, ctypes.byref(name))
    return name.value.decode() if name.value else f"error {code}"
