"""Two thousand clients that send what is no request, or go away in the middle: nothing of them is left."""

from __future__ import annotations

import json
import random
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

from listening import Listening, error_in, listening, open_files, received, request, statuses, until
from serving import Folders, decoding

from grpo.generation.sampling import Sampling
from grpo.serving import connection
from grpo.serving.service import Service, ServingLimits
from grpo.serving.speaker import Speaker

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/s/one/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/inference/v1/generate": {"token_ids": [5], "sampling_params": {"max_tokens": 2}},
}
VALUES: list[Any] = [None, True, -1, 1e308, 10**30, "", "x" * 5000, [], [[]], {}, {"a": 1}]
FIELDS = (
    "model",
    "messages",
    "prompt",
    "n",
    "stop",
    "stream",
    "top_k",
    "tools",
    "token_ids",
    "sampling_params",
    "nonsense",
)
HEADS = (
    *("Transfer-Encoding: chunked\r\n", "Content-Length: -1\r\n", "Expect: 100-continue\r\n", "Connection: close\r\n"),
    *("X: " + "x" * 70_000 + "\r\n", "no colon\r\n", "Host: evil.example\r\n", "Upgrade: websocket\r\n", ": \r\n"),
    *("X-Session-ID: \x01\r\n", "X-Session-ID: one\r\nX-Session-ID: two\r\n", "Content-Encoding: gzip\r\n", ""),
)


def malformed(draw: random.Random) -> tuple[bytes, int]:
    """Bytes to send, and for how many answers the client stays."""
    path = draw.choice(list(BODIES))
    body = json.dumps({**BODIES[path], draw.choice(FIELDS): draw.choice(VALUES)}).encode()
    kind = draw.randrange(6)
    if kind == 0:  # JSON that is broken
        at = draw.randrange(len(body))
        body = draw.choice([body[:at], body[:at] + bytes([draw.randrange(256)]) + body[at:], body * 2])
    sent = request(body, path, draw.choice(HEADS) if kind == 1 else "")
    if kind == 2:  # HTTP that is broken
        at = draw.randrange(len(sent))
        sent = sent[:at] + bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9))) + sent[at:]
    if kind == 3:  # a length that is not the body's
        sent = request(body, path, length=draw.choice([0, 1, len(body) - 1, len(body) + 7, 10**9]))
    if kind == 4:  # a connection that is cut, in the head, the body or the answer
        streaming = request({"prompt": "hi", "max_tokens": 50, "stream": draw.random() < 0.5})
        sent = draw.choice([sent[: draw.randrange(len(sent))], streaming])
    if kind == 5:  # requests that are sent ahead
        sent = request(BODIES["/v1/completions"]) + sent
    return sent, {4: 0, 5: 2}.get(kind, 1)


def attack(found: Listening, draw: random.Random, times: int, answered: list[bytes]) -> None:
    for _ in range(times):
        sent, wholes = malformed(draw)
        with found.connect() as made:
            try:
                made.sendall(sent)
                made.shutdown(socket.SHUT_RD) if not wholes and draw.random() < 0.5 else None
            except OSError:
                continue
            if wholes:
                made.settimeout(20)
                answered.append(received(made, wholes))


@pytest.mark.slow
def test_two_thousand_broken_requests_leave_nothing_and_others_are_served(
    toy_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 2.0)
    answered: list[bytes] = []
    with decoding(toy_folder, slots=8) as (decoder, tokenizer):
        speaker = Speaker(tokenizer, len(tokenizer.get_vocab()), 512)
        service = Service(decoder, speaker, Folders({}), Sampling(1.0, 4), ServingLimits(body_seconds=0.2))
        with listening(service) as found:
            assert statuses(found.answer(request(BODIES["/v1/completions"]))) == [200]
            until(found.idle)
            files, threads = open_files(), threading.active_count()
            enemies = [
                threading.Thread(target=attack, args=(found, random.Random(number), 500, answered))
                for number in range(4)
            ]
            for enemy in enemies:
                enemy.start()
            served = 0
            while any(enemy.is_alive() for enemy in enemies):
                assert statuses(found.answer(request(BODIES["/v1/completions"]))) == [200]
                served += 1
            until(lambda: found.idle() and not decoder._live and not decoder._waiting)
            assert (open_files(), threading.active_count()) == (files, threads)
            assert served > 20
    found_statuses = {status for got in answered for status in statuses(got)}
    assert {200, 400, 404, 408} <= found_statuses <= {100, 200, 400, 403, 404, 405, 408, 413, 415}
    assert sum(1 for got in answered if not got) < len(answered) / 50
    for got in answered:
        if statuses(got)[-1:] > [299]:
            assert error_in(got)["message"], got
    assert caplog.records == []
