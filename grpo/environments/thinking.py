"""What a model thinks before it answers, apart from what it says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo.model.mlxlm import TokenizerWrapper

MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""Marks of thinking that mlx-lm may not name."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """The marks around thinking, and whether a turn begins within them, because the prompt ends with the first."""

    start: str
    end: str
    opened: bool = False

    @classmethod
    def of(cls, tokenizer: TokenizerWrapper, generation: str) -> Thinking | None:
        """The thinking of a model, or None if it has no marks for it. `generation` is how its turns are begun."""
        vocabulary = tokenizer.get_vocab()
        known = [marks for marks in MARKS if set(marks) <= set(vocabulary)]
        if tokenizer.has_thinking:
            known.insert(0, (tokenizer.think_start, tokenizer.think_end))
        if not known:
            return None
        start, end = known[0]
        return cls(start, end).after(generation)

    def after(self, lead: str) -> Thinking:
        """The same marks for a turn that follows `lead`."""
        return Thinking(self.start, self.end, lead.rfind(self.start) > lead.rfind(self.end))

    def split(self, text: str) -> tuple[str | None, str]:
        """The thinking of a turn, None if it has none, and the rest. Thinking that does not end is all of the turn."""
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
        """A rendered text without any thinking, and without the blanks around it."""
        return re.sub(rf"\s*{re.escape(self.start)}.*?{re.escape(self.end)}\s*", "", text, flags=re.DOTALL)
