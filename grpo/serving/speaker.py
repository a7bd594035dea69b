"""Converts prompts to tokens, and sampled tokens to text and messages, with the model's chat template."""

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
"""Number of tool sets whose chats are cached: finding out how calls are written takes several template renderings."""
SAID = ("content", "name", "tool_calls", "tool_call_id", "reasoning_content")
"""The fields of a message, in addition to its role, that templates get. Clients send back more fields."""


_OWN = {
    *("chat_template", "conversation", "messages", "tools", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "sanitize_control_tokens"),
}
"""Arguments of `apply_chat_template` that determine its input and what it returns. Requests cannot set them."""


@dataclass(frozen=True, slots=True)
class Voice:
    """How a model's turns are written and read: its chat with the tools, its marks of thinking, whether to look for
    tool calls, and its template. `settings` identifies the tools and the arguments of the template."""

    chat: Chat
    thinking: Thinking | None
    calls: bool
    template: Template
    settings: str


@dataclass(frozen=True, slots=True)
class Spoken:
    """A prompt: its tokens and its messages. For a chat in a session, also the voice's settings and a hash of each
    message (see `Answered`), and the answer whose tokens the prompt begins with, if it continues one."""

    ids: tuple[int, ...]
    messages: tuple[Message, ...] = ()
    settings: str | None = None
    marks: tuple[bytes, ...] = ()
    follows: Answered | None = None


class Speaker:
    """Encodes prompts, and decodes tokens. Not thread-safe."""

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        vocabulary: int,
        longest: int | None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """`longest` limits the tokens of prompt and completion together; None: no limit. `template_kwargs` are the
        default arguments of the chat template; a request can override them."""
        self.tokenizer, self.longest = tokenizer, longest
        self.refuses_long = True
        """Whether to refuse prompts that leave no room for an answer. If not, the `Answerer` must check."""
        self._vocabulary, self._kwargs = vocabulary, dict(template_kwargs or {})
        self._stop_ids = frozenset(tokenizer.eos_token_ids)
        self._voices: OrderedDict[str, Voice] = OrderedDict()

    def voice(self, tools: Sequence[Schema], kwargs: Mapping[str, Any] | None) -> Voice:
        """The voice for conversations with these tools. Raises Refusal if the template cannot render them."""
        if not self.tokenizer.has_chat_template:
            raise wrong("messages", "the model has no chat template; use /v1/completions", "no_chat_template")
        if reserved := sorted(_OWN & set(kwargs or ())):
            raise wrong(f"chat_template_kwargs.{reserved[0]}", "the server sets this argument itself: leave it out")
        settings = {**self._kwargs, **(kwargs or {})}
        key = json.dumps([tools, settings])  # unsorted, because templates show the tools in their order
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
        """Render messages, with the tools and the beginning of the answer, as a prompt. If they continue an answer of
        the session, that answer's tokens stay as they were sampled. Raises Refusal."""
        given = [_message(number, message) for number, message in enumerate(messages)]
        try:
            if session is None:
                return Spoken(self.checked(voice.chat.prompt_ids(given), "messages"), tuple(given))
            return self._in_session(voice, given, session)
        except UserError as error:
            raise wrong("messages", str(error), "chat_template") from error

    def _in_session(self, voice: Voice, given: list[Message], session: SessionMemory) -> Spoken:
        marks = marks_of(given)
        past = session.before(voice.settings, given, marks)
        ids = None if past is None else self._after(voice, past, given, session)
        found = self.checked(voice.chat.prompt_ids(given) if ids is None else ids, "messages")
        if past is not None:  # reuse the same objects, because sessions can be long
            given = [*past.messages, past.answer, *given[len(past.messages) + 1 :]]
            marks = (*past.marks, *marks[len(past.marks) :])
        return Spoken(found, tuple(given), voice.settings, marks, None if ids is None else past)

    def _after(
        self, voice: Voice, past: Answered, given: list[Message], session: SessionMemory
    ) -> tuple[int, ...] | None:
        keep = session.rules is not None and session.rules.keep_thinking
        try:
            return prompt_after(voice.chat, voice.template, voice.thinking, past, given, keep)
        except UserError:  # rendering all messages may work, or its error explains why not
            return None

    def prompt_as_it_is(
        self, given: str | Sequence[int], param: str = "prompt", session: SessionMemory | None = None
    ) -> Spoken:
        """A prompt of token ids, or of text, which is encoded as the trainer encodes prompts without a template. A
        session remembers it as a user message; if it continues an answer, its new part is the message. Raises
        Refusal."""
        ids = self.checked(self.tokenizer.encode(given) if isinstance(given, str) else given, param)
        if session is None:
            return Spoken(ids)
        if (past := session.before_tokens(ids)) is not None:
            added = self.text(ids[len(past.prompt_ids) + len(past.token_ids) :], special=True)
            return Spoken(ids, (*past.messages, past.answer, {"role": "user", "content": added}), follows=past)
        text = given if isinstance(given, str) else self.text(ids, special=True)
        return Spoken(ids, ({"role": "user", "content": text},))

    def checked(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
        """The token ids. Raises Refusal if there are none, if there are too many, or if the model lacks one of them."""
        if not ids:
            raise wrong(param, "the prompt has no tokens, and needs at least one", "empty_prompt")
        if (highest := max(ids)) >= self._vocabulary:
            raise wrong(
                param, f"token {highest} does not exist: the model has {self._vocabulary} tokens", "unknown_token"
            )
        if self.refuses_long and self.longest is not None and len(ids) >= self.longest:
            raise wrong(
                param,
                f"{len(ids)} tokens leave no room for an answer: prompt and answer together have at most "
                f"{self.longest} tokens",
                "context_length_exceeded",
            )
        return tuple(ids)

    def stopping(self, sampling: Sampling) -> Stopping:
        """The rules that end completions, the same as in the generator."""
        return Stopping(sampling, self._stop_ids, self.text)

    def text(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of tokens, with or without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))


def _message(number: int, given: Mapping[str, Any]) -> Message:
    """A message as templates expect it: the arguments of calls are objects, not JSON strings as in OpenAI's form."""
    where = f"messages.{number}"
    role = given.get("role")
    if role not in ROLES:
        raise wrong(f"{where}.role", f"{str(role)[:40]!r} is not one of {', '.join(ROLES)}")
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
