"""Keeps keys and values of sessions' answers, so that the next turns need not compute their history again."""

from __future__ import annotations

from collections import OrderedDict

from grpo.generation.rows import Computed, Row
from grpo.serving.asks import Ask

MOST_OF_A_SESSION = 4
"""Number of answers kept per session, the newest. A session may continue from an earlier answer, or branch."""

Key = tuple[str, str]
"""An adapter's name and a session's id: keys and values belong to the weights that computed them."""


class Recall:
    """Keeps keys and values of the most recently used sessions, up to `most_bytes`. For the decoding thread only."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.nbytes = most_bytes, 0
        self._kept: OrderedDict[Key, list[Computed]] = OrderedDict()
        self._ended: dict[Row, Key] = {}

    def find(self, ask: Ask) -> Computed | None:
        """The keys and values that cover most of a request's prompt; None if there are none, or no session."""
        if (key := _key(ask)) is None or key not in self._kept:
            return None
        self._kept.move_to_end(key)
        best = max(self._kept[key], key=lambda computed: computed.usable(ask.prompt_ids))
        return best if best.usable(ask.prompt_ids) else None

    def expect(self, ask: Ask, row: Row) -> None:
        """Note that a row of this request has ended: the next `collect`, or a later one, gets its keys and values."""
        if (key := _key(ask)) is not None:
            self._ended[row] = key

    def collect(self) -> None:
        """Take the keys and values that ended rows have left."""
        for row in [row for row in self._ended if row.computed is not None]:
            key, computed, row.computed = self._ended.pop(row), row.computed, None
            assert computed is not None
            self._add(key, computed)

    def clear(self) -> None:
        """Drop everything that is kept or expected."""
        self._kept.clear()
        self._ended.clear()
        self.nbytes = 0

    def _add(self, key: Key, new: Computed) -> None:
        others = [old for old in self._kept.pop(key, []) if old.shared(new.token_ids) < len(old.token_ids)]
        self._kept[key] = [*others, new][-MOST_OF_A_SESSION:]
        self._count()
        while self.nbytes > self.most_bytes:
            self._kept.popitem(last=False)
            self._count()

    def _count(self) -> None:
        self.nbytes = sum(computed.nbytes for kept in self._kept.values() for computed in kept)


def _key(ask: Ask) -> Key | None:
    return None if ask.session is None else (ask.model, ask.session)
