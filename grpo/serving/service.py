"""The work of each endpoint, without HTTP."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from grpo.errors import did_you_mean
from grpo.generation.sampling import Sampling
from grpo.serving.answers import AnswerForm, AnswerHead, ChatForm, CompletionForm, Json, tokens_answer
from grpo.serving.asks import Answerer, Ask, Piece
from grpo.serving.choices import Completed, Reader, said_of
from grpo.serving.exchange import Exchange, Turnstile
from grpo.serving.refusals import ENDED, Refusal, wrong
from grpo.serving.sessions import SessionMemory, SessionRules, Sessions
from grpo.serving.shelf import Models
from grpo.serving.speaker import Speaker, Spoken, Voice
from grpo.serving.wire import ChatRequest, CompletionRequest, GenerateRequest, OpenAIFields, SamplingFields
from grpo.serving.wishes import sampling_of
from grpo.types import Message

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """Limits that keep one client from using up the server.

    requests      number in progress, including those that wait for a slot; more are refused (429)
    seconds       time for a response
    body_bytes    size of a request
    body_seconds  time for a request's body to arrive
    """

    requests: int = 256
    seconds: float = 600.0
    body_bytes: int = 8 * 2**20
    body_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class Answerable:
    """A request that is ready to be answered: its decoding requests and prompts, how to read the completions, the form
    of the response, and the session that remembers it."""

    asks: Sequence[Ask]
    prompts: Sequence[Spoken]
    form: AnswerForm
    voice: Voice | None = None
    usage: bool = False
    session: SessionMemory | None = None

    def remember(self, ended: Iterable[tuple[Completed, Message]]) -> None:
        """Add choices that have ended, with their messages, to the session, if there is one."""
        if self.session is not None:
            n = self.asks[0].n
            self.session.add([said_of(self.prompts[choice.index // n], choice, message) for choice, message in ended])


class Service:
    """Answers requests. Use it in one event loop; `open` and `end` can be called from any thread.

    `defaults` is the sampling for settings that a request leaves out. With `sessions_only`, requests without an open
    session are refused.
    """

    def __init__(
        self,
        decoder: Answerer,
        speaker: Speaker,
        models: Models,
        defaults: Sampling,
        limits: ServingLimits | None = None,
        sessions_only: bool = False,
    ) -> None:
        self.limits = limits or ServingLimits()
        self._decoder, self._speaker, self._models, self._defaults = decoder, speaker, models, defaults
        self._sessions = Sessions(sessions_only)
        self._turnstile, self._began = Turnstile(self.limits.requests), int(time.time())
        self._encoding = ThreadPoolExecutor(1, "encoding")  # encoding a long prompt would block the event loop

    def close(self) -> None:
        """Shut down the encoding thread."""
        self._encoding.shutdown(wait=False, cancel_futures=True)

    def open(self, session: str, rules: SessionRules) -> None:
        """Begin a session. Raises ValueError if it is already open."""
        self._sessions.open(session, rules)

    def end(self, session: str) -> SessionMemory:
        """End a session, and return its answers. New requests of the session are refused from now on; refusing those in
        progress is up to the decoder. Raises KeyError if the session is not open."""
        return self._sessions.end(session)

    def session(self, id: str | None) -> SessionMemory | None:
        """The session of a request. See `Sessions.find` for the Refusals that it raises."""
        return self._sessions.find(id)

    def health(self) -> Json:
        """`/health`. Raises Refusal if the server has stopped decoding."""
        if self._decoder.ended:
            raise ENDED
        return {"status": "ok"}

    def models(self) -> Json:
        """`/v1/models`."""
        longest = {} if self._speaker.longest is None else {"max_model_len": self._speaker.longest}
        shared = {"object": "model", "created": self._began, "owned_by": "grpo", **longest}
        return {"object": "list", "data": [{"id": name, **shared} for name in self._models.names()]}

    def model(self, name: str) -> Json:
        """`/v1/models/NAME`. Raises Refusal if there is no such model."""
        self._found(name)
        return {**self.models()["data"][0], "id": name}

    async def chat(self, asked: ChatRequest, session: SessionMemory | None = None) -> Answerable:
        """Prepare a request to `/v1/chat/completions`. Raises Refusal."""
        tools = [] if asked.tool_choice == "none" else [tool.model_dump() for tool in asked.tools or ()]

        def made() -> tuple[Voice, Spoken]:
            voice = self._speaker.voice(tools, asked.chat_template_kwargs)
            return voice, self._speaker.prompt_of(voice, asked.messages, session)

        voice, prompt = await self._encoded(made)
        return self._prepared(asked, [prompt], bool(asked.logprobs), ChatForm, voice, session)

    async def completion(self, asked: CompletionRequest, session: SessionMemory | None = None) -> Answerable:
        """Prepare a request to `/v1/completions`. Raises Refusal."""
        prompts = await self._encoded(
            lambda: [self._speaker.prompt_as_it_is(prompt, "prompt", session) for prompt in asked.prompts]
        )
        return self._prepared(asked, prompts, asked.logprobs is not None, CompletionForm, session=session)

    async def whole(self, prepared: Answerable) -> Json:
        """Decode a prepared request, and return the whole response. Raises Refusal."""
        choices = await self._ended(prepared.asks)
        stopping = self._speaker.stopping(prepared.asks[0].sampling)
        reader = Reader(self._speaker, stopping, prepared.voice)
        messages = [reader.message(choice.token_ids) for choice in choices]
        prepared.remember(zip(choices, messages, strict=True))
        return prepared.form.whole(choices, messages)

    async def generate(self, asked: GenerateRequest, session: SessionMemory | None = None) -> Json:
        """`/inference/v1/generate`: tokens in, tokens out. Raises Refusal."""
        params = asked.sampling_params
        prompt = self._speaker.prompt_as_it_is(asked.token_ids, "token_ids", session)
        logprobs = params.logprobs is not None
        ask = self._ask(asked.model, params, prompt.ids, logprobs, session)
        choices = await self._ended([ask])
        if session is not None:
            reader = Reader(self._speaker, self._speaker.stopping(ask.sampling))
            session.add([said_of(prompt, choice, reader.message(choice.token_ids)) for choice in choices])
        return tokens_answer(AnswerHead(ask.model, [prompt.ids], ask.n), choices, logprobs)

    @contextmanager
    def begun(self, asks: Sequence[Ask]) -> Iterator[Exchange]:
        """Decode requests until the end of the block. Raises Refusal if too many are in progress."""
        with self._turnstile.enter(len(asks)):
            exchange = Exchange(self._decoder, asks)
            try:
                yield exchange
            finally:
                exchange.close()

    async def events(self, prepared: Answerable, exchange: Exchange) -> AsyncIterator[bytes]:
        """The response as server-sent events. A Refusal before the first event is raised; a later Refusal becomes the
        last event."""
        form, stopping = prepared.form, self._speaker.stopping(prepared.asks[0].sampling)
        readers = [Reader(self._speaker, stopping, prepared.voice) for _ in exchange.choices]
        until = asyncio.get_running_loop().time() + self.limits.seconds
        pieces = await self._in_time(exchange.next(), until)
        yield b"".join(_event(form.opening(choice)) for choice in exchange.choices)
        try:
            while True:
                prepared.remember(
                    (choice, readers[choice.index].message(choice.token_ids)) for choice, piece in pieces if piece.ended
                )
                yield b"".join(_event(_chunk(form, readers[choice.index], choice, piece)) for choice, piece in pieces)
                if exchange.over:
                    break
                pieces = await self._in_time(exchange.next(), until)
        except Refusal as refusal:
            yield _event(refusal.body())
            return
        if prepared.usage:
            yield _event(form.closing(exchange.choices))
        yield b"data: [DONE]\n\n"

    async def _ended(self, asks: Sequence[Ask]) -> list[Completed]:
        with self.begun(asks) as exchange:
            return await self._in_time(exchange.end(), asyncio.get_running_loop().time() + self.limits.seconds)

    async def _in_time(self, made: Coroutine[Any, Any, Made], until: float) -> Made:
        """The result of a coroutine. Raises Refusal if it is not done at the time `until` of the event loop's clock."""
        try:
            async with asyncio.timeout_at(until):
                return await made
        except TimeoutError:
            what = f"the response was not complete within {self.limits.seconds:g} seconds: request fewer tokens"
            raise Refusal(504, what, "timeout") from None

    async def _encoded(self, make: Callable[[], Made]) -> Made:
        return await asyncio.get_running_loop().run_in_executor(self._encoding, make)

    def _prepared(
        self,
        asked: OpenAIFields,
        prompts: Sequence[Spoken],
        logprobs: bool,
        form: type[ChatForm | CompletionForm],
        voice: Voice | None = None,
        session: SessionMemory | None = None,
    ) -> Answerable:
        gradually = bool(asked.stream)
        if asked.stream_options is not None and not gradually:
            raise wrong("stream_options", "this field applies only to streams: set stream to true, or leave it out")
        whole = [self._ask(asked.model, asked, prompt.ids, logprobs, session) for prompt in prompts]
        asks = [replace(ask, gradually=gradually) for ask in whole]
        head = AnswerHead(asks[0].model, [prompt.ids for prompt in prompts], asks[0].n)
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        text = lambda ids: self._speaker.text(ids, special=True)  # noqa: E731
        made = form(head, text, bool(asked.return_token_ids), logprobs)
        return Answerable(asks, prompts, made, voice, usage, session)

    def _ask(
        self,
        model: str | None,
        asked: SamplingFields,
        prompt: tuple[int, ...],
        logprobs: bool,
        session: SessionMemory | None,
    ) -> Ask:
        rules, id = (None, None) if session is None else (session.rules, session.id)
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        sampling = sampling_of(asked, self._defaults, len(prompt), self._speaker.longest, rules)
        return Ask(self._found(model), prompt, sampling, asked.n or 1, seed, logprobs, session=id)

    def _found(self, name: str | None) -> str:
        found = self._models.find(self._models.names()[0] if name is None else name)
        if found is None:
            names = self._models.names()
            hint = did_you_mean(name or "", names) or f" Use model={' or '.join(map(repr, names[:2]))}."
            listed = " /v1/models lists all models." if len(names) > 2 else ""
            raise Refusal(404, f"there is no model {name!r:.200}.{hint}{listed}", "model_not_found", "model")
        return found


def _chunk(form: AnswerForm, reader: Reader, choice: Completed, piece: Piece) -> Json | None:
    return form.chunk(choice, piece, reader.delta(piece, choice.token_ids))


def _event(data: Json | None) -> bytes:
    if data is None:
        return b""
    return b"data: " + json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
