"""One conversation: the model's turns, and the answers of its environment and tools."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from grpo.environments.anew import Anew, joined
from grpo.environments.chat import without_end
from grpo.environments.failedcalls import as_result
from grpo.environments.openings import with_added
from grpo.environments.sampler import Sampler
from grpo.environments.scheduler import TimeIsUpError
from grpo.environments.seats import ConversationLimits, Description, Host, Reply, Seat
from grpo.errors import UserError
from grpo.generation.generator import trajectory_of
from grpo.generation.rows import Row
from grpo.types import Conversation, Failure, FinishReason, Message, Trajectory


class ChatCodec(Protocol):
    """Converts messages to tokens, and the model's tokens to messages. See `grpo.environments.chat`."""

    def prompt_ids(self, messages: Sequence[Message]) -> Sequence[int]:
        """Return the tokens of a prompt, up to the model's answer. Raises UserError as `suffix_ids` does."""
        ...

    def parse(self, token_ids: Sequence[int]) -> Message:
        """Parse the tokens of a turn, including its last token, into the assistant's message, with any `tool_calls`."""
        ...

    def can_follow(self, role: str, turn_ids: Sequence[int]) -> bool:
        """Whether messages of this role can follow a turn with these tokens."""
        ...

    def suffix_ids(self, turn_ids: Sequence[int], messages: Sequence[Message]) -> Sequence[int] | None:
        """Return the tokens, with these messages, between a turn and the model's next turn; None if none can follow.

        Raises UserError for messages that cannot be encoded.
        """
        ...


@dataclass(frozen=True)
class Table:
    """What a conversation needs: the environment's host, and how the model talks to it.

    With `anew`, a conversation continues in a new row when, after a user's message, the chat template writes earlier
    text differently; without it, all turns are in one row. With `keeps_seats`, a conversation keeps its seat as `home`
    until it is scored, and the scorer releases the seat. `tell` is called with the prompt and the new messages as soon
    as they exist.
    """

    host: Host
    chat: ChatCodec
    limits: ConversationLimits = field(default_factory=ConversationLimits)
    keeps_seats: bool = False
    anew: Anew | None = None
    tell: Callable[[Sequence[Message], Sequence[Message]], object] | None = None

    @cached_property
    def description(self) -> Description:
        """The host's description."""
        return self.host.description


class _BrokenOffError(Exception):
    """The conversation cannot continue, for this reason."""

    def __init__(self, reason: FinishReason) -> None:
        self.reason = reason


class Play:
    """A conversation in progress. `prompt` has the messages before the first turn."""

    def __init__(self, table: Table, seat: Seat, sampler: Sampler, prompt: Sequence[Message]) -> None:
        self.table, self.seat, self.sampler, self.prompt = table, seat, sampler, tuple(prompt)
        self.prompt_ids: Sequence[int] = sampler.task.prompt_ids
        self.failure: Failure | None = None
        self._messages: list[Message] = []
        self._turn_rewards: list[float | None] = []
        self._outcome: float | None = None
        self._calls = self._failed_calls = 0
        self._until: float | None = None
        self._end: FinishReason | None = None
        self._busy = self._left = False
        self._earlier: list[tuple[Trajectory, str]] = []

    @property
    def lasting(self) -> Sequence[int]:
        """The tokens with which all rows of the conversation begin."""
        return self.prompt_ids if self.table.anew is None else self._lasting

    async def reset(self, columns: Mapping[str, Any], seed: int, longest: int) -> None:
        """Reset the environment, and add what it returns to the prompt, which may have at most `longest` tokens."""
        try:
            reply = await self._reply(self.seat.reset(columns, seed))
            if reply.value is not None:
                self.prompt = with_added(self.prompt, reply.value)
                self.prompt_ids = self._written(self.table.chat.prompt_ids, self.prompt)
            if (anew := self.table.anew) is not None:
                self._lasting = self._written(anew.lasting, self.prompt, self.prompt_ids)
        except _BrokenOffError:
            return
        if (length := len(self.prompt_ids)) > longest:
            said = f"the prompt has {length:,} tokens after reset, but data.max_prompt_length is {longest:,}"
            self.failure = Failure("error", said)

    async def play(self, row: Row) -> Trajectory:
        """Play turns until the conversation ends, and then call the environment's `get_reward` if it has one."""
        self._row = row
        if self.failure is not None:  # `reset` failed, so there is no turn
            return self._result("failed")
        if (limit := self.table.limits.rollout_timeout) is not None:
            self._until = time.monotonic() + limit
        try:
            reason = await self._turns()
        except _BrokenOffError as broken:
            reason = broken.reason
        self.sampler.release(self._row)
        if self.table.description.rewards and self.failure is None and not self._busy:
            reason = await self._rewarded(reason)
        return self._result(reason)

    def leave(self) -> None:
        """Release the seat, unless this was done before."""
        if not self._left:
            self._left = True
            self.seat.release()

    def _say(self, messages: Sequence[Message]) -> None:
        self._messages += messages
        if self.table.tell is not None:
            self.table.tell(self.prompt, messages)

    async def _turns(self) -> FinishReason:
        """Play all turns, and return why the conversation ended. Raises _BrokenOffError if it cannot continue."""
        chat, most = self.table.chat, self.table.limits.max_turns
        while True:
            row = self._row
            reason = await self.sampler.turn(row, self._until)
            if not row.turn:  # time was up before its first token
                return reason
            message = without_end(chat.parse(row.turn), row.stopping.cut(row.token_ids))
            self._say([message])
            self._turn_rewards.append(None)
            if reason != "stop" or not chat.can_follow("tool" if "tool_calls" in message else "user", row.turn):
                return reason
            answers = await self._answers(message)
            if len(self._turn_rewards) == most:
                self._end = self._end or "max_turns"
            suffix = () if self._end else self._written(chat.suffix_ids, row.turn, answers)
            if len(suffix) > row.room:  # no room for the answer and a token after it: drop the answer
                return "length"
            anew = self._anew(answers, suffix) if suffix else None
            if anew is not None and self._room_after(anew, suffix) < 1:
                return "length"
            self._say(answers)
            if not suffix:
                return self._end or "done"
            if anew is None:
                self.sampler.go_on(row, suffix)
            else:
                self._begin_anew(anew, suffix)

    def _anew(self, answers: Sequence[Message], suffix: Sequence[int]) -> Sequence[int] | None:
        """Return the prompt of a new row, if the template writes the conversation otherwise than in the current row."""
        if (anew := self.table.anew) is None or all(one["role"] == "tool" for one in answers):
            return None
        prompt_ids = self._written(anew.prompt_ids, self.prompt, [*self._messages, *answers])
        shared = self.sampler.task.prompt_ids
        if tuple(prompt_ids) == (*shared, *self._row.token_ids, *suffix):
            return None
        if tuple(prompt_ids[: len(shared)]) != shared:
            why = "the model's chat template changes how a prompt begins as the conversation continues"
            self.failure = Failure("error", f"{why}: use thinking: keep")
            raise _BrokenOffError("failed")
        return prompt_ids

    def _room_after(self, prompt_ids: Sequence[int], suffix: Sequence[int]) -> int:
        """Return the maximum number of tokens of a new row.

        This is the completion limit minus the length of the conversation so far: all sampled tokens and the messages
        between them, or the part of them that the new row reads again if that is longer.
        """
        again = len(prompt_ids) - len(self.prompt_ids)
        return min(self._row.longest - len(self._row.token_ids) - len(suffix), self.sampler.longest - again)

    def _begin_anew(self, prompt_ids: Sequence[int], suffix: Sequence[int]) -> None:
        row, room = self._row, self._room_after(prompt_ids, suffix)
        said = self.sampler.tokenizer.decode(list(suffix), skip_special_tokens=True)
        self._earlier.append((trajectory_of(row), said))
        self._row = self.sampler.begin_anew(row, prompt_ids, room)

    async def _answers(self, message: Message) -> list[Message]:
        """Return the environment's messages in answer to a turn."""
        if calls := message.get("tool_calls"):
            most = self.table.limits.max_tool_calls
            allowed = len(calls) if most is None else most - self._calls
            answers = [await self._call(call["function"]) for call in calls[:allowed]]
            if allowed < len(calls):
                self._end = self._end or "max_tool_calls"
            return answers
        if self.table.description.kind == "tools":
            self._end = "stop"
            return []
        reply = self._counted(await self._reply(self.seat.step(message)))
        return _messages_of(reply.value)

    async def _call(self, function: Mapping[str, Any]) -> Message:
        """Call a tool and return the message with its result, or with its error. The conversation continues after an
        error."""
        name = function["name"]
        self._calls += 1
        reply = self._counted(await self._reply(self.seat.call(name, function["arguments"]), goes_on=True))
        if reply.kind == "error":
            self._failed_calls += 1
            return {"role": "tool", "name": name, "content": as_result(reply.error)}
        return {"role": "tool", "name": name, "content": "" if reply.value is None else reply.value}

    async def _rewarded(self, reason: FinishReason) -> FinishReason:
        """Call the environment's `get_reward`. Returns `reason`, or another stop reason if the call fails."""
        self._until = None
        try:
            self._outcome = (await self._reply(self.seat.reward())).value
        except _BrokenOffError as broken:
            return broken.reason
        return reason

    async def _reply(self, called: Future[Reply], goes_on: bool = False) -> Reply:
        """Wait for the reply to a call. A lost seat ends the conversation, and so does an error unless `goes_on`."""
        try:
            reply = await self.sampler.outside(called, self._until)
        except TimeIsUpError:
            self._busy = True
            raise _BrokenOffError("rollout_timeout") from None
        if reply.kind != "ok" and not (goes_on and reply.kind == "error"):
            self.failure = Failure(reply.kind, reply.error)
            raise _BrokenOffError("failed")
        return reply

    def _written(self, write: Callable[..., Sequence[int] | None], *given: Any) -> Sequence[int]:
        """Encode an environment's messages. Empty if they cannot follow; the conversation fails if they cannot be
        encoded."""
        try:
            return write(*given) or ()
        except UserError as error:
            self.failure = Failure("error", str(error))
            raise _BrokenOffError("failed") from error

    def _counted(self, reply: Reply) -> Reply:
        """Add the reply's reward to the turn's reward, note `done`, and return the reply."""
        if reply.reward is not None:
            self._turn_rewards[-1] = (self._turn_rewards[-1] or 0.0) + reply.reward
        if reply.done:
            self._end = "done"
        return reply

    def _result(self, reason: FinishReason) -> Trajectory:
        keeps = self.table.keeps_seats and self.failure is None
        conversation = Conversation(
            environment=self.table.description.name,
            prompt=self.prompt,
            messages=tuple(self._messages),
            turn_rewards=tuple(self._turn_rewards),
            outcome=self._outcome,
            calls=self._calls,
            failed_calls=self._failed_calls,
            failure=self.failure,
            home=self.seat if keeps else None,
        )
        if not keeps:
            self.leave()
        return replace(joined(self._earlier, trajectory_of(self._row, reason)), conversation=conversation)


def _messages_of(said: Any) -> list[Message]:
    """Return what `step` answered as messages: text becomes a user's message, and None an empty list."""
    if said is None:
        return []
    if isinstance(said, str):
        return [{"role": "user", "content": said}]
    return [said] if isinstance(said, dict) else list(said)
