"""The server of a run's agents: one, from the first session to the end."""

from __future__ import annotations

import builtins
import http.client
import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from agency import QUESTION, agency, servers

from grpo.agents.outcome import measured
from grpo.errors import UserError
from grpo.types import Conversation, Trajectory


def test_there_is_one_server_from_the_first_session_to_the_end(
    toy_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, threads = servers(), threading.active_count()
    with agency(toy_folder) as office:
        assert servers() == before
        host = office.host(lambda client: client.chat(QUESTION) and 1.0)
        for _ in range(2):
            office.roll(host, n=2)
        assert servers() == before + 1
        assert len({urlsplit(client.base_url).port for client in host.clients}) == 1
        assert {urlsplit(client.base_url).hostname for client in host.clients} == {"127.0.0.1"}
        assert len({client.base_url for client in host.clients}) == 4
        assert len({client.seed for client in host.clients}) == 2
        assert all(seat.client.seed == seat.given % 2**31 for seat in host.all)
        assert any(seat.given >= 2**31 for seat in host.all)
        assert office.frontend.decoder._inboxes == {}
        at = urlsplit(host.clients[0].base_url)
        keep = http.client.HTTPConnection(at.hostname or "", at.port)
        keep.request("GET", "/health")  # a connection that stays open
        keep.getresponse().read()
    assert servers() == before
    keep.close()
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection(at.hostname or "", at.port, timeout=2).request("GET", "/health")
    assert threading.active_count() <= threads + 1
    assert caplog.records == []


def test_the_model_s_names(toy_folder: Path) -> None:
    told: list[Any] = []

    def agent(client: Any) -> float:
        at = urlsplit(client.base_url)
        connection = http.client.HTTPConnection(at.hostname or "", at.port)
        connection.request("GET", f"{at.path}/models", headers={"Authorization": f"Bearer {client.api_key}"})
        told.append(json.loads(connection.getresponse().read()))
        client.chat(QUESTION, model="toy", max_tokens=2)
        return client.chat(QUESTION, model="policy", max_tokens=2) and 1.0

    with agency(toy_folder) as office:
        assert office.one(agent).conversation.reward == 1.0
    assert [model["id"] for model in told[0]["data"]] == ["policy", "toy"]
    assert {model["max_model_len"] for model in told[0]["data"]} == {64 + 24}


def test_without_the_extra_it_says_what_to_install(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *given: Any, **named: Any) -> Any:
        if name.startswith("grpo.serving.server") or (name == "grpo.serving" and given[2] and "server" in given[2]):
            raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")
        return imported(name, *given, **named)

    with agency(toy_folder) as office:
        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(UserError, match=r"environment\.agent needs uvicorn.*pip install .*\[serve\]"):
            office.one(lambda client: 1.0)


def test_metrics_have_the_agent_s_name() -> None:
    talk = Conversation("solver", (), (), metrics={"moves": 3.0})
    assert measured(Trajectory((), (), {}, "", "done", conversation=talk)) == {"environment/solver/moves": 3.0}
    assert measured(Trajectory((), (), {}, "", "done")) == {}
