"""A suffix automaton of token sequences: finds earlier occurrences of a context, and the tokens that followed most.

The online construction is by Blumer et al. (1985), here for several sequences that grow at the same time. Drafts from
such an index of earlier outputs: SuffixDecoding (arXiv 2411.04975); of a policy's rollouts: DAS (arXiv 2511.13841).
"""

from __future__ import annotations

from collections.abc import Iterable

COUNTED = 8
"""A token is counted in this many of its contexts, from the longest down. It has as many contexts as there are tokens
before it, too many to count in all of them."""
ROOT = 0
"""The state of the empty context."""


class SuffixAutomaton:
    """Sequences of tokens, and for each context in them how often each token followed.

    A state stands for the contexts that always end at the same places. A state also identifies a sequence: begin at
    `ROOT`, or at the state of another sequence to branch off from it. States are integers that index lists, because
    Python's garbage collector does not traverse dicts of integers.
    """

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._count = [-1], [0], [0]

    def __len__(self) -> int:
        """The number of states: at most two per token."""
        return len(self._link)

    def extend(self, state: int, tokens: Iterable[int]) -> int:
        """Append tokens to the sequence of a state. Returns the longer sequence's state."""
        link, count = self._link, self._count
        for token in tokens:
            state = self._append(state, token)
            shorter = state
            for _ in range(COUNTED):
                if shorter <= ROOT:
                    break
                count[shorter] += 1
                shorter = link[shorter]
        return state

    def follow(self, state: int, tokens: Iterable[int]) -> int:
        """The state of the longest known context after a sequence and more tokens. Adds no tokens."""
        following, link = self._next, self._link
        for token in tokens:
            while state != ROOT and token not in following[state]:
                state = link[state]
            state = following[state].get(token, ROOT)
        return state

    def likely(self, state: int, most: int) -> list[int]:
        """Up to `most` tokens that may follow a sequence.

        Each is the most frequent token after the longest context that had a next token; of equally frequent tokens, the
        newest. After an empty context, there is no guess.
        """
        following, link, count = self._next, self._link, self._count
        tokens: list[int] = []
        while len(tokens) < most:
            while state != ROOT and not following[state]:
                state = link[state]
            if state == ROOT:
                break
            candidates = following[state]
            if len(candidates) == 1:
                ((token, state),) = candidates.items()
            else:
                token, state = max(reversed(candidates.items()), key=lambda item: count[item[1]])
            tokens.append(token)
        return tokens

    def _append(self, last: int, token: int) -> int:
        following, length = self._next, self._length
        known = following[last].get(token)
        if known is not None:  # another sequence has the same context and token
            return known if length[known] == length[last] + 1 else self._split(last, token, known)
        state = self._new({}, length[last] + 1, ROOT, 0)
        at = last
        while at >= ROOT and token not in following[at]:
            following[at][token] = state
            at = self._link[at]
        if at >= ROOT:
            shorter = following[at][token]
            is_whole = length[shorter] == length[at] + 1
            self._link[state] = shorter if is_whole else self._split(at, token, shorter)
        return state

    def _split(self, at: int, token: int, state: int) -> int:
        """Split off the shorter contexts of `state`, those that go through `at`, into a new state."""
        split = self._new(dict(self._next[state]), self._length[at] + 1, self._link[state], self._count[state])
        self._link[state] = split
        while at >= ROOT and self._next[at].get(token) == state:
            self._next[at][token] = split
            at = self._link[at]
        return split

    def _new(self, following: dict[int, int], length: int, link: int, count: int) -> int:
        self._next.append(following)
        self._length.append(length)
        self._link.append(link)
        self._count.append(count)
        return len(self._link) - 1
