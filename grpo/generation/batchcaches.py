"""Decoding through mlx-lm's own batch caches, for models that cache more than plain keys and values.

The caches for sliding windows, recurrent state and latent attention support padding, joining and filtering. Each row
has its own copy of the prompt, and joining a row copies the whole batch. This is slower than shared prefixes, but it
works for every architecture.
"""

from __future__ import annotations

from functools import cached_property

import mlx.nn as nn

from grpo.generation.batchsession import BatchCachesSession
from grpo.generation.caches import prefilled
from grpo.generation.decoding import Session
from grpo.generation.slots import Size
from grpo.model.tensor import is_divided


class BatchCaches:
    """Decoding by a model's own forward pass and mlx-lm's batch caches.

    Without `joined`, rows go through the model one by one: some models (Gemma 2) do not accept a mask for several rows.
    """

    narrow: str | None = "mlx-lm's batch caches cannot take back tokens that turn out to be wrong"

    def __init__(
        self, model: nn.Module, vocabulary: int, joined: bool = True, why: str = "", refused: tuple[str, ...] = ()
    ) -> None:
        """`why` is the reason why rows cannot share prompts; `refused`: see `Decoding`."""
        self.model = model
        self.vocabulary = vocabulary
        self.joined = joined
        one_by_one = "" if joined else ", row by row"
        self.description = f"mlx-lm's batch caches{one_by_one}{why and f' ({why})'}: slower"
        self.refused = refused
        self.lockstep = is_divided(model)

    side_by_side = False
    """Never: the model's own code runs, which may keep state from one layer to the next."""

    def refresh(self) -> None:
        """Nothing to do: decoding uses the model's own arrays."""

    def open(self, size: Size) -> Session:
        return BatchCachesSession(self.model, size.slots, self.joined)

    def close(self, session: Session) -> None:
        session.close()

    def forget(self) -> None:
        """Nothing to do: this object holds no weights."""

    def memory(self, slots: int, places: int, prompt: int, completion: int, entering: int | None = None) -> int:
        """Bytes, extrapolated from the caches of one row at two lengths, for each row and each prompt that waits."""
        fixed, per_token = self._sizes
        held = (slots + places) * fixed + (slots * (prompt + completion) + places * prompt) * per_token
        return int(held) + (entering or 0)

    def outside(self, prompt: int, completion: int) -> int:
        fixed, per_token = self._sizes
        return int(fixed + (prompt + completion) * per_token)

    @cached_property
    def _sizes(self) -> tuple[float, float]:
        """Bytes per row, and bytes per token of a row. Caches grow by 256 columns."""
        short, long = (
            sum(cache.nbytes for cache in prefilled(self.model, [[0] * (columns + 1)])) for columns in (256, 512)
        )
        return max(0.0, 2 * short - long), max(0.0, (long - short) / 256)
