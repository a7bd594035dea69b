"""Clients that go away, are slow, or send what is no request."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from serving import Folders, decoding, served

from grpo.generation.sampling import Sampling
from grpo.serving import app as app_module
from grpo.serving.app import application
from grpo.serving.guard import Guard
from grpo.serving.service import Service, ServingLimits
from grpo.serving.speaker import Speaker

ENDLESS = {"prompt": "a", "max_tokens": 1_000_000}


class Client:
    """One HTTP request over ASGI, whose body and end come when a test lets them."""

    def __init__(self, app: Any, path: str = "/v1/completions", unread: int = 0) -> None:
        """With `unread` only so many messages are taken before somebody reads."""
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        self.scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        self.scope |= {"http_version": "1.1", "scheme": "http", "root_path": "", "raw_path": path.encode()}
        self.incoming: asyncio.Queue[Any] = asyncio.Queue()
        self.outgoing: asyncio.Queue[Any] = asyncio.Queue(unread)
        self.task = asyncio.ensure_future(app(self.scope, self.incoming.get, self.outgoing.put))

    def send(self, body: bytes, more: bool = False) -> None:
        self.incoming.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def go(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})

    async def status(self) -> int:
        status: int = (await self.outgoing.get())["status"]
        return status


@asynccontextmanager
async def service_of(folder: Path, limits: ServingLimits | None = None) -> AsyncIterator[tuple[Service, Any]]:
    """A service with one slot whose model never stops, and its application."""
    with decoding(folder, slots=1) as (decoder, tokenizer):
        decoder._generator.stop_ids = frozenset()
        speaker = Speaker(tokenizer, len(tokenizer.get_vocab()), 2_000_000)
        service = Service(decoder, speaker, Folders({}), Sampling(1.0, 4), limits)
        yield service, application(service, Guard())
        service.close()


async def others_are_served(service: Service, app: Any) -> None:
    """The only slot is free, and nothing counts as under way."""
    client = Client(app)
    client.send(json.dumps({"prompt": "b"}).encode())
    assert await client.status() == 200
    await client.task
    assert service._turnstile.inside == 0


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_gives_the_slot_back(toy_folder: Path, stream: bool) -> None:
    async def play() -> None:
        async with service_of(toy_folder) as (service, app):
            client = Client(app)
            client.send(json.dumps({**ENDLESS, "stream": stream}).encode())
            if stream:
                assert await client.status() == 200
                await client.outgoing.get()
            else:
                while not service._turnstile.inside:
                    await asyncio.sleep(0.01)
            client.go()
            await client.task
            await others_are_served(service, app)

    asyncio.run(asyncio.wait_for(play(), 60))


def test_who_goes_away_while_sending_leaves_nothing(toy_folder: Path) -> None:
    async def play() -> None:
        async with service_of(toy_folder) as (service, app):
            client = Client(app)
            client.send(b'{"prompt": ', more=True)
            client.go()
            await client.task
            await others_are_served(service, app)

    asyncio.run(asyncio.wait_for(play(), 60))


def test_who_sends_slowly_or_reads_slowly_is_given_up(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "GRACE", 0.1)

    async def play() -> None:
        async with service_of(toy_folder, ServingLimits(seconds=0.5, body_seconds=0.05)) as (service, app):
            sender = Client(app)
            sender.send(b'{"prompt": ', more=True)
            assert await sender.status() == 408
            await sender.task
            reader = Client(app, unread=2)
            reader.send(json.dumps({**ENDLESS, "stream": True}).encode())
            await reader.task
            await others_are_served(service, app)

    asyncio.run(asyncio.wait_for(play(), 60))


def test_a_stream_that_takes_too_long_ends_with_an_error(toy_folder: Path) -> None:
    async def play() -> None:
        async with service_of(toy_folder, ServingLimits(seconds=0.5)) as (service, app):
            client = Client(app)
            client.send(json.dumps({**ENDLESS, "stream": True}).encode())
            await client.task
            events = b"".join([(await client.outgoing.get()).get("body", b"") for _ in range(client.outgoing.qsize())])
            *_, last, end = events.decode().split("\n\n")
            assert end == ""
            assert json.loads(last.removeprefix("data: "))["error"]["type"] == "timeout_error"
            await others_are_served(service, app)

    asyncio.run(asyncio.wait_for(play(), 60))


VALUES: list[Any] = [None, True, -1, 0, 1, 1e308, 10**30, "", "x", "\0", "x" * 10_000, [], [[]], [None], {}, {"a": 1}]
FIELDS = (
    *("model", "messages", "prompt", "n", "seed", "stop", "stream", "temperature", "top_p", "top_k", "min_p"),
    *("max_tokens", "tools", "tool_choice", "logprobs", "stream_options", "token_ids", "sampling_params", "echo"),
    *("chat_template_kwargs", "response_format", "stop_token_ids", "user", "metadata", "nonsense"),
)


@pytest.mark.slow
def test_two_thousand_malformed_requests_get_an_answer_each_and_the_rest_is_served(
    toy_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(0)
    bodies = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
        "/v1/completions": {"prompt": "hi", "max_tokens": 1},
        "/inference/v1/generate": {"token_ids": [5], "sampling_params": {"max_tokens": 1}},
    }
    statuses: dict[int, int] = {}
    with served(toy_folder) as client:
        for _ in range(2000):
            path = draw.choice(list(bodies))
            body = json.dumps({**bodies[path], **{draw.choice(FIELDS): draw.choice(VALUES) for _ in range(2)}}).encode()
            if draw.random() < 0.3:
                at = draw.randrange(len(body))
                body = draw.choice([body[:at], body[:at] + bytes([draw.randrange(256)]) + body[at:], body * 2])
            answer = client.post(path, content=body, headers={"content-type": "application/json"})
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]
        assert set(statuses) <= {200, 400, 404}, statuses
        assert statuses[400] > 1000
        whole = client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2})
        assert whole.json()["usage"]["completion_tokens"] in (1, 2)
    assert "Traceback" not in caplog.text
