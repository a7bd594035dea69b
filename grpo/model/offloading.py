"""Stores the inputs of checkpointed layers in the host's memory until the backward pass needs them.

Checkpointing stores each layer's input: depth × tokens × hidden numbers. In an 8B model in bfloat16 this is 295 KB per
token, and with attention and the MLP in tiles it is nearly all of an update's memory. A vault moves each input away
while the later layers are computed, and returns it when the layer is recomputed.
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
"""The type of `mx.checkpoint`."""
Taking = Callable[[mx.array], mx.array]


class Vault(Protocol):
    """Stores layers' inputs between the forward and the backward pass."""

    def begin(self) -> None:
        """Call this before a new gradient: everything stored so far may be discarded."""

    def put(self, x: mx.array) -> tuple[mx.array, Taking]:
        """Store `x`. Returns a small array that is computed once `x` is stored, and a function from it back to `x`."""

    def room(self) -> int:
        """Bytes of layers' inputs that the vault can hold."""

    def note(self) -> str:
        """One line about where inputs are stored, and how many bytes."""


class OnHost:
    """A vault in the host's memory, for CUDA. Raises UserError if the driver refuses."""

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
        held = f": {self._arena.bytes / 2**30:.1f} GB of it" if self._arena.bytes else ""  # 0 before the first put
        return f"the inputs of checkpointed layers are stored in the machine's memory, not the device's{held}"


def vault_of(offloads: bool) -> Vault | None:
    """The vault for `optim.offload_activations`; None if that is off. Raises UserError on a machine without CUDA."""
    if not offloads:
        return None
    if not cuda.available():
        where = "Metal, whose GPU computes in" if mx.metal.is_available() else "a CPU, which computes in"
        raise UserError(
            f"optim.offload_activations: this run is on {where} the machine's own memory: there is no other memory to "
            "move layers' inputs to. Remove the setting: it is for CUDA"
        )
    return OnHost()


def host_bytes(layers: int, tokens: int, hidden: int, itemsize: int) -> int:
    """Bytes of the host's memory for a micro-batch with this many tokens and checkpointed layers.

    The device does not hold these bytes: it has two layers' inputs at a time.
    """
    piece = -(-tokens * hidden * itemsize // pinned.ALIGNED) * pinned.ALIGNED
    return -(-layers * piece // pinned.PIECE) * pinned.PIECE


def keeping_in(vault: Vault) -> Checkpoint:
    """Like `mx.checkpoint`, for functions of parameters, `x` and further arguments. `x` is stored in the vault."""

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
        return done, function(parameters, x, *rest)  # joint outputs: later layers wait for the copy

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        """As in `mx.checkpoint`, but with `x` read back from the vault, because nothing holds the original."""
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
