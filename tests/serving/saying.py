"""A service whose model says what a test tells it to, in the words of any family's tokenizer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from grpo.generation.sampling import Sampling
from grpo.generation.stopping import Stopping
from grpo.serving.asks import Ask, Piece, Ticket
from grpo.serving.service import Service
from grpo.serving.speaker import Speaker
from grpo.serving.wire import ChatRequest, CompletionRequest, read


class Says:
    """In the place of a decoder: every completion is this text, a token at a time where it is asked for gradually."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer, self.ids = tokenizer, tokenizer.encode(text, add_special_tokens=False)
        self.asks: list[Ask] = []

    def submit(self, ask: Ask, tell: Any) -> Ticket:
        self.asks.append(ask)
        ids = self._until_its_end(ask)
        reason = "stop" if len(ids) < len(self.ids) or ids[-1] in self.tokenizer.eos_token_ids else "length"
        logprobs = tuple(-0.5 * place for place in range(len(ids)))
        for index in range(ask.n):
            pieces = [Piece(index, tuple(ids), logprobs)]
            if ask.gradually:
                pieces = [Piece(index, (token,), (logprob,)) for token, logprob in zip(ids, logprobs, strict=True)]
            last = pieces.pop()
            for piece in [*pieces, Piece(index, last.token_ids, last.logprobs, reason)]:
                tell([piece])
        return Ticket(ask, tell)

    def cancel(self, ticket: Ticket) -> None:
        """Nothing to do: it has ended."""

    def _until_its_end(self, ask: Ask) -> list[int]:
        stops = frozenset(self.tokenizer.eos_token_ids)
        stopping = Stopping(ask.sampling, stops, lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True))
        ends = (end for end in range(1, len(self.ids)) if stopping.reason(self.ids[:end]) == "stop")
        return self.ids[: next(ends, len(self.ids))]


class Base:
    """One model without adapters."""

    def names(self) -> list[str]:
        return ["base"]

    def find(self, name: str) -> str | None:
        return name if name == "base" else None

    def folder(self, name: str) -> None:
        return None


def answers(tokenizer: Any, text: str, body: dict[str, Any], longest: int = 4096) -> tuple[Any, list[Any], Ask]:
    """The whole answer, the events of its stream, and what was asked of the decoder."""
    says = Says(tokenizer, text)
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    service = Service(says, Speaker(tokenizer, vocabulary, longest), Base(), Sampling(1.0, 4000))  # type: ignore[arg-type]

    async def both() -> tuple[Any, list[Any]]:
        kind, prepare = (ChatRequest, service.chat) if "messages" in body else (CompletionRequest, service.completion)
        whole = await service.whole(await prepare(read(kind, _json(body))))  # type: ignore[arg-type,operator]
        prepared = await prepare(read(kind, _json({**body, "stream": True})))  # type: ignore[arg-type,operator]
        with service.begun(prepared.asks) as exchange:
            text = b"".join([event async for event in service.events(prepared, exchange)]).decode()
        *events, done, end = text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        return whole, [json.loads(event.removeprefix("data: ")) for event in events]

    try:
        whole, events = asyncio.run(both())
    finally:
        service.close()
    return whole, events, says.asks[0]


def put_together(events: Sequence[Any]) -> dict[str, Any]:
    """The message and the end of the first choice, as a client puts a stream together."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    finish = None
    for choice in (one for event in events for one in event["choices"] if one["index"] == 0):
        delta = choice["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning_content"] += delta.get("reasoning_content") or ""
        message["tool_calls"] += delta.get("tool_calls") or []
        finish = finish or choice["finish_reason"]
    return {**message, "finish_reason": finish}


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()
