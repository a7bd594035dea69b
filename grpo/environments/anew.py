"""Conversations that go on in new rows, without the earlier thinking that their chat template leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from grpo.environments.joints import Joint
from grpo.environments.template import BREAK, IDS, MARK, Calls, Template, harmless, shared, with_texts
from grpo.errors import UserError
from grpo.types import BEHAVIOUR, Message, Trajectory

NOTHING = "drop drops nothing"


@dataclass(frozen=True)
class Anew:
    """How the template writes a conversation once a user's message has followed: without the thinking before it.

    `end` is a token that ends turns, `calls` which of a turn's calls the template writes.
    """

    template: Template
    end: str
    calls: Calls = "all"

    @classmethod
    def of(cls, template: Template, joints: Mapping[str, Joint] | None) -> Anew:
        """Raises UserError for a template that keeps all thinking, or cannot write a conversation down again."""
        if joints is None or "user" not in joints:
            raise UserError(f"{NOTHING}: the model talks without a chat template, or nobody answers it as the user")
        if not joints["user"].kept:
            raise UserError(f"{NOTHING}: the model's chat template leaves out no thinking before a user's message")
        calls = joints["tool"].calls if "tool" in joints else "all"
        if calls == "none":
            raise UserError("drop cannot be: the model's chat template does not write the tool calls of earlier turns")
        return cls(template, joints["user"].end, calls)

    def prompt_ids(self, prompt: Sequence[Message], said: Sequence[Message]) -> tuple[int, ...]:
        """The tokens that a next turn follows, with its beginning. `said` is all that followed the `prompt`, and ends
        with a user's message. Control tokens in it become ordinary text. Raises UserError for messages that the
        template refuses."""
        if prompt[-1]["role"] == "assistant":
            raise UserError(
                "a prompt that ends with the beginning of the model's answer cannot be written down again: use "
                "thinking: keep"
            )
        spoken = [_harmless(one, self.template) for one in with_texts(said)]
        written = [*with_texts(prompt), *_with_ids(spoken, self.calls)]
        first, _, rest = self.template.render(written, generation=True).partition(BREAK)
        return (*self.template.encode(first), *(self.template.encode_after(self.end, rest) if rest else ()))

    def lasting(self, prompt: Sequence[Message], prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """What stays of a prompt's tokens when the conversation has gone on. Raises UserError as `prompt_ids` does."""
        went_on = [{"role": "assistant", "content": MARK}, {"role": "user", "content": MARK}]
        return tuple(shared(list(prompt_ids), list(self.prompt_ids(prompt, went_on))))


def joined(earlier: Sequence[tuple[Trajectory, str]], last: Trajectory) -> Trajectory:
    """The rows of a conversation as a single trajectory, which ends as the `last` does.

    `earlier` are the rows before it, each with the text that followed its last turn.
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
    """A column of a row. Without `sampler` the row was drawn as the policy has it: `min_tokens` changes first rows."""
    return row.columns.get(name) or row.columns[BEHAVIOUR]


def _harmless(message: Message, template: Template) -> Message:
    """A message that holds no whole control token, in the model's tool calls neither."""
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
    """The messages, in which calls have ids, those that the model gave if it gave any, and results say of which call
    they are, for templates that insist on it."""
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
