"""Replaces mlx-lm's attention function temporarily.

All of mlx-lm's models call the same function, under the name that their module imported. Inside a block, a function of
grpo replaces it. It calls the layer cache's `attend`, if the cache has that method; it attends in tiles
(`grpo.model.attention`) while hidden states are computed for training; in all other cases it calls mlx-lm's function.
On a CPU, the activation of gated layers (`swiglu`) is replaced in the same way.
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
"""MLX's fused attention on CUDA has a backward pass if the number of query tokens is a multiple of the first number and
heads are at most as wide as the second."""
CUDA_QUERIES = 2**27
"""Most numbers in the queries of one call of MLX's fused attention. Its backward pass needs a workspace of about eight
bytes per number, and MLX 0.32 counts these bytes in 32 bits: from 2 GiB on, it requests more memory than any card has.
"""

_USERS: Counter[tuple[ModuleType, str]] = Counter()
_LOCK = Lock()


def attends(model: nn.Module) -> list[ModuleType]:
    """The Python modules of this model's layers that import mlx-lm's attention."""
    return _calling(model, "scaled_dot_product_attention")


def _calling(model: nn.Module, name: str) -> list[ModuleType]:
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    return [file for file in files if getattr(file, name, None) in (getattr(mlxlm, name), OURS[name])]


@contextmanager
def asking_caches(files: Sequence[ModuleType], name: str = "scaled_dot_product_attention") -> Iterator[None]:
    """Inside the block, these Python modules call grpo's function `name`, which asks the caches, instead of mlx-lm's.

    Blocks of several threads may overlap: mlx-lm's function is restored when the last block ends.
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
    """Replaces mlx-lm's `scaled_dot_product_attention`, with the same arguments."""
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
    """mlx-lm's attention, split by heads into several calls if a single call would be too large."""
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
    """Number of calls to split attention into. All calls have the same number of heads, with the heads' own keys."""
    if queries.size <= CUDA_QUERIES or not cuda.available() or not isinstance(keys, mx.array):
        return 1
    if isinstance(mask, mx.array) and mask.ndim > 2 and mask.shape[-3] > 1:
        return 1  # the mask may differ by head
    heads = keys.shape[1]
    return next((n for n in range(1, heads) if heads % n == 0 and queries.size <= n * CUDA_QUERIES), heads)


OURS: dict[str, Callable[..., mx.array]] = {"scaled_dot_product_attention": _attend, "swiglu": swiglu}
"""Replacements for mlx-lm's functions, by name."""


class Forward:
    """A forward pass, and its backward pass, through a model whose attention is computed in tiles."""

    def __init__(self, attending: Sequence[ModuleType], gating: Sequence[ModuleType]) -> None:
        self._attending, self._gating = attending, gating
        self._masks: dict[int, tuple[mx.array, Sight]] = {}
        self.answered = 0
        """Number of attention calls that were computed in tiles."""
        self.declined = 0
        """Number of attention calls left to MLX, because no `Sight` describes their mask."""

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Attend in tiles inside the block: in the forward pass, and where a layer is recomputed."""
        with asking_caches(self._attending), asking_caches(self._gating, "swiglu"):
            token = _NOW.set(self)
            try:
                yield
            finally:
                _NOW.reset(token)

    def remember(self, mask: mx.array, sight: Sight) -> None:
        """Note that this very array means `sight`. An array that nothing reads is never evaluated."""
        self._masks[id(mask)] = mask, sight

    def sight(self, queries: mx.array, keys: mx.array, values: mx.array, mask: Any) -> Sight | None:
        """What the queries see, or None if MLX's attention is to be called."""
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
    """The model cannot compute its attention in tiles. The message is the reason."""


class InTiles:
    """Creates forward passes of a model with attention in tiles."""

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
        """The reason why attention still stores its scores, or None. Traces three tokens, and evaluates nothing.

        `body` is the function that training calls. Raises Untiled if it cannot run with tiles.
        """
        try:
            with self.begun() as forward:
                body(mx.array([[1, 2, 3]]), cache=None)
        except Exception as error:  # the model's code, or grpo's, may raise anything
            raise Untiled(f"the trial failed: {cause(error)}") from error
        if forward.declined:
            return "this architecture adds scores of its own"
        return "this architecture computes it itself" if self._masks and not forward.answered else None


_NOW: ContextVar[Forward | None] = ContextVar("the forward pass that is under way", default=None)


def under_way() -> Forward | None:
    """The current forward pass in tiles, or None."""
    return _NOW.get()


def as_now() -> Callable[[], AbstractContextManager[None]]:
    """A factory of blocks in which attention is computed in the present way."""
    now = under_way()
    return nullcontext if now is None else now.under_way


def meaning(mask: mx.array, sight: Sight) -> mx.array:
    """Register the meaning of a mask with the current forward pass. Returns the mask."""
    if (now := under_way()) is not None:
        now.remember(mask, sight)
    return mask


def fused(queries: mx.array, values: mx.array) -> bool:
    """Whether MLX has a fused backward pass for these queries and values: only on CUDA, as of MLX 0.32."""
    if not cuda.available() or queries.dtype == mx.float32:
        return False
    widths = queries.shape[-1], values.shape[-1]
    return queries.shape[2] % CUDA_MULTIPLE == 0 and all(w % 8 == 0 and w <= CUDA_WIDEST for w in widths)


def _of_booleans(mask: mx.array, queries: int, keys: int) -> Sight | None:
    """The sight of a boolean mask that is the same for all heads; None for other masks."""
    if mask.dtype != mx.bool_ or mask.shape[-2:] != (queries, keys) or (mask.ndim == 4 and mask.shape[1] > 1):
        return None
    if mask.ndim == 3 and mask.shape[0] > 1:
        return None  # MLX treats the first of three axes as heads
    return Masked(mask.reshape(-1, queries, keys))
