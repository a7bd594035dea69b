"""Separates a model's thinking from its answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo.model.mlxlm import TokenizerWrapper

MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""Marks of thinking that mlx-lm may not know."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """The marks around thinking. `opened`: a turn begins inside them, because the prompt ends with the start mark."""

    start: str
    end: str
    opened: bool = False

    @classmethod
    def of(cls, tokenizer: TokenizerWrapper, generation: str) -> Thinking | None:
        """Return a model's marks, or None if it has none. `generation` is the rendered text that leads to its turn."""
        vocabulary = tokenizer.get_vocab()
        known = [marks for marks in MARKS if set(marks) <= set(vocabulary)]
        if tokenizer.has_thinking:
            known.insert(0, (tokenizer.think_start, tokenizer.think_end))
        if not known:
            return None
        start, end = known[0]
        return cls(start, end).after(generation)

    def after(self, lead: str) -> Thinking:
        """Return the same marks for a turn that follows the text `lead`."""
        return Thinking(self.start, self.end, lead.rfind(self.start) > lead.rfind(self.end))

    def split(self, text: str) -> tuple[str | None, str]:
        """Return a turn's thinking (None if it has none) and the rest. Thinking without an end is the whole turn."""
        before, closed, after = text.partition(self.end)
        said, begun, thought = before.partition(self.start)
        if closed:
            return (thought if begun else said).strip("\n"), (said if begun and said.strip() else "") + after.lstrip(
                "\n"
            )
        if self.opened or (begun and not said.strip()):
            return (thought if begun else text).strip("\n"), ""
        return None, text

    def without(self, text: str) -> str:
        """Return a rendered text without thinking, and without the blanks around the thinking."""
        return re.sub(rf"\s*{re.escape(self.start)}.*?{re.escape(self.end)}\s*", "", text, flags=re.DOTALL)
