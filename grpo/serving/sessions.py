"""Sessions: the requests of one agent, and the answers that it got."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from threading import Lock

from grpo.environments.template import text_of
from grpo.generation.sampling import Sampling
from grpo.serving.refusals import Refusal, wrong
from grpo.types import Message

MOST_SESSIONS, MOST_CHARACTERS, MOST_SAID = 1024, 2**24, 8
"""Limits for sessions that were not opened: the number of sessions, the characters and tokens of all of them, and the
newest answers of each. The least recently used session is dropped first."""
LONGEST_ID = 256


@dataclass(frozen=True, slots=True)
class SessionRules:
    """How an open session is sampled. Its requests cannot change this.

    A request may set `temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty` only to the values in `recipe`;
    the values in `sampling` are used. In training, both are the same. An evaluation has its own `sampling`, while the
    agent's requests stay as in training. With `keep_thinking`, earlier thinking stays in a conversation even if the
    chat template would leave it out.
    """

    sampling: Sampling
    recipe: Sampling
    keep_thinking: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer: `token_ids` after `prompt_ids`, and the same conversation as messages.

    `own_ids` are the prompt's tokens after all tokens of the answer that it `follows`, so that a long conversation is
    stored once, not once per turn. `settings` identifies the tools and the arguments of the chat template. It is None
    for a prompt of text or tokens; such a prompt, or the part after the answer that it follows, counts as a user
    message, and no chat can continue it. `marks` has a hash of each message.
    """

    messages: tuple[Message, ...]
    answer: Message
    own_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    settings: str | None = None
    marks: tuple[bytes, ...] = field(default=(), repr=False)
    follows: Answered | None = field(default=None, repr=False, compare=False)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """All tokens of the prompt."""
        parts, before = [self.own_ids], self.follows
        while before is not None:
            parts += [before.token_ids, before.own_ids]
            before = before.follows
        return tuple(token for part in reversed(parts) for token in part)

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether `ids` begin with all tokens of this prompt and answer, and have more."""
        known = (*self.prompt_ids, *self.token_ids)
        return len(known) < len(ids) and tuple(ids[: len(known)]) == known

    @property
    def size(self) -> int:
        """The approximate number of characters and tokens."""
        return len(self.prompt_ids) + len(self.token_ids) + len(str(self.messages)) + len(str(self.answer))


class SessionMemory:
    """The answers of a session, in the order in which they ended. Safe to use from any thread.

    `most` is the number of answers to keep, the newest; None: all.
    """

    def __init__(self, id: str, rules: SessionRules | None = None, most: int | None = None) -> None:
        self.id, self.rules = id, rules
        self._most, self._said, self._sizes = most, list[Answered](), list[int]()
        self._lock, self._over = Lock(), False

    @property
    def said(self) -> tuple[Answered, ...]:
        with self._lock:
            return tuple(self._said)

    def add(self, said: Iterable[Answered]) -> None:
        """Remember answers. Does nothing if the session is over."""
        with self._lock:
            new = () if self._over else tuple(said)
            self._said += new
            if self._most is not None:
                self._sizes += [answered.size for answered in new]
                del self._said[: -self._most], self._sizes[: -self._most]

    @property
    def size(self) -> int:
        """The approximate number of characters and tokens; 0 for a session that keeps all answers."""
        return sum(self._sizes)

    def close(self) -> None:
        """Do not accept any more answers."""
        with self._lock:
            self._over = True

    def before(self, settings: str, messages: Sequence[Message], marks: Sequence[bytes]) -> Answered | None:
        """The longest conversation that these messages continue with at least one message after its answer; the newest
        if there are several.

        Messages are equal if role, text, name and calls are equal. Ids of calls do not matter, and thinking matters
        only if it was sent back.
        """
        found = [past for past in self.said if past.settings == settings and _begins(past, messages, marks)]
        return max(reversed(found), key=lambda past: len(past.messages), default=None)

    def before_tokens(self, ids: Sequence[int]) -> Answered | None:
        """The newest answer to a prompt of text or tokens that these tokens continue (see `Answered.begins`)."""
        return next((past for past in reversed(self.said) if past.settings is None and past.begins(ids)), None)


class Sessions:
    """The sessions of a service by id. Safe to use from any thread.

    The owner of the service opens and ends sessions. Unless `opened_only`, any other id is also a session, which is
    remembered for a while.
    """

    def __init__(self, opened_only: bool = False) -> None:
        self._opened_only, self._lock = opened_only, Lock()
        self._opened: dict[str, SessionMemory] = {}
        self._kept: OrderedDict[str, SessionMemory] = OrderedDict()

    def open(self, id: str, rules: SessionRules) -> None:
        """Begin a session. Raises ValueError if it is already open."""
        with self._lock:
            if id in self._opened:
                raise ValueError(f"session {id!r} is already open")
            self._opened[id] = SessionMemory(id, rules)

    def end(self, id: str) -> SessionMemory:
        """End an open session, and return its answers, to which no more are added. Raises KeyError if the session is
        not open."""
        with self._lock:
            memory = self._opened.pop(id)
        memory.close()
        return memory

    def find(self, id: str | None) -> SessionMemory | None:
        """The session with this id; None if a request names no session. With `opened_only`, raises Refusal if there is
        no id, or the session is not open."""
        with self._lock:
            if id in self._opened:
                return self._opened[id]
            if self._opened_only:
                raise _not_open(id)
            return None if id is None else self._remembered(id)

    def _remembered(self, id: str) -> SessionMemory:
        memory = self._kept.setdefault(id, SessionMemory(id, most=MOST_SAID))
        self._kept.move_to_end(id)
        while len(self._kept) > MOST_SESSIONS or sum(kept.size for kept in self._kept.values()) > MOST_CHARACTERS:
            self._kept.popitem(last=False)
        return memory


def marks_of(messages: Iterable[Message]) -> tuple[bytes, ...]:
    """A hash of each message, to compare messages. Raises UserError for content that is not text, and Refusal for tool
    calls that are nested too deeply."""
    return tuple(_mark(message) for message in messages)


def session_id(segment: str | None, headers: Sequence[str]) -> str | None:
    """The session that a request names in its URL, or else in the header X-Session-ID; None if it names no session.
    Raises Refusal for two names, and for an invalid name.

    If the URL names a session, the header is ignored: clients may use it for their own purposes. (verifiers sends the
    id of its trace, for routers.)
    """
    named = [segment] if segment is not None else list(dict.fromkeys(headers))
    if len(named) > 1:
        what = f"the request names two sessions, {named[0]!r:.100} and {named[1]!r:.100}: name only one"
        raise Refusal(400, what, "two_sessions")
    if named and not (0 < len(named[0]) <= LONGEST_ID and named[0].isprintable()):
        raise Refusal(400, f"a session's id must have 1 to {LONGEST_ID} printable characters", "invalid_session")
    return named[0] if named else None


def _not_open(id: str | None) -> Refusal:
    if id is None:
        return Refusal(400, "the request names no session: use the base URL that the agent was given", "no_session")
    return Refusal(404, f"session {id!r:.100} is not open: its rollout has ended, or never began", "session_over")


def _begins(past: Answered, messages: Sequence[Message], marks: Sequence[bytes]) -> bool:
    count = len(past.marks)
    if count >= len(marks) or tuple(marks[:count]) != past.marks:
        return False
    before = [*past.messages, past.answer]
    return all(_same_thinking(stored, sent) for stored, sent in zip(before, messages[:count], strict=True))


def _same_thinking(stored: Message, sent: Message) -> bool:
    thought = sent.get("reasoning_content")
    return thought is None or thought == stored.get("reasoning_content")


def _mark(message: Message) -> bytes:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    made = [(call["name"], call["arguments"]) for call in calls]
    compared = [message["role"], text_of(message.get("content")), message.get("name"), made]
    try:
        text = json.dumps(compared, sort_keys=True)
    except RecursionError:
        raise wrong("messages", "the arguments of a tool call are nested too deeply") from None
    return blake2b(text.encode(), digest_size=16).digest()
