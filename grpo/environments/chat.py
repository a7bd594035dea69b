"""The exact tokens of a conversation: its prompt, the text between turns, and the message in a turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpo.backend.hub import one_line
from grpo.data.rendering import Schema, rendered_ids
from grpo.environments.anew import Anew
from grpo.environments.joints import Joint, joint_of
from grpo.environments.readback import format_of, takes_several
from grpo.environments.template import MARK, QUESTION, Template, before, harmless, text_of, with_ids, with_texts
from grpo.environments.thinking import Thinking
from grpo.environments.toolcalls import CallFormat, ParsedTurn
from grpo.errors import UserError
from grpo.types import Message

if TYPE_CHECKING:
    from grpo.model.mlxlm import TokenizerWrapper


class Chat:
    """Encodes and parses the conversations of a model with an environment, by rules found in its chat template.

    A conversation's tokens are the prompt's tokens, and then alternately a sampled turn and a suffix. Sampled tokens
    are never encoded again, even if the template would write them differently. So the conversation keeps earlier
    thinking, which a template for inference may drop. All tokens before a turn are then what the model read when it
    sampled the turn, and a conversation is one row to train on. `anew` is the alternative: the conversation continues
    in a new row, as the template writes it.
    """

    def __init__(
        self,
        template: Template,
        joints: Mapping[str, Joint] | None,
        form: CallFormat | None,
        thinking: Thinking | None,
        notes: Sequence[str] = (),
    ) -> None:
        """`joints` are the known joints by role; None if the model gets text without a template."""
        self.notes = tuple(notes)
        self._template, self._form, self._thinking = template, form, thinking
        self._joints: dict[str, Joint | UserError] | None = None if joints is None else dict(joints)

    @classmethod
    def of(
        cls,
        tokenizer: TokenizerWrapper,
        tools: Sequence[Schema] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        answers: bool = False,
        templated: bool = True,
        stop_ids: Iterable[int] = (),
    ) -> Chat:
        """Test the template with these tools, and with `answers` also with messages of an environment as the user.

        `templated` says whether prompts go through the template (`PromptRenderer.wraps_text`, or messages); otherwise
        a conversation is plain text. `stop_ids` are tokens that end a turn in addition to the model's own. The findings
        are in `notes`, for the plan. Raises UserError, with advice, for a template that does not support such
        conversations.
        """
        stops = {int(token) for token in (*tokenizer.eos_token_ids, *stop_ids) if token is not None}
        template = Template(tokenizer, tuple(tools), dict(template_kwargs or {}), frozenset(stops))
        if not templated or not tokenizer.has_chat_template:
            if tools:
                why = "data.chat_template is never" if tokenizer.has_chat_template else "the model has none"
                raise UserError(f"tools need a chat template, which shows them to the model, but {why}")
            return cls(template, None, None, None, ["chat: plain text, without a chat template"])
        thinking = Thinking.of(tokenizer, template.render([QUESTION], generation=True))
        form = format_of(template, thinking, ", or an environment that answers as the user does (`step(message)`)")
        roles = [*(["tool"] if tools else []), *(["user"] if answers else [])]
        joints = {role: joint_of(template, role, thinking) for role in roles}
        several = not tools or form is None or takes_several(template, form, thinking)
        return cls(template, joints, form, thinking, _notes(template, joints, form if tools else None, several))

    @property
    def anew(self) -> Anew:
        """How conversations continue in new rows without earlier thinking. Raises UserError for a template that does
        not drop thinking when a user's message follows."""
        joints = None if self._joints is None else {r: j for r, j in self._joints.items() if isinstance(j, Joint)}
        return Anew.of(self._template, joints)

    def prompt_ids(self, messages: str | Sequence[Message]) -> tuple[int, ...]:
        """Return the tokens of a prompt, with the tools and the beginning of the model's answer.

        A string counts as a user's message. Raises UserError for messages that the template refuses.
        """
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        given, template = with_texts(asked), self._template
        if self._joints is None:
            return tuple(template.tokenizer.encode("".join(one["content"] for one in given)))
        try:
            return tuple(rendered_ids(template.tokenizer, given, template.tools, template.kwargs))
        except Exception as error:  # the template is the model's own code
            raise UserError(f"the model's chat template refuses a prompt: {one_line(error)}") from error

    def suffix_ids(self, turn_ids: Sequence[int], messages: Sequence[Message]) -> tuple[int, ...] | None:
        """Return the tokens between a sampled turn and the next: messages of tools or of the user, and the beginning of
        the model's answer.

        `turn_ids` are the turn's tokens, including the token that ended it. Returns None if nothing can follow, because
        the turn did not end as the template ends turns (but by a limit, a stop string, or another token). The text of a
        control token inside a message becomes ordinary tokens of the same characters. Raises UserError for messages
        that the template refuses.
        """
        template = self._template
        if self._joints is None:
            return tuple(template.encode_plain("".join(text_of(one["content"]) for one in messages)))
        if not messages:
            return None
        joint = self._joint(messages[0]["role"])
        if not turn_ids or turn_ids[-1] not in joint.sampled:
            return None
        given = [harmless(one, template) for one in with_texts(messages)]
        ids = self._call_ids(turn_ids, given, joint)
        text = template.render([*before(given, joint.calls, ids), *with_ids(given, ids)], generation=True)
        at = text.index(joint.end, text.index(MARK)) + len(joint.end)
        return template.encode_after(joint.end, text[at:])

    def can_follow(self, role: str, turn_ids: Sequence[int]) -> bool:
        """Whether messages of this role can follow a turn with these tokens. In plain text they always can."""
        if self._joints is None:
            return True
        try:
            return bool(turn_ids) and turn_ids[-1] in self._joint(role).sampled
        except UserError:  # the template has no place for this role
            return False

    def drops(self, role: str) -> bool:
        """Whether the template leaves out earlier thinking when messages of this role follow.

        Raises UserError if they cannot follow.
        """
        return self._joints is not None and self._joint(role).kept

    def _joint(self, role: str) -> Joint:
        """Return how messages of a role follow a turn. Raises UserError if they cannot."""
        assert self._joints is not None
        if role not in self._joints:
            try:
                self._joints[role] = joint_of(self._template, role, self._thinking)
            except UserError as error:
                self._joints[role] = error
        if isinstance(found := self._joints[role], UserError):
            raise found
        return found

    def parse(self, turn_ids: Sequence[int]) -> Message:
        """Return a sampled turn as the assistant's message: `content`, `tool_calls` if it calls tools, and
        `reasoning_content` if it has thinking. A call that cannot be parsed is part of the content. Never raises."""
        said = self._said(turn_ids)
        message: Message = {"role": "assistant", "content": said.content}
        if said.reasoning is not None:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message["tool_calls"] = [_tool_call(call) for call in said.calls]
        return message

    def _said(self, turn_ids: Sequence[int]) -> ParsedTurn:
        ids = list(turn_ids)
        if ids and ids[-1] in self._template.stop_ids:
            ids.pop()
        plain = ParsedTurn(self._template.decode(ids, special=False))
        if self._form is None and self._thinking is None:
            return plain
        text = self._template.decode(ids)
        reasoning, rest = self._thinking.split(text) if self._thinking else (None, text)
        said = self._form.read(rest, self._template.tools) if self._form else ParsedTurn(rest)
        if reasoning is None and (said.content, said.calls, said.reasoning) == (text, (), None):
            return plain
        thought = said.reasoning if reasoning is None else reasoning
        clean = self._template.specials.sub("", said.content)
        return ParsedTurn(clean, said.calls, thought)

    def _call_ids(self, turn_ids: Sequence[int], results: Sequence[Message], joint: Joint) -> list[str | None]:
        """Return the ids that the model gave its calls, if the template writes and accepts them; otherwise empty."""
        if not joint.ids:
            return []
        given = [call.get("id") for call in self._said(turn_ids).calls]
        ids = [None if own is None else self._template.harmless(own) for own in given]
        takes = self._template.takes([*before(results, joint.calls, ids), *with_ids(results, ids)])
        return ids if takes else []


def without_end(message: Message, end: str) -> Message:
    """Return the model's message without the stop string that ended it, as in a trajectory's text."""
    return {**message, "content": message["content"].removesuffix(end)}


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    own = {"id": call["id"]} if "id" in call else {}
    return {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}, **own}


def _notes(template: Template, joints: Mapping[str, Joint], form: CallFormat | None, several: bool) -> list[str]:
    """The findings about the template, as lines of the plan."""
    if not joints:
        return []
    texts = {index: text for text, index in template.special.items()}
    ends = sorted({texts[token] for joint in joints.values() for token in joint.sampled})
    read = f"; tool calls are read as {form.name}{'' if several else ', one per turn'}" if form else ""
    notes = [f"chat: a turn ends with {' or '.join(ends)}{read}"]
    if kept := _when(joint for joint in joints.items() if joint[1].kept):
        notes.append(
            f"{KEEPS} the conversation, as it was sampled, when {kept} follows; the chat template would leave it out "
            "(environment.thinking: keep)"
        )
    if moves := _when(joint for joint in joints.items() if joint[1].moves):
        notes.append(
            f"chat: a system message stays in its place in the prompt when {moves} follows; the chat template would "
            "move it"
        )
    return notes


KEEPS = "chat: earlier thinking stays in"
DROPS = (
    "chat: earlier thinking is left out when a user's message follows, as in the chat template: the conversation then "
    "continues in a new training row with the same advantage (environment.thinking: drop)"
)
"""The note that replaces `KEEPS` for conversations that continue in new rows."""
FOLLOWING = {"tool": "a tool's result", "user": "a user's message"}


def _when(joints: Iterable[tuple[str, Joint]]) -> str:
    return " or ".join(FOLLOWING[role] for role, _ in joints)
