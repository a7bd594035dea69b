"""Prompts into tokens, and tokens into what a model said, by its chat template."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo.data.messages import ROLES
from grpo.data.rendering import Schema
from grpo.environments.chat import Chat
from grpo.environments.readback import format_of
from grpo.environments.template import QUESTION, Template
from grpo.environments.thinking import Thinking
from grpo.errors import UserError
from grpo.generation.sampling import Sampling
from grpo.generation.stopping import Stopping
from grpo.serving.chaining import prompt_after
from grpo.serving.refusals import wrong
from grpo.serving.sessions import Answered, SessionMemory, marks_of
from grpo.types import Message

if TYPE_CHECKING:
    from grpo.model.mlxlm import TokenizerWrapper

MOST_CHATS = 32
"""Sets of tools whose chats are kept: to find out how calls are written takes some renderings of the template."""
SAID = ("content", "name", "tool_calls", "tool_call_id", "reasoning_content")
"""What templates are told of a message, besides its role. Clients send back more than that."""


_OWN = {
    *("chat_template", "conversation", "messages", "tools", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "sanitize_control_tokens"),
}
"""Arguments of `apply_chat_template` that decide what it returns, and of what."""


@dataclass(frozen=True, slots=True)
class Voice:
    """How a model's turns are written and read: its chat with the tools, its marks of thinking, whether calls are
    looked for, and its template. `settings` stands for the tools and the arguments of the template."""

    chat: Chat
    thinking: Thinking | None
    calls: bool
    template: Template
    settings: str


@dataclass(frozen=True, slots=True)
class Spoken:
    """A prompt: its tokens and its messages; of a chat in a session the voice's settings, what tells the messages apart
    (`Answered`), and the answer whose tokens it begins with, if it goes on from one."""

    ids: tuple[int, ...]
    messages: tuple[Message, ...] = ()
    settings: str | None = None
    marks: tuple[bytes, ...] = ()
    follows: Answered | None = None


class Speaker:
    """Not for several threads at once."""

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        vocabulary: int,
        longest: int | None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """`longest` is the most tokens of prompt and completion together, None for no limit. `template_kwargs` go to
        the chat template unless a request has its own."""
        self.tokenizer, self.longest = tokenizer, longest
        self.refuses_long = True
        """Whether prompts that leave no room for an answer are refused here, and not by whoever is to answer."""
        self._vocabulary, self._kwargs = vocabulary, dict(template_kwargs or {})
        self._stop_ids = frozenset(tokenizer.eos_token_ids)
        self._voices: OrderedDict[str, Voice] = OrderedDict()

    def voice(self, tools: Sequence[Schema], kwargs: Mapping[str, Any] | None) -> Voice:
        """How a conversation with these tools is written and read. Raises Refusal where it cannot be."""
        if not self.tokenizer.has_chat_template:
            raise wrong("messages", "the model has no chat template; use /v1/completions", "no_chat_template")
        if taken := sorted(_OWN & set(kwargs or ())):
            raise wrong(f"chat_template_kwargs.{taken[0]}", "this is not for the template to know: leave it out")
        settings = {**self._kwargs, **(kwargs or {})}
        key = json.dumps([tools, settings])  # in their order, which templates show
        if key not in self._voices:
            try:
                self._voices[key] = self._new_voice(tools, settings, key)
            except UserError as error:
                raise wrong("tools" if tools else "messages", str(error), "chat_template") from error
        self._voices.move_to_end(key)
        if len(self._voices) > MOST_CHATS:
            self._voices.popitem(last=False)
        return self._voices[key]

    def _new_voice(self, tools: Sequence[Schema], kwargs: Mapping[str, Any], key: str) -> Voice:
        template = Template(self.tokenizer, tuple(tools), kwargs, self._stop_ids)
        thinking = Thinking.of(self.tokenizer, template.render([QUESTION], generation=True))
        form = format_of(template, thinking)
        return Voice(Chat(template, {}, form, thinking), thinking, form is not None, template, key)

    def prompt_of(
        self, voice: Voice, messages: Sequence[Mapping[str, Any]], session: SessionMemory | None = None
    ) -> Spoken:
        """Messages as the model reads them, with the tools and the beginning of the answer. Where they go on from an
        answer of the session, its tokens stay as they were sampled. Raises Refusal."""
        given = [_message(number, one) for number, one in enumerate(messages)]
        try:
            if session is None:
                return Spoken(self.checked(voice.chat.prompt_ids(given), "messages"), tuple(given))
            return self._in_session(voice, given, session)
        except UserError as error:
            raise wrong("messages", str(error), "chat_template") from error

    def _in_session(self, voice: Voice, given: list[Message], session: SessionMemory) -> Spoken:
        marks = marks_of(given)
        said = session.before(voice.settings, given, marks)
        ids = None if said is None else self._after(voice, said, given, session)
        found = self.checked(voice.chat.prompt_ids(given) if ids is None else ids, "messages")
        if said is not None:  # the same objects again, as sessions can be long
            given = [*said.messages, said.answer, *given[len(said.messages) + 1 :]]
            marks = (*said.marks, *marks[len(said.marks) :])
        return Spoken(found, tuple(given), voice.settings, marks, None if ids is None else said)

    def _after(
        self, voice: Voice, said: Answered, given: list[Message], session: SessionMemory
    ) -> tuple[int, ...] | None:
        keep = session.rules is not None and session.rules.keep_thinking
        try:
            return prompt_after(voice.chat, voice.template, voice.thinking, said, given, keep)
        except UserError:  # rendered whole they may be taken, or else that says why not
            return None

    def prompt_as_it_is(
        self, given: str | Sequence[int], param: str = "prompt", session: SessionMemory | None = None
    ) -> Spoken:
        """The prompt that is a text, encoded as the trainer encodes prompts without a template, or tokens. A session
        remembers it as a user's message; where it goes on from an answer, what it adds is one. Raises Refusal."""
        ids = self.checked(self.tokenizer.encode(given) if isinstance(given, str) else given, param)
        if session is None:
            return Spoken(ids)
        if (said := session.before_tokens(ids)) is not None:
            added = self.text(ids[len(said.prompt_ids) + len(said.token_ids) :], special=True)
            return Spoken(ids, (*said.messages, said.answer, {"role": "user", "content": added}), follows=said)
        text = given if isinstance(given, str) else self.text(ids, special=True)
        return Spoken(ids, ({"role": "user", "content": text},))

    def checked(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
        """The token ids. Raises Refusal for none, for too many, and for one that the model does not know."""
        if not ids:
            raise wrong(param, "it comes to no tokens, and a prompt needs at least one", "empty_prompt")
        if (highest := max(ids)) >= self._vocabulary:
            raise wrong(param, f"token {highest} is none of the model's {self._vocabulary}", "unknown_token")
        if self.refuses_long and self.longest is not None and len(ids) >= self.longest:
            raise wrong(
                param,
                f"{len(ids)} tokens leave no room for an answer: prompt and answer have {self.longest} at most",
                "context_length_exceeded",
            )
        return tuple(ids)

    def stopping(self, sampling: Sampling) -> Stopping:
        """The rules by which completions end, as the generator has them."""
        return Stopping(sampling, self._stop_ids, self.text)

    def text(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of tokens, with or without the special ones."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))


def _message(number: int, given: Mapping[str, Any]) -> Message:
    """A message as templates take it: arguments of calls are objects, where OpenAI's are JSON in a text."""
    where = f"messages.{number}"
    role = given.get("role")
    if role not in ROLES:
        raise wrong(f"{where}.role", f"{str(role)[:40]!r} is none of {', '.join(ROLES)}")
    message: Message = {"role": role, **{key: given[key] for key in SAID if given.get(key) is not None}}
    if not isinstance(message.get("content", ""), str | list):
        raise wrong(f"{where}.content", "expected text, or a list of parts of type text")
    if not isinstance(message.get("name", ""), str):
        raise wrong(f"{where}.name", "expected text")
    if "content" not in message and "tool_calls" not in message:
        raise wrong(f"{where}.content", "a message needs content")
    if "tool_calls" in message:
        message["tool_calls"] = _calls(f"{where}.tool_calls", message["tool_calls"])
    return message


def _calls(where: str, given: Any) -> list[dict[str, Any]]:
    calls = given if isinstance(given, list) else [None]
    return [_call(where, call) for call in calls]


def _call(where: str, given: Any) -> dict[str, Any]:
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong(where, "expected a list of {id, type: function, function: {name, arguments}}")
    return {**given, "function": {**function, "arguments": _arguments(function.get("arguments"))}}


def _arguments(given: Any) -> Any:
    if not isinstance(given, str):
        return {} if given is None else given
    try:
        found = json.loads(given or "{}")
    except (ValueError, RecursionError):
        return given
    return found if isinstance(found, dict) else given
