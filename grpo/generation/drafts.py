"""Guesses of what rows say next, from what was said before: drafts that cost no model.

They come from the row's group, its prompt, its earlier turns and what tools returned (prompt lookup), and this prompt's
earlier completions, of evaluations too. A prompt that is new begins with completions of other prompts.
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
"""Tokens of earlier completions that are kept, 4 bytes each; beyond that the prompts unused for longest go."""
OF_A_PROMPT = 8
"""The newest completions of a prompt that are kept. 16 and 32 were no better: the policy changes."""
OF_OTHERS = 32
"""Completions of other prompts that a new prompt begins with."""
INDEXED = 2**18
"""States in the indices of all groups in flight, some 330 bytes each. Beyond that indices grow no more, and a new group
gets no drafts."""
STATES = 2
"""States that a token adds to an index at the most."""
LEAD = 8
"""Tokens of another prompt's end that stand before its completions."""

T = TypeVar("T")
Other = tuple[tuple[int, ...], "array[int]"]
"""A completion of another prompt, behind the last tokens of that."""


class History:
    """Completions by the ids of their prompts."""

    def __init__(self, tokens: int = REMEMBERED) -> None:
        self._most, self._held = tokens, 0
        self._of: OrderedDict[tuple[int, ...], list[array[int]]] = OrderedDict()
        self._newest: deque[Other] = deque(maxlen=OF_OTHERS)

    def of(self, prompt: tuple[int, ...]) -> list[array[int]]:
        """A prompt's completions, oldest first."""
        return self._of.get(prompt, [])

    def others(self) -> list[Other]:
        """The newest completions of any prompts, oldest first."""
        return list(self._newest)

    def add(self, prompt: tuple[int, ...], completion: Sequence[int]) -> None:
        """Keep a completion. One that goes on where another has ended (in a further turn) takes its place."""
        tokens, former = array("I", completion), self._of.get(prompt, [])
        kept = [one for one in former if not (len(one) < len(tokens) and tokens[: len(one)] == one)]
        kept = [*kept, tokens][-OF_A_PROMPT:]
        self._held += sum(map(len, kept)) - sum(map(len, former))
        self._of[prompt] = kept
        self._of.move_to_end(prompt)
        self._newest.append((prompt[-LEAD:], tokens))
        while self._held > self._most:
            _, gone = self._of.popitem(last=False)
            self._held -= sum(map(len, gone))


@dataclass(slots=True, eq=False)
class Siblings:
    """The rows of a prompt that are in flight, and the index that they are guessed from, once that is asked for.

    `past` has the prompt's completions from before the group began, and `others` those of other prompts, if there were
    none. `states` has the place of each row in the index, and how many of its tokens led there. `ended` are the rows
    whose turns have ended, and `replayed` says how many tokens rows had when they were last replayed (`replay`). An
    index that `grows` no more still knows where rows are, by what was said before.
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
        """States of the index."""
        return 0 if self.index is None else len(self.index)

    @property
    def seen(self) -> bool:
        """Whether there were completions of this prompt before."""
        return bool(self.past)

    @property
    def background(self) -> int:
        """Tokens that an index begins with."""
        others = sum(len(lead) + len(completion) for lead, completion in self.others)
        return others + len(self.key) + sum(map(len, self.past))

    def new_index(self) -> tuple[SuffixAutomaton, int]:
        """An index of all but the group's own rows, and the state of the prompt in it."""
        index = SuffixAutomaton()
        for lead, completion in self.others:
            index.extend(index.extend(ROOT, lead), completion)
        prompt = index.extend(ROOT, self.key)
        for completion in self.past:
            index.extend(prompt, completion)
        return index, prompt

    def likely(self, row: Row, most: int, room: int) -> list[int]:
        """Tokens that may follow a row's last. Takes in what the row has said since it was last asked.

        The index takes in no more than there is `room` for, in states, and is not made where it would not fit.
        """
        if self.index is None:
            if STATES * self.background >= room:
                return []
            self.index, self.prompt_state = self.new_index()
            room -= self.size
        state, known = self.states.get(row, (self.prompt_state, 0))
        if new := row.token_ids[known:]:
            # What was left out once has a gap behind it: nothing may be appended there.
            self.grows = self.grows and STATES * len(new) <= room
            state = self.index.extend(state, new) if self.grows else self.index.follow(state, new)
            self.states[row] = state, len(row.token_ids)
        return self.index.likely(state, most)


class Drafts:
    """Drafts for rows, and the memory behind them. Nothing is indexed before drafts of a group are asked for."""

    def __init__(self) -> None:
        self.memory = History()
        self._groups: dict[SharedPrompt, Siblings] = {}
        self._indexed = 0

    def propose(self, row: Row, most: int) -> list[int]:
        """Up to `most` tokens that may follow a row's last."""
        group = self.group(row.prompt)
        before = group.size
        tokens = group.likely(row, most, INDEXED - self._indexed)
        self._indexed += group.size - before
        return tokens

    def group(self, prompt: SharedPrompt) -> Siblings:
        """What is known of a prompt's group, which prompts in flight with the same ids share: lanes divide a group.

        With a new one, groups whose rows have all left are forgotten.
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
        room = (INDEXED - self._indexed) // 2 // STATES - len(key)  # half is for what rows say, and for other groups
        return Siblings(key, _newest(past, len, room), _newest(others, lambda other: sum(map(len, other)), room))

    def remember(self, row: Row) -> None:
        """Keep the completion of a row whose turn has ended."""
        self.memory.add(self.group(row.prompt).key, row.token_ids)


def _newest(said: list[T], size: Callable[[T], int], room: int) -> list[T]:
    """The newest of these that together have room, oldest first. `size` and `room` are in tokens."""
    taken: list[T] = []
    for one in reversed(said):
        room -= size(one)
        if room < 0:
            break
        taken.append(one)
    return taken[::-1]
