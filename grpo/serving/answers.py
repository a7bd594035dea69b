"""The JSON of responses: OpenAI's two forms, with token ids on request, and a form with only tokens."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate
from typing import Any, Protocol

from grpo.serving.asks import Piece
from grpo.serving.choices import BROKEN, Completed, Delta

Json = dict[str, Any]
TextOf = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """The fields that all responses share. `prompts` are the prompts' tokens; each prompt has `n` choices."""

    model: str
    prompts: Sequence[Sequence[int]]
    n: int
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self, choices: Sequence[Completed]) -> Json:
        """Token counts, including stop tokens. A prompt counts once for all its choices."""
        prompt, completion = sum(map(len, self.prompts)), sum(len(choice.token_ids) for choice in choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def prompt_of(self, choice: Completed) -> list[int]:
        return list(self.prompts[choice.index // self.n])


class AnswerForm(Protocol):
    """The form of an endpoint's responses."""

    def whole(self, choices: Sequence[Completed], messages: Sequence[Json]) -> Json:
        """The whole response. `messages` are the choices as messages."""
        ...

    def opening(self, choice: Completed) -> Json | None:
        """The first event of a choice in a stream; None if there is none."""
        ...

    def chunk(self, choice: Completed, piece: Piece, delta: Delta) -> Json | None:
        """The event for new tokens; None if there is nothing to send."""
        ...

    def closing(self, choices: Sequence[Completed]) -> Json:
        """The last event of a stream for a request that asks for usage."""
        ...


@dataclass(frozen=True, slots=True)
class ChatForm:
    """`/v1/chat/completions`."""

    head: AnswerHead
    text: TextOf
    ids: bool
    logprobs: bool

    def whole(self, choices: Sequence[Completed], messages: Sequence[Json]) -> Json:
        answered = [self._choice(choice, message) for choice, message in zip(choices, messages, strict=True)]
        ids = {"prompt_token_ids": list(self.head.prompts[0])} if self.ids else {}
        return self._object("chat.completion", answered) | ids | {"usage": self.head.usage(choices)}

    def opening(self, choice: Completed) -> Json | None:
        ids = {"prompt_token_ids": list(self.head.prompts[0])} if self.ids and choice.index == 0 else {}
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}]) | ids

    def chunk(self, choice: Completed, piece: Piece, delta: Delta) -> Json | None:
        new: Json = {"content": delta.content} if delta.content else {}
        if delta.reasoning:
            new["reasoning_content"] = delta.reasoning
        if delta.calls:
            calls = as_calls(delta.calls, len(self.head.prompts[0]), choice)
            new["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
        if not new and piece.ended is None and not (self.ids or self.logprobs):
            return None
        finish = choice.finished_by(calls=bool(delta.calls)) if piece.ended else None
        answered = {"index": choice.index, "delta": new, "finish_reason": finish}
        return self._chunk([answered | self._tokens(piece.token_ids, piece.logprobs)])

    def closing(self, choices: Sequence[Completed]) -> Json:
        return self._chunk([]) | {"usage": self.head.usage(choices)}

    def _choice(self, choice: Completed, message: Json) -> Json:
        calls = as_calls(message.get("tool_calls") or (), len(self.head.prompts[0]), choice)
        answer = {**message, "refusal": None}
        if calls:
            answer |= {"content": message["content"] or None, "tool_calls": calls}
        answered = {"index": choice.index, "message": answer, "finish_reason": choice.finished_by(bool(calls))}
        return answered | self._tokens(choice.token_ids, choice.logprobs)

    def _tokens(self, ids: Sequence[int], logprobs: Sequence[float]) -> Json:
        content = (
            {"content": [self._token(*pair) for pair in zip(ids, logprobs, strict=True)]} if self.logprobs else None
        )
        return {"logprobs": content, **({"token_ids": list(ids)} if self.ids else {})}

    def _token(self, token: int, logprob: float) -> Json:
        text = self.text([token])
        # If the token is a part of a character, only the tokenizer knows its bytes.
        token_bytes = None if BROKEN in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": token_bytes, "top_logprobs": []}

    def _object(self, kind: str, choices: Sequence[Json]) -> Json:
        return _object(self.head, f"chatcmpl-{self.head.id}", kind, choices)

    def _chunk(self, choices: Sequence[Json]) -> Json:
        return self._object("chat.completion.chunk", choices)


@dataclass(frozen=True, slots=True)
class CompletionForm:
    """`/v1/completions`."""

    head: AnswerHead
    text: TextOf
    ids: bool
    logprobs: bool

    def whole(self, choices: Sequence[Completed], messages: Sequence[Json]) -> Json:
        answered = []
        for choice, message in zip(choices, messages, strict=True):
            ids = {"prompt_token_ids": self.head.prompt_of(choice)} if self.ids else {}
            finish = choice.finished_by()
            tokens = self._tokens(choice, choice.token_ids, choice.logprobs)
            answered.append({"index": choice.index, "text": message["content"], "finish_reason": finish} | tokens | ids)
        return self._object(answered) | {"usage": self.head.usage(choices)}

    def opening(self, choice: Completed) -> Json | None:
        if not self.ids:
            return None
        ids = {"prompt_token_ids": self.head.prompt_of(choice), "token_ids": []}
        return self._object([{"index": choice.index, "text": "", "logprobs": None, "finish_reason": None, **ids}])

    def chunk(self, choice: Completed, piece: Piece, delta: Delta) -> Json | None:
        if not delta.content and piece.ended is None and not (self.ids or self.logprobs):
            return None
        finish = choice.finished_by() if piece.ended else None
        answered = {"index": choice.index, "text": delta.content, "finish_reason": finish}
        return self._object([answered | self._tokens(choice, piece.token_ids, piece.logprobs)])

    def closing(self, choices: Sequence[Completed]) -> Json:
        return self._object([]) | {"usage": self.head.usage(choices)}

    def _tokens(self, choice: Completed, ids: Sequence[int], logprobs: Sequence[float]) -> Json:
        by_token: Json | None = None
        if self.logprobs:
            texts = [self.text([token]) for token in ids]
            *offsets, choice.characters = accumulate(map(len, texts), initial=choice.characters)
            by_token = {"tokens": texts, "token_logprobs": list(logprobs), "top_logprobs": None, "text_offset": offsets}
        return {"logprobs": by_token, **({"token_ids": list(ids)} if self.ids else {})}

    def _object(self, choices: Sequence[Json]) -> Json:
        return _object(self.head, f"cmpl-{self.head.id}", "text_completion", choices)


def tokens_answer(head: AnswerHead, choices: Sequence[Completed], logprobs: bool) -> Json:
    """The response of `/inference/v1/generate`: only tokens, no text."""
    answered = []
    for choice in choices:
        pairs = zip(choice.token_ids, choice.logprobs, strict=True) if logprobs else ()
        content = [{"token": f"token_id:{token}", "logprob": logprob} for token, logprob in pairs]
        answered.append(
            {
                "index": choice.index,
                "token_ids": choice.token_ids,
                "finish_reason": choice.finished_by(),
                "logprobs": {"content": content} if logprobs else None,
            }
        )
    prompt, usage = list(head.prompts[0]), head.usage(choices)
    return {"request_id": head.id, "model": head.model, "choices": answered, "prompt_token_ids": prompt, "usage": usage}


def as_calls(calls: Sequence[Mapping[str, Any]], prompt: int, choice: Completed) -> list[Json]:
    """A choice's tool calls in OpenAI's form: each with an id, and with its arguments as a JSON string. `prompt` is the
    number of the prompt's tokens.

    An id has nine letters or digits, unless the model wrote its own: clients send ids back, and Mistral's templates
    refuse any other form. Ids are the same for the same tokens, because a template may show them to the model.
    """
    source, found = f"{prompt} {choice.token_ids}", []
    for number, call in enumerate(calls):
        function = call["function"]
        named = {"name": function["name"], "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        new_id = blake2b(f"{number} {source}".encode()).hexdigest()[:9]
        found.append({"id": call.get("id") or new_id, "type": "function", "function": named})
    return found


def _object(head: AnswerHead, name: str, kind: str, choices: Sequence[Json]) -> Json:
    return {"id": name, "object": kind, "created": head.created, "model": head.model, "choices": list(choices)}
