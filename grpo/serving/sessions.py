"""Sessions: the requests of one agent, and what was answered to them."""

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
"""What is remembered of sessions that nobody has opened: so many, so many characters and tokens in all, and of each
so many of the newest answers. The session unused for longest goes first."""
LONGEST_ID = 256


@dataclass(frozen=True, slots=True)
class SessionRules:
    """How an open session is sampled, which its requests cannot change.

    A request may say `temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty` as the `recipe` has them, and
    nothing else; they are as `sampling` has them. In training both are the same; an evaluation passes its own
    `sampling`, and the agent asks as it does in training. `keep_thinking` says that earlier thinking stays in a
    conversation also where the chat template would leave it out.
    """

    sampling: Sampling
    recipe: Sampling
    keep_thinking: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer that was given: `token_ids` after `prompt_ids`, and the same as messages.

    `own_ids` are what the prompt has after all tokens of the answer that it `follows`, so that a long conversation is
    kept once, and not once for each turn. `settings` stands for the tools and the arguments of the chat template; it is
    None for a prompt of text or tokens, which is a user's message here, or what it adds to such an answer. Of that no
    chat goes on.
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
        """Whether tokens are all of these and more."""
        known = (*self.prompt_ids, *self.token_ids)
        return len(known) < len(ids) and tuple(ids[: len(known)]) == known

    @property
    def size(self) -> int:
        """Characters and tokens, about."""
        return len(self.prompt_ids) + len(self.token_ids) + len(str(self.messages)) + len(str(self.answer))


class SessionMemory:
    """The answers of a session, in the order in which they ended. For any thread.

    `most` is how many are kept, None for all.
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
        """Remember answers; nothing if the session is over."""
        with self._lock:
            new = () if self._over else tuple(said)
            self._said += new
            if self._most is not None:
                self._sizes += [one.size for one in new]
                del self._said[: -self._most], self._sizes[: -self._most]

    @property
    def size(self) -> int:
        """Characters and tokens, about, where not all answers are kept."""
        return sum(self._sizes)

    def close(self) -> None:
        """Let nothing be added any more."""
        with self._lock:
            self._over = True

    def before(self, settings: str, messages: Sequence[Message], marks: Sequence[bytes]) -> Answered | None:
        """The longest conversation that these messages go on from: its own, its answer, and at least one more. The
        newest of several.

        Messages are the same if role, text, name and calls are; ids of calls do not count, nor does thinking that was
        not sent back.
        """
        found = [one for one in self.said if one.settings == settings and _begins(one, messages, marks)]
        return max(reversed(found), key=lambda one: len(one.messages), default=None)

    def before_tokens(self, ids: Sequence[int]) -> Answered | None:
        """The newest answer to text or tokens that these tokens go on from: its own, its answer's, and more."""
        return next((one for one in reversed(self.said) if one.settings is None and one.begins(ids)), None)


class Sessions:
    """The sessions of a service by id. For any thread.

    Some are opened and ended by who owns the service. Unless `opened_only`, any other id is a session, too, which is
    remembered for a while.
    """

    def __init__(self, opened_only: bool = False) -> None:
        self._opened_only, self._lock = opened_only, Lock()
        self._opened: dict[str, SessionMemory] = {}
        self._kept: OrderedDict[str, SessionMemory] = OrderedDict()

    def open(self, id: str, rules: SessionRules) -> None:
        """Begin a session. Raises ValueError for one that is open."""
        with self._lock:
            if id in self._opened:
                raise ValueError(f"session {id!r} is open already")
            self._opened[id] = SessionMemory(id, rules)

    def end(self, id: str) -> SessionMemory:
        """End an open session, and give what was said in it. Nothing is added to that any more. Raises KeyError for a
        session that is not open."""
        with self._lock:
            memory = self._opened.pop(id)
        memory.close()
        return memory

    def find(self, id: str | None) -> SessionMemory | None:
        """The session of a request; None for a request without. Raises Refusal for a session that is over, or was
        never opened, and for no session, where sessions must be open."""
        with self._lock:
            if id in self._opened:
                return self._opened[id]
            if self._opened_only:
                raise _not_open(id)
            return None if id is None else self._remembered(id)

    def _remembered(self, id: str) -> SessionMemory:
        memory = self._kept.setdefault(id, SessionMemory(id, most=MOST_SAID))
        self._kept.move_to_end(id)
        while len(self._kept) > MOST_SESSIONS or sum(one.size for one in self._kept.values()) > MOST_CHARACTERS:
            self._kept.popitem(last=False)
        return memory


def marks_of(messages: Iterable[Message]) -> tuple[bytes, ...]:
    """What tells messages apart, one for each. Raises UserError for content that is no text, and Refusal."""
    return tuple(_mark(message) for message in messages)


def session_id(segment: str | None, headers: Sequence[str]) -> str | None:
    """The session that a request names in its URL, or else in its headers X-Session-ID; None if it names none. Raises
    Refusal for two, and for what is no name.

    Where the URL names one, headers are the client's own: verifiers sends the id of its trace, for routers.
    """
    named = [segment] if segment is not None else list(dict.fromkeys(headers))
    if len(named) > 1:
        raise Refusal(400, f"two sessions are named, {named[0]!r:.100} and {named[1]!r:.100}: name one", "two_sessions")
    if named and not (0 < len(named[0]) <= LONGEST_ID and named[0].isprintable()):
        raise Refusal(400, f"a session's id is 1 to {LONGEST_ID} printable characters", "invalid_session")
    return named[0] if named else None


def _not_open(id: str | None) -> Refusal:
    if id is None:
        return Refusal(400, "the request names no session: use the base URL that the agent was given", "no_session")
    return Refusal(404, f"session {id!r:.100} is over, or never began: its rollout has ended", "session_over")


def _begins(said: Answered, messages: Sequence[Message], marks: Sequence[bytes]) -> bool:
    known = len(said.marks)
    if known >= len(marks) or tuple(marks[:known]) != said.marks:
        return False
    before = [*said.messages, said.answer]
    return all(_thinks_alike(one, other) for one, other in zip(before, messages[:known], strict=True))


def _thinks_alike(said: Message, given: Message) -> bool:
    thought = given.get("reasoning_content")
    return thought is None or thought == said.get("reasoning_content")


def _mark(message: Message) -> bytes:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    made = [(call["name"], call["arguments"]) for call in calls]
    told = [message["role"], text_of(message.get("content")), message.get("name"), made]
    try:
        text = json.dumps(told, sort_keys=True)
    except RecursionError:
        raise wrong("messages", "the arguments of a call are nested too deeply") from None
    return blake2b(text.encode(), digest_size=16).digest()
