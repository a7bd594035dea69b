"""Drafts for a row's next tokens, found by text lookup: they need no draft model.

They come from the other rows of the group, from the prompt, earlier turns and tool results (prompt lookup), and from
earlier completions of the prompt, including those of evaluations. A new prompt uses completions of other prompts.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from grpo.generation.rows import Row, SharedPrompt
from grpo.generation.suffixes import ROOT, SuffixAutomaton

REMEMBERED = 4 * 2**20
"""Limit on the tokens of earlier completions, 4 bytes each. Above it, the least recently used prompts are dropped."""
OF_A_PROMPT = 8
"""Number of completions kept per prompt, the newest. 16 and 32 were no better, because the policy changes."""
OF_OTHERS = 32
"""Number of other prompts' completions that the index of a new prompt starts with."""
INDEXED = 2**18
"""Limit on the states in the indexes of all groups in flight, about 330 bytes each. At the limit, indexes stop growing
and new groups get no drafts."""
STATES = 2
"""The largest number of states that a token adds to an index."""
LEAD = 8
"""The number of tokens from the end of another prompt that are indexed before its completions."""

T = TypeVar("T")
Other = tuple[tuple[int, ...], "array[int]"]
"""The last tokens of another prompt, and one of its completions."""


class History:
    """Completions by the ids of their prompts."""

    def __init__(self, tokens: int = REMEMBERED) -> None:
        self._most, self._held = tokens, 0
        self._by_prompt: OrderedDict[tuple[int, ...], list[array[int]]] = OrderedDict()
        self._newest: deque[Other] = deque(maxlen=OF_OTHERS)

    def of(self, prompt: tuple[int, ...]) -> list[array[int]]:
        """A prompt's completions, oldest first."""
        return self._by_prompt.get(prompt, [])

    def others(self) -> list[Other]:
        """The newest completions over all prompts, oldest first."""
        return list(self._newest)

    def add(self, prompt: tuple[int, ...], completion: Sequence[int]) -> None:
        """Keep a completion. It replaces completions that it continues, such as the same row after an earlier turn."""
        tokens, former = array("I", completion), self._by_prompt.get(prompt, [])
        kept = [old for old in former if not (len(old) < len(tokens) and tokens[: len(old)] == old)]
        kept = [*kept, tokens][-OF_A_PROMPT:]
        self._held += sum(map(len, kept)) - sum(map(len, former))
        self._by_prompt[prompt] = kept
        self._by_prompt.move_to_end(prompt)
        self._newest.append((prompt[-LEAD:], tokens))
        while self._held > self._most:
            _, dropped = self._by_prompt.popitem(last=False)
            self._held -= sum(map(len, dropped))


@dataclass(slots=True, eq=False)
class Siblings:
    """The rows of a prompt that are in flight, and the index that their drafts come from, built on first use.

    `past` has the prompt's completions from before the group began; if there are none, `others` has completions of
    other prompts. `states` has each row's state in the index, and the number of its tokens up to there. `ended` are the
    rows whose turns have ended, and `replayed` is the number of tokens of each row at its last replay (`replay`). An
    index that no longer `grows` still follows the rows through the tokens that it holds.
    """

    key: tuple[int, ...]
    past: list[array[int]]
    others: list[Other]
    states: dict[Row, tuple[int, int]] = field(default_factory=dict)
    index: SuffixAutomaton | None = None
    prompt_state: int = ROOT
    ended: dict[Row, None] = field(default_factory=dict)
    replayed: dict[Row, int] = field(default_factory=dict)
    grows: bool = True

    @property
    def size(self) -> int:
        """The number of states in the index."""
        return 0 if self.index is None else len(self.index)

    @property
    def seen(self) -> bool:
        """Whether there are earlier completions of this prompt."""
        return bool(self.past)

    @property
    def background(self) -> int:
        """The number of tokens that a new index starts with."""
        others = sum(len(lead) + len(completion) for lead, completion in self.others)
        return others + len(self.key) + sum(map(len, self.past))

    def new_index(self) -> tuple[SuffixAutomaton, int]:
        """A new index without the group's own rows, and the state of the prompt in it."""
        index = SuffixAutomaton()
        for lead, completion in self.others:
            index.extend(index.extend(ROOT, lead), completion)
        prompt = index.extend(ROOT, self.key)
        for completion in self.past:
            index.extend(prompt, completion)
        return index, prompt

    def likely(self, row: Row, most: int, room: int) -> list[int]:
        """Up to `most` tokens that may follow a row's last token. First indexes the row's tokens since the last call.

        The index grows by at most `room` states, and is not built if it would not fit.
        """
        if self.index is None:
            if STATES * self.background >= room:
                return []
            self.index, self.prompt_state = self.new_index()
            room -= self.size
        state, known = self.states.get(row, (self.prompt_state, 0))
        if new := row.token_ids[known:]:
            # Once tokens were left out, there is a gap, and nothing may be appended after it.
            self.grows = self.grows and STATES * len(new) <= room
            state = self.index.extend(state, new) if self.grows else self.index.follow(state, new)
            self.states[row] = state, len(row.token_ids)
        return self.index.likely(state, most)


class Drafts:
    """Drafts for rows, from an index per group and a memory of completions. An index is built on first use."""

    def __init__(self) -> None:
        self.memory = History()
        self._groups: dict[SharedPrompt, Siblings] = {}
        self._indexed = 0

    def propose(self, row: Row, most: int) -> list[int]:
        """Up to `most` tokens that may follow a row's last token."""
        group = self.group(row.prompt)
        before = group.size
        tokens = group.likely(row, most, INDEXED - self._indexed)
        self._indexed += group.size - before
        return tokens

    def group(self, prompt: SharedPrompt) -> Siblings:
        """The group of a prompt. Prompts in flight with the same ids share it, because lanes may split a group.

        Creating a group drops the groups whose rows have all left.
        """
        group = self._groups.get(prompt)
        if group is None:
            self._groups = {other: known for other, known in self._groups.items() if other.left > 0}
            self._indexed = sum(known.size for known in set(self._groups.values()))
            group = self._groups[prompt] = self._new_group(tuple(prompt.ids))
        return group

    def _new_group(self, key: tuple[int, ...]) -> Siblings:
        if shared := [group for group in self._groups.values() if group.key == key]:
            return shared[0]
        past = self.memory.of(key)
        others = [] if past else self.memory.others()
        room = (INDEXED - self._indexed) // 2 // STATES - len(key)  # half is left for new tokens and other groups
        return Siblings(key, _newest(past, len, room), _newest(others, lambda other: sum(map(len, other)), room))

    def remember(self, row: Row) -> None:
        """Keep the completion of a row whose turn has ended."""
        self.memory.add(self.group(row.prompt).key, row.token_ids)


def _newest(completions: list[T], size: Callable[[T], int], room: int) -> list[T]:
    """The newest completions that fit into `room` together, oldest first. `size` and `room` are in tokens."""
    fitting: list[T] = []
    for completion in reversed(completions):
        room -= size(completion)
        if room < 0:
            break
        fitting.append(completion)
    return fitting[::-1]
