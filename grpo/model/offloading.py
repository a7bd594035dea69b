"""Checkpointed layers' inputs in the host's memory until the backward pass asks for them.

What checkpointing keeps of a layer is its input: depth × tokens × hidden numbers, which of an 8B model in bfloat16 are
295 KB a token, and with attention and the MLP in tiles nearly all that an update holds. A vault takes each input away
while the layers after it are computed, and gives it back when the layer is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from grpo.backend import cuda, pinned
from grpo.errors import UserError

Checkpoint = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What `mx.checkpoint` is."""
Taking = Callable[[mx.array], mx.array]


class Vault(Protocol):
    """Where layers' inputs lie between the two passes."""

    def begin(self) -> None:
        """A new gradient begins: nothing that was put away before is asked for any more."""

    def put(self, x: mx.array) -> tuple[mx.array, Taking]:
        """A small array, which is there when `x` is put away, and what makes `x` of that array again."""

    def room(self) -> int:
        """Bytes of layers' inputs that it may hold."""

    def note(self) -> str:
        """What it takes, in a line."""


class OnHost:
    """A vault in the host's memory, for CUDA. Raises RunError where the driver gives none."""

    def __init__(self) -> None:
        self._arena = pinned.arena()

    def begin(self) -> None:
        self._arena.begin()

    def put(self, x: mx.array) -> tuple[mx.array, Taking]:
        address = self._arena.take(x.nbytes)
        return pinned.put(x, address), partial(pinned.get, address=address, shape=x.shape, dtype=x.dtype)

    def room(self) -> int:
        return self._arena.room

    def note(self) -> str:
        held = f": {self._arena.bytes / 2**30:.1f} GB of it" if self._arena.bytes else ""  # nothing was measured
        return f"the inputs of checkpointed layers lie in the machine's memory, not the device's{held}"


def vault_of(offloads: bool) -> Vault | None:
    """The vault for `optim.offload_activations`; None without. Raises UserError on a machine where it has no use."""
    if not offloads:
        return None
    if not cuda.available():
        where = "Metal, whose GPU computes in" if mx.metal.is_available() else "a CPU, which computes in"
        raise UserError(
            f"optim.offload_activations: this run is on {where} the machine's own memory: there is no other to move "
            "layers' inputs to. Leave it out: it is for CUDA"
        )
    return OnHost()


def host_bytes(layers: int, tokens: int, hidden: int, itemsize: int) -> int:
    """Bytes of the host's memory that a micro-batch of so many tokens takes, with so many layers checkpointed.

    On the device the same bytes are not held: of layers' inputs there are two at a time.
    """
    piece = -(-tokens * hidden * itemsize // pinned.ALIGNED) * pinned.ALIGNED
    return -(-layers * piece // pinned.PIECE) * pinned.PIECE


def keeping_in(vault: Vault) -> Checkpoint:
    """As `mx.checkpoint`, for functions of parameters, `x`, and anything more: `x` is kept in the vault."""

    def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda parameters, x, *rest: _kept(vault, function, parameters, x, rest)

    return checkpoint


def _kept(vault: Vault, function: Callable[..., Any], parameters: Any, x: mx.array, rest: Any) -> Any:
    given = parameters, rest
    how: list[Taking] = []

    @mx.custom_function
    def forward(x: mx.array, given: Any) -> tuple[mx.array, Any]:
        done, taking = vault.put(x)
        how.append(taking)
        parameters, rest = given
        return done, function(parameters, x, *rest)  # both at once: the layers after this one wait for the copy

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        """As `mx.checkpoint` has it, but that `x` is not the one that went in: nothing holds that one."""
        given, after = primals[1], leaves(cotangents[1])
        *arrays, done = mx.depends([*leaves(given), outputs[0]], after)

        def again(x: mx.array, *arrays: mx.array) -> list[mx.array]:
            parameters, rest = filled(given, arrays)
            return leaves(function(parameters, x, *rest))

        _, (of_x, *others) = mx.vjp(again, [how[0](done), *arrays], after)
        return of_x, filled(given, others)

    made: Any = forward(x, given)
    return made[1]


def leaves(tree: Any) -> list[mx.array]:
    """The arrays of a tree, in order."""
    return [array for _, array in tree_flatten(tree)]


def filled(tree: Any, arrays: Any) -> Any:
    """The tree with these arrays as its leaves, in order."""
    left: Iterator[mx.array] = iter(arrays)
    return tree_map(lambda _: next(left), tree)
