"""Makes a step atomic: keeps the arrays from before the step, and restores them if the step fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from grpo.model.adapters import Adapters, Snapshot
from grpo.training.optimizer import Float32Optimizer


class Before:
    """Keeps the arrays from before a step: an adapter's until the step is done, full weights until an update begins.

    `hold` is called when a step begins to change arrays; from then on an interrupt must wait until the step returns.
    After an error inside `wholly`, `halfway` is true if the step had begun to change arrays that cannot be restored.
    """

    def __init__(self, adapters: Adapters, whole_weights: bool, spread: bool = False) -> None:
        """`spread`: the weights are spread over processes (FSDP), and full weights are released before an update, so
        nothing is kept of them."""
        self.hold: Callable[[], None] = lambda: None
        self.halfway = False
        self._adapters, self._whole_weights, self._spread = adapters, whole_weights, spread
        self._former: _Former | None = None

    @contextmanager
    def wholly(self, optimizer: Float32Optimizer) -> Iterator[None]:
        """A context for a step: if the step raises, the arrays from before the step are restored.

        The arrays are kept from the end of sampling on. An adapter's arrays can always be restored. Full weights would
        be in memory twice (12 bytes more for each parameter with AdamW's moments, 14 in bfloat16), so they are released
        when the first update is about to change them. Most failures come earlier. A later failure (no memory left, or a
        second update of the step that is not finite or breaks a custom loss) sets `halfway`, and the run loses the
        steps since its newest checkpoint.
        """
        self._former = _Former()
        try:
            yield
        except BaseException:
            self.put_back(optimizer)
            raise
        finally:
            self._former = None

    def put_back(self, optimizer: Float32Optimizer) -> None:
        """Undo the changes of the current step, or set `halfway` if they cannot be undone."""
        former = self._former
        if former is not None and former.arrays is not None:
            adapters, optimizer.state = former.arrays
            self._adapters.restore(adapters)
        elif former is not None:
            self.halfway = former.moved

    def remember(self, optimizer: Float32Optimizer) -> None:
        """Keep the current arrays. Call this after sampling, which replaces arrays with equal views of joined weights.

        From here on, an error may interrupt a switch of adapter states, the tracing of a gradient, or an update.
        """
        if self._former is not None and not (self._whole_weights and self._spread):
            self._former.arrays = self._adapters.snapshot(), optimizer.state

    def move(self) -> None:
        """Announce that the step is about to change arrays and must not be interrupted."""
        self.hold()
        if self._former is not None:
            self._former.moved = True
            if self._whole_weights:
                self._former.arrays = None  # else MLX could not reuse their memory for the update


@dataclass(slots=True)
class _Former:
    """The arrays from before a step (None once released), and whether the step has begun to change them."""

    arrays: tuple[Snapshot, dict[str, Any]] | None = None
    moved: bool = False
