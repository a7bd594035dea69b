"""Who computes a model's attention, in the place of mlx-lm's.

All of mlx-lm's models call one function, by the name under which their file has imported it. Here another function
takes its place for a while: it asks the layer's cache, if that has a method `attend`; while hidden states are computed
for training it attends in tiles (`grpo.model.attention`); and in all other cases it calls mlx-lm's. The activation of
gated layers (`swiglu`) is replaced in the same way on a CPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from threading import Lock
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.backend import cuda
from grpo.backend.blame import cause
from grpo.backend.device import on_gpu
from grpo.backend.maths import swiglu
from grpo.model import mlxlm
from grpo.model.attention import attention
from grpo.model.sight import Causal, Masked, Sight

CUDA_MULTIPLE, CUDA_WIDEST = 128, 128
"""MLX's fused attention on CUDA has a backward pass for queries of a multiple of so many tokens, and for heads as wide
as this at most."""
CUDA_QUERIES = 2**27
"""Numbers in the queries of one call of that, at most. Its backward pass has a workspace of some eight bytes for each,
and MLX 0.32 counts its bytes in 32 bits: from 2 GiB on it asks for memory that no card has."""

_USERS: Counter[tuple[ModuleType, str]] = Counter()
_LOCK = Lock()


def attends(model: nn.Module) -> list[ModuleType]:
    """The files of this model's modules that have imported mlx-lm's attention."""
    return _calling(model, "scaled_dot_product_attention")


def _calling(model: nn.Module, name: str) -> list[ModuleType]:
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    return [file for file in files if getattr(file, name, None) in (getattr(mlxlm, name), OURS[name])]


@contextmanager
def asking_caches(files: Sequence[ModuleType], name: str = "scaled_dot_product_attention") -> Iterator[None]:
    """Let the attention in these files be ours inside the block, which asks the caches.

    Blocks of several threads may overlap: what was there is back when the last one ends.
    """
    with _LOCK:
        for file in files:
            _USERS[file, name] += 1
            setattr(file, name, OURS[name])
    try:
        yield
    finally:
        with _LOCK:
            for file in files:
                _USERS[file, name] -= 1
                if not _USERS[file, name]:
                    setattr(file, name, getattr(mlxlm, name))


def _attend(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """In the place of mlx-lm's function, with its arguments."""
    if hasattr(cache, "attend"):
        out: mx.array = cache.attend(queries, keys, values, scale, mask, sinks)
        return out
    now = under_way()
    sight = now.sight(queries, keys, values, mask) if now else None
    if sight is None:
        return mlx_lms(queries, keys, values, scale, mask, sinks, cache)
    return attention(queries, keys, values, scale, sight, sinks=sinks)


def mlx_lms(
    queries: mx.array,
    keys: Any,
    values: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
    cache: Any = None,
) -> mx.array:
    """The attention that was there before, in several calls of some heads each where one would be too large."""
    calls = _calls(queries, keys, mask)
    if calls > 1:
        of_heads = (mx.split(array, calls, axis=1) for array in (queries, keys, values))
        of_sinks = [None] * calls if sinks is None else mx.split(sinks, calls)
        parts = zip(*of_heads, of_sinks, strict=True)
        return mx.concatenate([mlx_lms(q, k, v, scale, mask, own, cache) for q, k, v, own in parts], axis=1)
    given = {} if sinks is None else {"sinks": sinks}
    out: mx.array = mlxlm.scaled_dot_product_attention(
        queries, keys, values, cache=cache, scale=scale, mask=mask, **given
    )
    return out


def _calls(queries: mx.array, keys: Any, mask: Any) -> int:
    """In how many calls to compute attention: of as many heads each, with their own keys."""
    if queries.size <= CUDA_QUERIES or not cuda.available() or not isinstance(keys, mx.array):
        return 1
    if isinstance(mask, mx.array) and mask.ndim > 2 and mask.shape[-3] > 1:
        return 1  # each head may have a mask of its own
    heads = keys.shape[1]
    return next((n for n in range(1, heads) if heads % n == 0 and queries.size <= n * CUDA_QUERIES), heads)


OURS: dict[str, Callable[..., mx.array]] = {"scaled_dot_product_attention": _attend, "swiglu": swiglu}
"""What takes the place of mlx-lm's functions, by their names."""


class Forward:
    """A forward pass through a model whose attention is computed in tiles, and its backward pass."""

    def __init__(self, attending: Sequence[ModuleType], gating: Sequence[ModuleType]) -> None:
        self._attending, self._gating = attending, gating
        self._masks: dict[int, tuple[mx.array, Sight]] = {}
        self.answered = 0
        """How often attention was computed in tiles."""
        self.declined = 0
        """How often MLX's own was called, for want of a word for what the queries see."""

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Attend in tiles inside the block: in the forward pass, and where a layer is computed again."""
        with asking_caches(self._attending), asking_caches(self._gating, "swiglu"):
            token = _NOW.set(self)
            try:
                yield
            finally:
                _NOW.reset(token)

    def remember(self, mask: mx.array, sight: Sight) -> None:
        """That this very array stands for what `sight` says. If it is not read, it is never computed."""
        self._masks[id(mask)] = mask, sight

    def sight(self, queries: mx.array, keys: mx.array, values: mx.array, mask: Any) -> Sight | None:
        """What the queries see, or None where MLX's own attention is to be called."""
        if fused(queries, values):
            return None
        found = self._meant(queries.shape[2], keys.shape[2], mask)
        self.answered += found is not None
        self.declined += found is None
        return found

    def _meant(self, queries: int, keys: int, mask: Any) -> Sight | None:
        if isinstance(mask, mx.array):
            known = self._masks.get(id(mask))
            return known[1] if known else _of_booleans(mask, queries, keys)
        causal = mask == "causal" or (mask is None and queries == 1)
        return Causal() if causal and queries == keys else None


class Untiled(ValueError):
    """Why a model cannot be run with its attention in tiles."""


class InTiles:
    """Makes forward passes of a model in which attention is computed in tiles."""

    def __init__(self, model: nn.Module) -> None:
        self._attending, self._gating = attends(model), [] if on_gpu() else _calling(model, "swiglu")
        files = (sys.modules[type(module).__module__] for module in model.modules())
        self._masks = any(hasattr(file, "create_attention_mask") for file in files)

    @contextmanager
    def begun(self) -> Iterator[Forward]:
        """A forward pass inside the block."""
        forward = Forward(self._attending, self._gating)
        with forward.under_way():
            yield forward

    def fault(self, body: Callable[..., mx.array]) -> str | None:
        """Why attention keeps its scores all the same, if it does: tried on three tokens, and nothing is computed.

        `body` is what training calls. Raises Untiled where it cannot be run so.
        """
        try:
            with self.begun() as forward:
                body(mx.array([[1, 2, 3]]), cache=None)
        except Exception as error:  # whatever the model's own code raises, or ours
            raise Untiled(f"the trial failed: {cause(error)}") from error
        if forward.declined:
            return "this architecture adds scores of its own"
        return "this architecture computes it itself" if self._masks and not forward.answered else None


_NOW: ContextVar[Forward | None] = ContextVar("the forward pass that is under way", default=None)


def under_way() -> Forward | None:
    """The forward pass in tiles that this is a part of, if there is one."""
    return _NOW.get()


def as_now() -> Callable[[], AbstractContextManager[None]]:
    """Makes blocks in which attention is computed as it is now."""
    now = under_way()
    return nullcontext if now is None else now.under_way


def meaning(mask: mx.array, sight: Sight) -> mx.array:
    """The mask, known from now on to mean this."""
    if (now := under_way()) is not None:
        now.remember(mask, sight)
    return mask


def fused(queries: mx.array, values: mx.array) -> bool:
    """Whether MLX has a fused backward pass for such queries and values: on CUDA alone, as of MLX 0.32."""
    if not cuda.available() or queries.dtype == mx.float32:
        return False
    widths = queries.shape[-1], values.shape[-1]
    return queries.shape[2] % CUDA_MULTIPLE == 0 and all(w % 8 == 0 and w <= CUDA_WIDEST for w in widths)


def _of_booleans(mask: mx.array, queries: int, keys: int) -> Sight | None:
    """A mask that is the same for all heads."""
    if mask.dtype != mx.bool_ or mask.shape[-2:] != (queries, keys) or (mask.ndim == 4 and mask.shape[1] > 1):
        return None
    if mask.ndim == 3 and mask.shape[0] > 1:
        return None  # MLX takes its first axis for heads
    return Masked(mask.reshape(-1, queries, keys))
