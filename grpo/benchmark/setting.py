"""The setting of a benchmark: the model, the sizes of the work, and the number of runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from grpo.backend.random import derive_key
from grpo.benchmark.distributions import FIXED, draw_lengths


@dataclass(frozen=True, slots=True)
class Setting:
    """A model (`model`, or a model of this `shape` with random weights), and prompts × completions of these lengths.

    Lengths are in tokens; `runs` is the number of turns after the warm-up. Every completion has `completion_length`
    tokens, or at most this many if `lengths` is a distribution. At most `slots` rows decode simultaneously (None: all
    rows); mlx-lm decodes at most `peer_slots` rows (None: the same number). With `peer_prompts_once`, mlx-lm gets each
    prompt's cache, computed once for all its completions. The random weights have `bits` bits (None: not quantized).
    Training is planned for `limit` GB of memory (None: this machine's memory). Benchmarks ignore the fields that do not
    concern them.
    """

    shape: str = "qwen3-1m"
    model: str | None = None
    lora: bool = True
    prompts: int = 1
    completions: int = 1
    prompt_length: int = 1
    completion_length: int = 1
    runs: int = 1
    lengths: str = FIXED
    slots: int | None = None
    peer_slots: int | None = None
    peer_prompts_once: bool = False
    bits: int | None = None
    limit: float | None = None

    def __str__(self) -> str:
        load = f"{self.prompts}x{self.completions} {self.prompt_length}+{self.completion_length}"
        lengths = "" if self.lengths == FIXED else f" ({self.lengths})"
        slots = "" if self.slots is None else f", {self.slots} slots"
        peers = "" if self.peer_slots is None else f", mlx-lm {self.peer_slots} rows at once"
        once = ", mlx-lm's prompts computed once" if self.peer_prompts_once else ""
        limit = "" if self.limit is None else f", memory.limit_gb {self.limit:g}"
        return f"{self.name} {load}{lengths}{slots}{peers}{once}{limit}"

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.model or self.shape + ("" if self.bits is None else f" in {self.bits} bits")

    @property
    def rows(self) -> int:
        return self.prompts * self.completions

    @property
    def at_once(self) -> int:
        """Maximum number of rows that decode simultaneously."""
        return min(self.rows, self.slots or self.rows)

    @property
    def completion_lengths(self) -> list[int]:
        """The length of every completion, prompt by prompt; the same at every call."""
        return draw_lengths(self.lengths, self.rows, self.completion_length)

    @property
    def tokens(self) -> int:
        """Number of sampled tokens."""
        return sum(self.completion_lengths)

    def draw(self, vocabulary: int) -> list[list[int]]:
        """The token ids of the prompts, the same at every call."""
        shape = (self.prompts, self.prompt_length)
        ids: Any = mx.random.randint(1, vocabulary, shape, key=derive_key(0, "bench")).tolist()
        return cast("list[list[int]]", ids)
