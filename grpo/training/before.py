"""A step is made wholly or not at all: what was before it is held, and put back where it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from grpo.model.adapters import Adapters, Snapshot
from grpo.training.optimizer import Float32Optimizer


class Before:
    """The arrays of before a step: an adapter's until the step is done, whole weights until an update moves them.

    `hold` is called when a step begins to change the arrays: whoever interrupts steps waits from then on until the step
    has returned. After an error inside `wholly`, `halfway` says that the arrays are of no finished step.
    """

    def __init__(self, adapters: Adapters, whole_weights: bool) -> None:
        self.hold: Callable[[], None] = lambda: None
        self.halfway = False
        self._adapters, self._whole_weights = adapters, whole_weights
        self._former: _Former | None = None

    @contextmanager
    def wholly(self, optimizer: Float32Optimizer) -> Iterator[None]:
        """A block around a step that an error leaves with the arrays as they were before it.

        They are held from the end of sampling on, and an adapter's are put back whatever happened. Whole weights would
        be in memory twice (with AdamW's moments 12 bytes a parameter more, 14 in bfloat16), so they are let go when the
        first update is about to move them. What fails usually comes before that. An error after it makes `halfway` true
        and costs the steps since the newest checkpoint: the machine is out of memory, or, where a step has several
        updates, a later one is not finite or breaks a custom loss.
        """
        former = self._former = _Former()
        try:
            yield
        except BaseException:
            if former.arrays is not None:
                adapters, optimizer.state = former.arrays
                self._adapters.restore(adapters)
            else:
                self.halfway = former.moved
            raise
        finally:
            self._former = None

    def remember(self, optimizer: Float32Optimizer) -> None:
        """Hold the arrays, once sampling is done: it puts others in their places, equal ones, views of joined weights.

        From here on a switch of states, a gradient's trace or an update may be left in its middle.
        """
        if self._former is not None:
            self._former.arrays = self._adapters.snapshot(), optimizer.state

    def move(self) -> None:
        """Called before a step changes arrays: what it begins here is to be finished."""
        self.hold()
        if self._former is not None:
            self._former.moved = True
            if self._whole_weights:
                self._former.arrays = None  # or MLX would write what the update makes beside it


@dataclass(slots=True)
class _Former:
    """The arrays of before a step, as long as they are held, and whether the step has begun to move them."""

    arrays: tuple[Snapshot, dict[str, Any]] | None = None
    moved: bool = False
