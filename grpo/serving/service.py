"""What each endpoint does with a request, without HTTP."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from grpo.errors import did_you_mean
from grpo.generation.sampling import Sampling
from grpo.serving.answers import AnswerForm, AnswerHead, ChatForm, CompletionForm, Json, tokens_answer
from grpo.serving.asks import Ask, Piece
from grpo.serving.choices import Completed, Reader
from grpo.serving.decoder import ENDED, DecodingLoop
from grpo.serving.exchange import Exchange, Turnstile
from grpo.serving.refusals import Refusal, wrong
from grpo.serving.shelf import Models
from grpo.serving.speaker import Speaker, Voice
from grpo.serving.wire import ChatRequest, CompletionRequest, GenerateRequest, OpenAIFields, SamplingFields

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """What one client can take from the others.

    requests      under way at once, those that wait included; more are refused (429)
    seconds       for an answer
    body_bytes    of a request
    body_seconds  for a request's body to arrive
    """

    requests: int = 256
    seconds: float = 600.0
    body_bytes: int = 8 * 2**20
    body_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class Answerable:
    """A request that can be answered: what decodes, and how it is read and told."""

    asks: Sequence[Ask]
    form: AnswerForm
    voice: Voice | None = None
    usage: bool = False


class Service:
    """Belongs to one event loop. `defaults` is how to sample unless a request says otherwise."""

    def __init__(
        self,
        decoder: DecodingLoop,
        speaker: Speaker,
        models: Models,
        defaults: Sampling,
        limits: ServingLimits | None = None,
    ) -> None:
        self.limits = limits or ServingLimits()
        self._decoder, self._speaker, self._models, self._defaults = decoder, speaker, models, defaults
        self._turnstile, self._began = Turnstile(self.limits.requests), int(time.time())
        self._encoding = ThreadPoolExecutor(1, "encoding")  # long prompts take a while, and others wait meanwhile

    def close(self) -> None:
        """End its own thread."""
        self._encoding.shutdown(wait=False, cancel_futures=True)

    def health(self) -> Json:
        """Raises Refusal where nothing can be answered."""
        if self._decoder.ended:
            raise ENDED
        return {"status": "ok"}

    def models(self) -> Json:
        """`/v1/models`."""
        longest = {} if self._speaker.longest is None else {"max_model_len": self._speaker.longest}
        shared = {"object": "model", "created": self._began, "owned_by": "grpo", **longest}
        return {"object": "list", "data": [{"id": name, **shared} for name in self._models.names()]}

    def model(self, name: str) -> Json:
        """`/v1/models/NAME`. Raises Refusal."""
        found = self._found(name)
        return {**self.models()["data"][0], "id": found}

    async def chat(self, asked: ChatRequest) -> Answerable:
        """Raises Refusal."""
        tools = [] if asked.tool_choice == "none" else [tool.model_dump() for tool in asked.tools or ()]

        def made() -> tuple[Voice, tuple[int, ...]]:
            voice = self._speaker.voice(tools, asked.chat_template_kwargs)
            return voice, self._speaker.prompt_of(voice, asked.messages)

        voice, prompt = await self._encoded(made)
        return self._prepared(asked, [prompt], bool(asked.logprobs), ChatForm, voice)

    async def completion(self, asked: CompletionRequest) -> Answerable:
        """Raises Refusal."""
        speaker = self._speaker

        def made() -> list[tuple[int, ...]]:
            return [
                speaker.prompt_of_text(one) if isinstance(one, str) else speaker.checked(one, "prompt")
                for one in asked.prompts
            ]

        prompts = await self._encoded(made)
        return self._prepared(asked, prompts, asked.logprobs is not None, CompletionForm)

    async def whole(self, prepared: Answerable) -> Json:
        """The answer at once. Raises Refusal."""
        choices = await self._ended(prepared.asks)
        stopping = self._speaker.stopping(prepared.asks[0].sampling)
        reader = Reader(self._speaker, stopping, prepared.voice)
        messages = [reader.message(choice.token_ids) for choice in choices]
        return prepared.form.whole(choices, messages)

    async def generate(self, asked: GenerateRequest) -> Json:
        """`/inference/v1/generate`: tokens in, tokens out. Raises Refusal."""
        params = asked.sampling_params
        prompt = self._speaker.checked(asked.token_ids, "token_ids")
        logprobs = params.logprobs is not None
        ask = self._ask(asked.model, params, prompt, logprobs)
        return tokens_answer(AnswerHead(ask.model, [prompt], ask.n), await self._ended([ask]), logprobs)

    @contextmanager
    def begun(self, asks: Sequence[Ask]) -> Iterator[Exchange]:
        """A request under way, until the end of the block. Raises Refusal where too many are."""
        with self._turnstile.enter(len(asks)):
            exchange = Exchange(self._decoder, asks)
            try:
                yield exchange
            finally:
                exchange.close()

    async def events(self, prepared: Answerable, exchange: Exchange) -> AsyncIterator[bytes]:
        """The answer as server-sent events. What goes wrong after the first is the last of them; what goes wrong before
        raises Refusal."""
        form, stopping = prepared.form, self._speaker.stopping(prepared.asks[0].sampling)
        readers = [Reader(self._speaker, stopping, prepared.voice) for _ in exchange.choices]
        until = asyncio.get_running_loop().time() + self.limits.seconds
        pieces = await self._in_time(exchange.next(), until)
        yield b"".join(_event(form.opening(choice)) for choice in exchange.choices)
        try:
            while True:
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
        """What a coroutine gives. Raises Refusal if that takes beyond the moment `until` of the event loop's clock."""
        try:
            async with asyncio.timeout_at(until):
                return await made
        except TimeoutError:
            said = f"no answer within {self.limits.seconds:g} seconds: ask for fewer tokens"
            raise Refusal(504, said, "timeout") from None

    async def _encoded(self, make: Callable[[], Made]) -> Made:
        return await asyncio.get_running_loop().run_in_executor(self._encoding, make)

    def _prepared(
        self,
        asked: OpenAIFields,
        prompts: Sequence[tuple[int, ...]],
        logprobs: bool,
        form: type[ChatForm | CompletionForm],
        voice: Voice | None = None,
    ) -> Answerable:
        gradually = bool(asked.stream)
        if asked.stream_options is not None and not gradually:
            raise wrong("stream_options", "it is for streams: set stream to true, or leave it out")
        asks = [replace(self._ask(asked.model, asked, one, logprobs), gradually=gradually) for one in prompts]
        head = AnswerHead(asks[0].model, prompts, asks[0].n)
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        text = lambda ids: self._speaker.text(ids, special=True)  # noqa: E731
        return Answerable(asks, form(head, text, bool(asked.return_token_ids), logprobs), voice, usage)

    def _ask(self, model: str | None, asked: SamplingFields, prompt: tuple[int, ...], logprobs: bool) -> Ask:
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        sampling = self._sampling(asked, len(prompt))
        return Ask(self._found(model), prompt, sampling, asked.n or 1, seed, logprobs)

    def _found(self, name: str | None) -> str:
        found = self._models.find(self._models.names()[0] if name is None else name)
        if found is None:
            hint = did_you_mean(name or "", self._models.names())
            raise Refusal(
                404, f"there is no model {name!r:.200}.{hint} /v1/models lists all", "model_not_found", "model"
            )
        return found

    def _sampling(self, asked: SamplingFields, prompt: int) -> Sampling:
        """How to sample: what was asked for, and otherwise the defaults. At temperature 0 nothing reshapes the answer
        but what was asked for."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_tokens")
        given: dict[str, Any] = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
        if given.get("top_k") == -1:
            given["top_k"] = 0
        if asked.stop is not None:
            given["stop"] = (asked.stop,) if isinstance(asked.stop, str) else asked.stop
        if asked.stop_token_ids is not None:
            given["stop_ids"] = asked.stop_token_ids
        base = self._defaults
        if given.get("temperature") == 0:
            base = replace(base, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
        sampling = replace(base, **given)
        return replace(sampling, max_tokens=self._max_tokens(asked.length, sampling.max_tokens, prompt))

    def _max_tokens(self, asked: int | None, default: int, prompt: int) -> int:
        room = None if self._speaker.longest is None else self._speaker.longest - prompt
        if asked is not None and room is not None and asked > room:
            raise wrong(
                "max_tokens",
                f"{asked} after a prompt of {prompt} tokens is more than the {self._speaker.longest} that both have "
                "together",
                "context_length_exceeded",
            )
        return asked or (default if room is None else min(default, room))


def _chunk(form: AnswerForm, reader: Reader, choice: Completed, piece: Piece) -> Json | None:
    return form.chunk(choice, piece, reader.delta(piece, choice.token_ids))


def _event(told: Json | None) -> bytes:
    if told is None:
        return b""
    return b"data: " + json.dumps(told, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
