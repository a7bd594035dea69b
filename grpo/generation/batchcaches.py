"""Decoding through mlx-lm's own batch caches, for models that keep more than plain keys and values.

Sliding windows, recurrent state and latent attention have caches that know how to be padded, joined and filtered;
prompts are copied for each row, and joining a row copies what is there. Slower than shared prefixes, but right.
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
    """A model by its own forward pass and mlx-lm's batch caches.

    Unless `joined`, rows go through the model one by one: some models (Gemma 2) take no masks of several rows.
    """

    narrow: str | None = "caches of this kind cannot take tokens back that turn out wrong"

    def __init__(
        self, model: nn.Module, vocabulary: int, joined: bool = True, why: str = "", refused: tuple[str, ...] = ()
    ) -> None:
        """`why` says what keeps the model from sharing prompts."""
        self.model = model
        self.vocabulary = vocabulary
        self.joined = joined
        one_by_one = "" if joined else ", row by row"
        self.description = f"mlx-lm's batch caches{one_by_one}{why and f' ({why})'}: slower"
        self.refused = refused
        self.lockstep = is_divided(model)

    side_by_side = False
    """It runs the model's own code, which may keep things of its own between two layers."""

    def refresh(self) -> None:
        """Nothing to do: the model is what it is."""

    def open(self, size: Size) -> Session:
        return BatchCachesSession(self.model, size.slots, self.joined)

    def close(self, session: Session) -> None:
        session.close()

    def forget(self) -> None:
        """Nothing to do: no weight is held."""

    def memory(self, slots: int, places: int, prompt: int, completion: int, entering: int | None = None) -> int:
        """From what one row holds at two lengths: each row has its own, and each prompt that waits for its rows."""
        fixed, per_token = self._sizes
        held = (slots + places) * fixed + (slots * (prompt + completion) + places * prompt) * per_token
        return int(held) + (entering or 0)

    def outside(self, prompt: int, completion: int) -> int:
        fixed, per_token = self._sizes
        return int(fixed + (prompt + completion) * per_token)

    @cached_property
    def _sizes(self) -> tuple[float, float]:
        """Bytes of a row, and more for each of its tokens. Caches grow by 256 columns."""
        short, long = (
            sum(cache.nbytes for cache in prefilled(self.model, [[0] * (columns + 1)])) for columns in (256, 512)
        )
        return max(0.0, 2 * short - long), max(0.0, (long - short) / 256)
