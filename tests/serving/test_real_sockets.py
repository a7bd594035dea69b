"""Over a real socket: broken HTTP, clients that are slow, go away or do not read, and how the server ends."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

from environments.families import tokenizer_of
from listening import Listening, error_in, listening, received, request, statuses, until
from saying import Base, Says
from serving import Folders, decoding

from grpo.generation.sampling import Sampling
from grpo.serving import connection, server
from grpo.serving.service import Service, ServingLimits
from grpo.serving.speaker import Speaker

ASKED = {"prompt": "hi", "max_tokens": 5}
WHOLE = request(ASKED)
CHUNKED = "Transfer-Encoding: chunked\r\n"


def service_that_says(text: str, **limits: float) -> Service:
    tokenizer = tokenizer_of("qwen2.5")
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    says: Any = Says(tokenizer, text)
    says.ended = False
    return Service(says, Speaker(tokenizer, vocabulary, None), Base(), Sampling(1.0, 10), ServingLimits(**limits))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found() -> Iterator[Listening]:
    with listening(service_that_says("Yes.", body_seconds=0.2)) as made:
        yield made


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that a client does shows in the log."""
    yield
    told = [record for record in caplog.get_records("call") if not record.name.startswith("transformers")]
    assert [record.getMessage() for record in told] == []


def headed(more: str, body: bytes = b"", line: str = "POST /v1/completions HTTP/1.1") -> bytes:
    return f"{line}\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}\r\n".encode() + body


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ([b"\x00\x01\xff\r\n\r\n"], 400),
        ([b"hello\r\n\r\n"], 400),
        ([b"POST /v1/completions HTTP/1.1\r\n\r\n"], 400),
        ([b"GET /v1/models/\xe4 HTTP/1.1\r\nHost: localhost\r\n\r\n"], 400),
        ([b"GET /v1/models/%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n"], 404),
        ([headed("X: " + "a" * 70_000 + "\r\n")], 400),
        ([headed("Content-Length: -5\r\n")], 400),
        ([headed("Content-Length: 5\r\nContent-Length: 6\r\n")], 400),
        ([headed(CHUNKED, b"zz\r\nhello\r\n0\r\n\r\n")], 400),
        ([headed(CHUNKED, b"5\r\nhelloXX0\r\n\r\n")], 400),
        ([request(ASKED, length=5)], 400),
        ([request(ASKED, length=500)], 408),
        ([headed("Expect: 100-continue\r\nContent-Length: 9\r\n")], 408),
        ([WHOLE.replace(b"application/json", b"text/plain")], 415),
        ([headed("", line="CONNECT localhost:80 HTTP/1.1")], 404),
        ([headed("", line="PRI * HTTP/2.0")], 404),
    ],
)
def test_broken_http_gets_an_error(found: Listening, sent: list[bytes], status: int) -> None:
    got = found.answer(*sent)
    assert statuses(got)[-1] == status
    assert error_in(got)["message"]
    assert statuses(found.answer(WHOLE)) == [200]


@pytest.mark.parametrize("path", ["/nowhere", "/v1/completions"])
def test_what_comes_after_an_answer_and_is_no_http_ends_the_connection(found: Listening, path: str) -> None:
    head = headed(CHUNKED, line=f"POST {path} HTTP/1.1").replace(b"application/json", b"text/plain")
    got = found.answer(head, b"zz\r\nhello\r\n0\r\n\r\n")
    assert statuses(got) in ([404], [415])
    got = found.answer(WHOLE + b"hello\r\n\r\n", b"")
    assert statuses(got) == [200, 400]
    assert error_in(got)["code"] == "invalid_http"


def test_why_it_hangs_up_is_read_by_who_goes_on_sending(found: Listening) -> None:
    with found.connect(b"hello\r\n\r\n") as made:
        made.sendall(b"x" * 2**20)
        threading.Event().wait(0.1)
        made.sendall(b"x" * 2**20)
        assert error_in(received(made))["code"] == "invalid_http"
    until(found.idle)


def test_idle_connections_are_kept_for_longer_than_clients_keep_them(found: Listening) -> None:
    assert found.server.config.timeout_keep_alive > 5  # httpx's, which openai's client has


def test_a_body_that_is_broken_is_not_awaited() -> None:
    with listening(service_that_says("Yes.", body_seconds=1.0)) as found:
        with found.connect(headed(CHUNKED)) as made:
            until(lambda: found.server.server_state.tasks)
            threading.Event().wait(0.05)
            made.sendall(b"zz\r\n")
            assert statuses(received(made)) == [400]
            until(lambda: not found.server.server_state.tasks, seconds=0.5)
        until(found.idle)


def test_who_does_not_go_when_the_server_hangs_up_is_cut_off(found: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LINGER_SECONDS", 0.1)
    with found.connect(b"hello\r\n\r\n"):
        until(lambda: found.server.server_state.connections)
        until(found.idle)


def test_a_long_body_is_no_request_sent_ahead(found: Listening) -> None:
    assert statuses(found.answer(request({**ASKED, "user": "x" * 2**20}))) == [200]


def test_of_a_client_that_has_gone_nothing_waits(found: Listening) -> None:
    until(found.idle)
    for sent in (WHOLE, b"POST /v1", b"hello\r\n\r\n"):
        with found.connect(sent):
            until(lambda: found.server.server_state.connections)
            (one,) = found.server.server_state.connections
        until(found.idle)
        assert (one._head, one._reading) == (None, None)


def test_requests_sent_ahead_are_answered_in_their_order(found: Listening) -> None:
    bodies = [{"prompt": "hi", "max_tokens": number, "return_token_ids": True} for number in (1, 2, 3)]
    with found.connect(b"".join(map(request, bodies))) as made:
        got = received(made, wholes=3)
    assert statuses(got) == [200] * 3
    chunked = headed(CHUNKED, b"%x\r\n%s\r\n0\r\n\r\n" % (len(json.dumps(ASKED)), json.dumps(ASKED).encode()))
    assert statuses(found.answer(chunked)) == [200]


@pytest.mark.parametrize("begun", [b"", b"POST /v1/comp", headed("")[:-2], WHOLE + b"POST /v1"])
def test_who_sends_no_head_in_time_is_given_up(monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    with listening(service_that_says("Yes.")) as found, found.connect(begun) as made:
        for _ in range(3):
            threading.Event().wait(0.05)
            made.sendall(begun[:0])
        got = received(made)
        assert statuses(got) == [*([200] if begun.startswith(WHOLE) else []), 408]
        assert error_in(got)["type"] == "timeout_error"
        until(found.idle)


def sent_for_ever(made: socket.socket, piece: bytes, pause: float = 0.0) -> None:
    for _ in range(500):
        made.sendall(piece)
        threading.Event().wait(pause)


def test_who_goes_on_sending_a_refused_body_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with listening(service_that_says("Yes.", body_seconds=0.1)) as found:
        with found.connect(request(b"{", length=10_000)) as made:
            assert statuses(received(made, wholes=1)) == [408]
            with pytest.raises(ConnectionError):
                sent_for_ever(made, b" ", 0.02)
        until(found.idle)


@pytest.mark.parametrize("stream", [False, True])
def test_who_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(connection, "READING_SECONDS", 0.2)
    monkeypatch.setattr(server, "KEEP_ALIVE", 0.1)
    body = {"prompt": "hi", "max_tokens": 100_000, "return_token_ids": True, "stream": stream}
    with listening(service_that_says("The sun shines. " * 2000)) as found:
        with found.connect(request(body), room=4096):
            until(lambda: found.server.server_state.connections)
            until(found.idle)
        assert statuses(found.answer(WHOLE)) == [200]


def test_who_reads_late_and_then_all_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "READING_SECONDS", 0.5)
    body = {"prompt": "hi", "max_tokens": 100_000, "return_token_ids": True, "stream": True}
    with (
        listening(service_that_says("The sun shines. " * 2000)) as found,
        found.connect(request(body), room=4096) as made,
    ):
        threading.Event().wait(0.2)
        assert received(made, wholes=1).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        threading.Event().wait(0.6)
        made.sendall(WHOLE)
        assert statuses(received(made, wholes=1)) == [200]


@pytest.fixture
def endless(toy_folder: Path) -> Iterator[tuple[Any, Service]]:
    """A service with two slots whose model never stops."""
    with decoding(toy_folder, slots=2) as (decoder, tokenizer):
        decoder._generator.stop_ids = frozenset()
        speaker = Speaker(tokenizer, len(tokenizer.get_vocab()), 2_000_000)
        yield decoder, Service(decoder, speaker, Folders({}), Sampling(1.0, 4))


LONG = {"prompt": "hi", "max_tokens": 1_000_000}


@pytest.mark.parametrize("stream", [False, True])
def test_who_sends_ahead_and_goes_away_gives_the_slot_back(endless: tuple[Any, Service], stream: bool) -> None:
    decoder, service = endless
    with listening(service) as found:
        made = found.connect(request({**LONG, "stream": stream}))
        until(lambda: decoder._live)
        made.sendall(b"what is no request\r\n\r\n")
        threading.Event().wait(0.1)
        assert decoder._live
        made.close()
        until(lambda: found.idle() and not decoder._live)
        flood = found.connect(request({**LONG, "stream": stream}))
        until(lambda: decoder._live)
        with pytest.raises(ConnectionError):
            sent_for_ever(flood, b"x" * 2**16)
        until(lambda: found.idle() and not decoder._live)
        flood.close()


def test_at_the_end_of_the_drain_what_is_under_way_is_refused(
    endless: tuple[Any, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LEFT_SECONDS", 0.5)
    decoder, service = endless
    with listening(service, drain=0.2, refuse=decoder.close) as found:
        stream, whole = (found.connect(request({**LONG, "stream": stream})) for stream in (True, False))
        sending, beginning = found.connect(request(ASKED, length=500)), found.connect(b"POST /v1")
        until(lambda: len(decoder._live) == 2)
        found.server.should_exit = True
        got = received(stream)
        assert statuses(got) == [200]
        assert b'"code":"shutting_down"' in got.rpartition(b"data: ")[2]
        got = received(whole)
        assert statuses(got) == [503]
        assert error_in(got)["code"] == "shutting_down"
        assert received(sending) == received(beginning) == b""
        found.thread.join(10)
        assert not found.thread.is_alive()
        for made in (stream, whole, sending, beginning):
            made.close()


def test_a_second_interrupt_ends_it_without_waiting(
    endless: tuple[Any, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, service = endless
    with listening(service, drain=60.0) as found, found.connect(request(LONG)) as made:
        until(lambda: decoder._live)
        found.server.should_exit = True
        threading.Event().wait(0.3)
        assert decoder._live
        found.server.force_exit = True
        found.thread.join(5)
        assert not found.thread.is_alive()
        assert received(made) == b""


def test_beyond_the_most_connections_there_are_some_that_are_told_and_then_none(
    found: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found.server.config, "limit_concurrency", 2)
    monkeypatch.setattr(connection, "UNTOLD", 1)
    until(found.idle)
    kept = [found.connect() for _ in range(2)]
    until(lambda: len(found.server.server_state.connections) == 2)
    assert statuses(found.answer(WHOLE)) == [503]
    kept.append(found.connect())
    until(lambda: len(found.server.server_state.connections) == 3)
    assert found.answer(WHOLE) == b""
    for made in kept:
        made.close()
    until(found.idle)
    assert statuses(found.answer(WHOLE)) == [200]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("stream", [False, True])
def test_curl(found: Listening, stream: bool) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": stream})
    url = f"http://127.0.0.1:{found.port}/v1/chat/completions"
    command = ["curl", "-sS", "-N", "-w", "%{http_code}", url, "-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    if stream:
        *events, end = done.stdout.split("\n\n")
        assert (events.pop(), end) == ("data: [DONE]", "200")
        deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
        assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
    else:
        assert done.stdout.endswith("200")
        assert json.loads(done.stdout[:-3])["choices"][0]["message"]["content"] == "Yes."


@pytest.mark.parametrize(
    ("soft", "hard", "made"),
    [
        (256, 100_000, (2048, 100_000)),
        (256, 300, (300, 300)),
        (256, resource.RLIM_INFINITY, (2048, resource.RLIM_INFINITY)),
        (4096, 100_000, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
    ],
)
def test_as_many_files_can_be_open_as_there_can_be_connections(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, made: tuple[int, int] | None
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    server._make_room()
    assert asked == ([] if made is None else [made])
