"""The JSON that requests are answered with: OpenAI's two forms, with token ids where they were asked for, and tokens
alone."""

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
    """What all answers begin with. `prompts` are the tokens of the prompts, each of which has `n` choices."""

    model: str
    prompts: Sequence[Sequence[int]]
    n: int
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self, choices: Sequence[Completed]) -> Json:
        """Tokens, with stop tokens; a prompt counts once for all its choices."""
        asked, said = sum(map(len, self.prompts)), sum(len(choice.token_ids) for choice in choices)
        return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}

    def prompt_of(self, choice: Completed) -> list[int]:
        return list(self.prompts[choice.index // self.n])


class AnswerForm(Protocol):
    """How an endpoint answers."""

    def whole(self, choices: Sequence[Completed], messages: Sequence[Json]) -> Json:
        """The answer at once. `messages` are what the choices say."""
        ...

    def opening(self, choice: Completed) -> Json | None:
        """What begins a choice in a stream."""
        ...

    def chunk(self, choice: Completed, piece: Piece, delta: Delta) -> Json | None:
        """What a piece adds; None for nothing."""
        ...

    def closing(self, choices: Sequence[Completed]) -> Json:
        """The last event of a stream where usage is asked for."""
        ...


@dataclass(frozen=True, slots=True)
class ChatForm:
    """`/v1/chat/completions`."""

    head: AnswerHead
    text: TextOf
    ids: bool
    logprobs: bool

    def whole(self, choices: Sequence[Completed], messages: Sequence[Json]) -> Json:
        told = [self._choice(choice, message) for choice, message in zip(choices, messages, strict=True)]
        ids = {"prompt_token_ids": list(self.head.prompts[0])} if self.ids else {}
        return self._object("chat.completion", told) | ids | {"usage": self.head.usage(choices)}

    def opening(self, choice: Completed) -> Json | None:
        ids = {"prompt_token_ids": list(self.head.prompts[0])} if self.ids and choice.index == 0 else {}
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}]) | ids

    def chunk(self, choice: Completed, piece: Piece, delta: Delta) -> Json | None:
        said: Json = {"content": delta.content} if delta.content else {}
        if delta.reasoning:
            said["reasoning_content"] = delta.reasoning
        if delta.calls:
            calls = as_calls(delta.calls, len(self.head.prompts[0]), choice)
            said["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
        if not said and piece.ended is None and not (self.ids or self.logprobs):
            return None
        finish = choice.finished_by(calls=bool(delta.calls)) if piece.ended else None
        told = {"index": choice.index, "delta": said, "finish_reason": finish}
        return self._chunk([told | self._tokens(piece.token_ids, piece.logprobs)])

    def closing(self, choices: Sequence[Completed]) -> Json:
        return self._chunk([]) | {"usage": self.head.usage(choices)}

    def _choice(self, choice: Completed, message: Json) -> Json:
        calls = as_calls(message.get("tool_calls") or (), len(self.head.prompts[0]), choice)
        said = {**message, "refusal": None}
        if calls:
            said |= {"content": message["content"] or None, "tool_calls": calls}
        told = {"index": choice.index, "message": said, "finish_reason": choice.finished_by(bool(calls))}
        return told | self._tokens(choice.token_ids, choice.logprobs)

    def _tokens(self, ids: Sequence[int], logprobs: Sequence[float]) -> Json:
        content = (
            {"content": [self._token(*pair) for pair in zip(ids, logprobs, strict=True)]} if self.logprobs else None
        )
        return {"logprobs": content, **({"token_ids": list(ids)} if self.ids else {})}

    def _token(self, token: int, logprob: float) -> Json:
        text = self.text([token])
        its_bytes = None if BROKEN in text else list(text.encode())  # of a part of a character only the tokenizer knows
        return {"token": text, "logprob": logprob, "bytes": its_bytes, "top_logprobs": []}

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
        told = []
        for choice, message in zip(choices, messages, strict=True):
            ids = {"prompt_token_ids": self.head.prompt_of(choice)} if self.ids else {}
            finish = choice.finished_by()
            tokens = self._tokens(choice, choice.token_ids, choice.logprobs)
            told.append({"index": choice.index, "text": message["content"], "finish_reason": finish} | tokens | ids)
        return self._object(told) | {"usage": self.head.usage(choices)}

    def opening(self, choice: Completed) -> Json | None:
        if not self.ids:
            return None
        ids = {"prompt_token_ids": self.head.prompt_of(choice), "token_ids": []}
        return self._object([{"index": choice.index, "text": "", "logprobs": None, "finish_reason": None, **ids}])

    def chunk(self, choice: Completed, piece: Piece, delta: Delta) -> Json | None:
        if not delta.content and piece.ended is None and not (self.ids or self.logprobs):
            return None
        finish = choice.finished_by() if piece.ended else None
        told = {"index": choice.index, "text": delta.content, "finish_reason": finish}
        return self._object([told | self._tokens(choice, piece.token_ids, piece.logprobs)])

    def closing(self, choices: Sequence[Completed]) -> Json:
        return self._object([]) | {"usage": self.head.usage(choices)}

    def _tokens(self, choice: Completed, ids: Sequence[int], logprobs: Sequence[float]) -> Json:
        told: Json | None = None
        if self.logprobs:
            texts = [self.text([token]) for token in ids]
            *offsets, choice.characters = accumulate(map(len, texts), initial=choice.characters)
            told = {"tokens": texts, "token_logprobs": list(logprobs), "top_logprobs": None, "text_offset": offsets}
        return {"logprobs": told, **({"token_ids": list(ids)} if self.ids else {})}

    def _object(self, choices: Sequence[Json]) -> Json:
        return _object(self.head, f"cmpl-{self.head.id}", "text_completion", choices)


def tokens_answer(head: AnswerHead, choices: Sequence[Completed], logprobs: bool) -> Json:
    """`/inference/v1/generate`: tokens alone."""
    told = []
    for choice in choices:
        pairs = zip(choice.token_ids, choice.logprobs, strict=True) if logprobs else ()
        content = [{"token": f"token_id:{token}", "logprob": logprob} for token, logprob in pairs]
        told.append(
            {
                "index": choice.index,
                "token_ids": choice.token_ids,
                "finish_reason": choice.finished_by(),
                "logprobs": {"content": content} if logprobs else None,
            }
        )
    prompt, usage = list(head.prompts[0]), head.usage(choices)
    return {"request_id": head.id, "model": head.model, "choices": told, "prompt_token_ids": prompt, "usage": usage}


def as_calls(calls: Sequence[Mapping[str, Any]], prompt: int, choice: Completed) -> list[Json]:
    """Tool calls of a choice as OpenAI has them: each with an id, its arguments as JSON in a text. `prompt` is the
    number of the prompt's tokens.

    Ids have nine letters or digits, unless the model gave its own: clients send them back, and Mistral's templates
    refuse all others. They are the same for the same tokens, since a template may show them to the model.
    """
    said, found = f"{prompt} {choice.token_ids}", []
    for number, call in enumerate(calls):
        function = call["function"]
        given = {"name": function["name"], "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        made = blake2b(f"{number} {said}".encode()).hexdigest()[:9]
        found.append({"id": call.get("id") or made, "type": "function", "function": given})
    return found


def _object(head: AnswerHead, name: str, kind: str, choices: Sequence[Json]) -> Json:
    return {"id": name, "object": kind, "created": head.created, "model": head.model, "choices": list(choices)}
