"""What a benchmark measures: which model, how much of it, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from grpo.backend.random import derive_key


@dataclass(frozen=True, slots=True)
class Setting:
    """A model (by `model`, or one of this `shape` with random weights), and prompts × completions of these lengths.

    Lengths are in tokens; `runs` are turns after the warm-up. A benchmark looks at what means something to it.
    """

    shape: str = "qwen3-1m"
    model: str | None = None
    lora: bool = True
    prompts: int = 1
    completions: int = 1
    prompt_length: int = 1
    completion_length: int = 1
    runs: int = 1

    def __str__(self) -> str:
        load = f"{self.prompts}x{self.completions} {self.prompt_length}+{self.completion_length}"
        return f"{self.name} {load}"

    @property
    def name(self) -> str:
        """Of the model that is measured."""
        return self.model or self.shape

    @property
    def rows(self) -> int:
        return self.prompts * self.completions

    @property
    def tokens(self) -> int:
        """That are sampled."""
        return self.rows * self.completion_length

    def draw(self, vocabulary: int) -> list[list[int]]:
        """The prompts, the same at every call."""
        shape = (self.prompts, self.prompt_length)
        ids: Any = mx.random.randint(1, vocabulary, shape, key=derive_key(0, "bench")).tolist()
        return cast("list[list[int]]", ids)
