"""`grpo bench streaming`: one completion as a whole, token by token, and token by token under asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace

from grpo.backend.random import derive_key
from grpo.benchmark.models import model_for, tokenizer_for, vocabulary_of
from grpo.benchmark.protocol import Measurement, Side, Values, alternate, milliseconds
from grpo.benchmark.rollout import requests_of
from grpo.benchmark.setting import Setting
from grpo.generation.generator import Event, Generator
from grpo.generation.sampling import Sampling

LENGTHS = (10, 50, 100)
Callback = Callable[[Event], object]


def streaming_costs(setting: Setting) -> Iterator[Measurement]:
    """Milliseconds of a completion of each length: `Generator.generate`, `stream`, and `stream` in a coroutine.

    Streaming is compared with the plain call; callbacks that do work are compared with the callback that does nothing.
    """
    one = replace(setting, prompts=1, completions=1)
    model = model_for(one)
    generator = Generator(model, tokenizer_for(one, vocabulary_of(model)), slots=1)
    generator.stop_ids = frozenset()  # otherwise a real model might stop earlier in one turn than in another
    for length in LENGTHS:
        sides = _sides(generator, replace(one, completion_length=length))
        yield from alternate(f"{length} tokens, {setting.name}", sides, setting.runs)


def _sides(generator: Generator, setting: Setting) -> list[Side]:
    (request,) = requests_of(setting, generator.model)
    sampling, key = Sampling(max_tokens=setting.completion_length), derive_key(0, "draw")

    def plain() -> None:
        generator.generate([request], sampling, key, logprobs=False)

    def events() -> Iterator[Event]:
        return generator.stream(request, sampling, key)

    def to(callback: Callable[[], Callback]) -> Callable[[], None]:
        return lambda: _consume(events(), callback())

    return [
        Side("plain", _timed(plain)),
        Side("stream", _timed(to(_minimal))),
        Side("stream, formatting", _timed(to(_formatting)), against="stream"),
        Side("stream, accumulating", _timed(to(_accumulating)), against="stream"),
        Side("asyncio", _timed(lambda: asyncio.run(_consume_async(events(), _minimal())))),
    ]


def _timed(work: Callable[[], object]) -> Callable[[], Values]:
    return lambda: {"ms": milliseconds(work)}


def _consume(events: Iterator[Event], callback: Callback) -> None:
    for event in events:
        callback(event)


async def _consume_async(events: Iterator[Event], callback: Callback) -> None:
    """Consume events like a server, which lets other tasks run after each token."""
    for event in events:
        callback(event)
        await asyncio.sleep(0)


def _minimal() -> Callback:
    return lambda _: None


def _formatting() -> Callback:
    return lambda event: f"{event.token_id:>8} {event.text!r} {event.finish_reason or ''}"


def _accumulating() -> Callback:
    texts: list[str] = []

    def callback(event: Event) -> str:
        texts.append(event.text)
        return "".join(texts)

    return callback
