"""`grpo bench serve`: its clients, what they ask, and what they count."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from grpo.benchmark.clients import Clients
from grpo.benchmark.serving import SERVED, STREAMED, Load, _side, numbers_of
from grpo.config import ModelConfig
from grpo.errors import RunError, UserError
from grpo.model.load import load
from grpo.serving.speaker import Speaker

USAGE = {"prompt_tokens": 3, "completion_tokens": 4}
WHOLE = json.dumps({"choices": [], "usage": USAGE}).encode()
EVENTS = b'data: {"choices": [1]}\n\n', b'data: {"choices": [], "usage": %s}\n\n' % json.dumps(USAGE).encode()


def chunked() -> bytes:
    parts = [*EVENTS, b"data: [DONE]\n\n", b""]
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body


ANSWERS = {
    "whole": (b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(WHOLE) + WHOLE, 2),
    "an old server, which closes": (b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(WHOLE) + WHOLE, 4),
    "to the end": (b"HTTP/1.0 200 OK\r\n\r\n" + b"".join(EVENTS), 4),
    "in chunks": (chunked(), 2),
}


async def asked(answer: bytes, work: Callable[[Clients], Awaitable[Any]]) -> tuple[Any, list[bytes], int]:
    """What the work gives with a server that answers so, the bodies that it was sent, and its connections."""
    bodies: list[bytes] = []
    serving: list[Any] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                bodies.append(await reader.readexactly(length))
                writer.write(answer)
                if answer.startswith(b"HTTP/1.0"):
                    break
        except asyncio.IncompleteReadError:
            pass
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        clients = Clients("127.0.0.1", server.sockets[0].getsockname()[1])
        try:
            found = await work(clients)
        finally:
            await clients.close()
            await asyncio.gather(*serving)
    return found, bodies, len(serving)


@pytest.mark.parametrize("kind", ANSWERS)
def test_clients_count_tokens_however_they_are_answered(kind: str) -> None:
    answer, expected = ANSWERS[kind]

    async def work(clients: Clients) -> list[dict[str, float]]:
        return [await clients.ask([{"n": 1}, {"n": 2}]) for _ in range(2)]

    found, bodies, connections = asyncio.run(asked(answer, work))
    assert sorted(map(json.loads, bodies), key=lambda one: one["n"]) == [{"n": 1}] * 2 + [{"n": 2}] * 2
    assert connections == expected
    for one in found:
        assert (one["prompt tokens"], one["tokens"]) == (6, 8)
        assert one["s"] > 0


def test_a_refusal_ends_the_measuring() -> None:
    refusal = b"HTTP/1.1 429 busy\r\nContent-Length: 4\r\n\r\nbusy"
    with pytest.raises(ValueError, match="429"):
        asyncio.run(asked(refusal, lambda clients: clients.ask([{}])))


@pytest.fixture(scope="module")
def speaker(toy_folder: Any) -> Speaker:
    _, tokenizer = load(ModelConfig(name=str(toy_folder)))
    return Speaker(tokenizer, len(tokenizer.get_vocab()), None)


def test_each_client_asks_something_else_at_every_turn(speaker: Speaker) -> None:
    asks = Load(speaker, clients=3, prompt_length=40, completion_length=5)
    texts = [message["content"] for turn in range(3) for (message,) in asks.messages(turn)]
    assert len(set(texts)) == 9
    assert len({text[:8] for text in texts}) == 9  # or a server that keeps prompts would have less to do
    assert asks.messages(1) == asks.messages(1)
    assert {len(asks.ids(messages)) for messages in asks.messages(0)} == {40}
    (body, *_) = asks.bodies(0)
    assert (body["max_tokens"], body["temperature"], "stream" in body) == (5, 1.0, False)
    assert asks.bodies(0, streamed=True)[0]["stream_options"] == {"include_usage": True}


def test_a_server_that_has_read_other_prompts_is_found_out(speaker: Speaker) -> None:
    asks = Load(speaker, clients=2, prompt_length=40, completion_length=5)
    sent: list[Any] = []

    def answer(bodies: Any) -> Any:
        sent.append(bodies)
        return {"s": 2.0, "prompt tokens": 80, "tokens": 10}

    side = _side(STREAMED, answer, asks)
    assert [side.run(), side.run()] == [{"tok/s": 5.0}] * 2
    assert sent == [asks.bodies(0, True), asks.bodies(1, True)]
    with pytest.raises(RunError, match="has read 79 prompt tokens instead of 80"):
        _side(SERVED, lambda _: {"s": 2.0, "prompt tokens": 79, "tokens": 10}, asks).run()


@pytest.mark.parametrize("text", ["", "0", "1,x", "1,,8", "257", "-1"])
def test_numbers_of_clients(text: str) -> None:
    assert numbers_of("1, 8,64") == [1, 8, 64]
    with pytest.raises(UserError, match="expected numbers from 1 to 256"):
        numbers_of(text)


def test_a_shape_without_room_for_the_template_s_tokens_is_refused() -> None:
    from grpo.benchmark import serving
    from grpo.benchmark.setting import Setting

    with pytest.raises(UserError, match="qwen3-tiny has 256 tokens, but its tokenizer has 276: choose a larger shape"):
        next(serving.serving_costs(Setting("qwen3-tiny"), [1], peer=False))


def test_a_model_without_a_chat_template_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo.benchmark import serving
    from grpo.benchmark.setting import Setting

    monkeypatch.setattr(serving, "load", lambda _: (None, SimpleNamespace(has_chat_template=False)))
    with pytest.raises(UserError, match="has no chat template"):
        next(serving.serving_costs(Setting("qwen3-tiny"), [1], peer=False))
