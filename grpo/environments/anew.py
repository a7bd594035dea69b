"""Conversations that continue in new rows, without the earlier thinking that their chat template leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from grpo.environments.joints import Joint
from grpo.environments.template import BREAK, IDS, MARK, Calls, Template, harmless, shared, with_texts
from grpo.errors import UserError
from grpo.types import BEHAVIOUR, Message, Trajectory

NOTHING = "drop has no effect"


@dataclass(frozen=True)
class Anew:
    """Writes a conversation as the template does when a user's message follows: without the thinking before it.

    `end` is the token that ends a turn; `calls` says which calls of a turn the template writes.
    """

    template: Template
    end: str
    calls: Calls = "all"

    @classmethod
    def of(cls, template: Template, joints: Mapping[str, Joint] | None) -> Anew:
        """Raises UserError for a template that keeps all thinking, or that cannot write a conversation again."""
        if joints is None or "user" not in joints:
            raise UserError(f"{NOTHING}: prompts do not use a chat template, or no environment answers as the user")
        if not joints["user"].kept:
            raise UserError(f"{NOTHING}: the model's chat template does not leave out thinking before a user's message")
        calls = joints["tool"].calls if "tool" in joints else "all"
        if calls == "none":
            raise UserError(
                "drop is not possible: the model's chat template does not write the tool calls of earlier turns"
            )
        return cls(template, joints["user"].end, calls)

    def prompt_ids(self, prompt: Sequence[Message], said: Sequence[Message]) -> tuple[int, ...]:
        """Return all tokens before the next turn, including the template's beginning of that turn.

        `said` has the messages after the `prompt`, and ends with a user's message. Control tokens in it become ordinary
        text. Raises UserError for messages that the template refuses.
        """
        if prompt[-1]["role"] == "assistant":
            raise UserError(
                "a prompt that ends with the beginning of the model's answer cannot be written again: use thinking: "
                "keep"
            )
        spoken = [_harmless(one, self.template) for one in with_texts(said)]
        written = [*with_texts(prompt), *_with_ids(spoken, self.calls)]
        first, _, rest = self.template.render(written, generation=True).partition(BREAK)
        return (*self.template.encode(first), *(self.template.encode_after(self.end, rest) if rest else ()))

    def lasting(self, prompt: Sequence[Message], prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the prefix of a prompt's tokens that stays when the conversation continues.

        Raises UserError as `prompt_ids` does.
        """
        went_on = [{"role": "assistant", "content": MARK}, {"role": "user", "content": MARK}]
        return tuple(shared(list(prompt_ids), list(self.prompt_ids(prompt, went_on))))


def joined(earlier: Sequence[tuple[Trajectory, str]], last: Trajectory) -> Trajectory:
    """Join the rows of a conversation into one trajectory, with the finish reason of `last`.

    `earlier` are the rows before `last`, each with the text after its last turn.
    """
    if not earlier:
        return last
    rows = [*(row for row, _ in earlier), last]
    names = dict.fromkeys(name for row in rows for name in row.columns)
    return Trajectory(
        tuple(token for row in rows for token in row.token_ids),
        tuple(trained for row in rows for trained in row.trained),
        {name: tuple(value for row in rows for value in _column(row, name)) for name in names},
        "".join(row.text + between for row, between in earlier) + last.text,
        last.finish_reason,
        begins=tuple(accumulate(len(row.token_ids) for row, _ in earlier)),
    )


def _column(row: Trajectory, name: str) -> Sequence[float]:
    """Return a column of a row; `behaviour` if the row has no such column.

    A row without `sampler` was drawn from the unfiltered policy. Other rows of the conversation may have `sampler`,
    because `min_tokens` affects only the first rows.
    """
    return row.columns.get(name) or row.columns[BEHAVIOUR]


def _harmless(message: Message, template: Template) -> Message:
    """Return a message in which no control token is whole, not even in the model's tool calls."""
    if not message.get("tool_calls"):
        return harmless(message, template)
    return {**harmless(message, template), "tool_calls": _apart(message["tool_calls"], template)}


def _apart(value: Any, template: Template) -> Any:
    if isinstance(value, str):
        return template.harmless(value)
    if isinstance(value, Mapping):
        return {_apart(key, template): _apart(one, template) for key, one in value.items()}
    return [_apart(one, template) for one in value] if isinstance(value, list | tuple) else value


def _with_ids(messages: Sequence[Message], calls: Calls) -> list[Message]:
    """Return the messages with ids for templates that require them: calls have the model's ids, or generated ids, and
    results name the id of their call."""
    written: list[Message] = []
    ids: list[str] = []
    for number, message in enumerate(messages):
        if made := message.get("tool_calls"):
            ids = [call.get("id") or IDS.format(100 * number + place) for place, call in enumerate(made)]
            linked = [{**call, "id": own} for call, own in zip(made, ids, strict=True)]
            message = {**message, "tool_calls": linked if calls == "all" else linked[:1]}
        elif message["role"] == "tool" and ids:
            message = {"tool_call_id": ids.pop(0), **message}
        written.append(message)
    return written
