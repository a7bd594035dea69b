"""The HTTP server for a run's agents. A process has one server, which lasts as long as the run."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from threading import Thread
from typing import Any

from grpo.agents.decoder import Mail, TrainingDecoder
from grpo.backend.imports import extra
from grpo.environments.inbox import Inbox
from grpo.errors import RunError
from grpo.serving.guard import Guard
from grpo.serving.service import Service, ServingLimits
from grpo.serving.sessions import SessionMemory, SessionRules
from grpo.serving.shelf import PolicyModels
from grpo.serving.speaker import Speaker

MOST_REQUESTS = 2**20
"""Maximum number of simultaneous requests: in effect none, because the agents belong to the run and wait for slots."""
START_SECONDS, END_SECONDS = 30.0, 5.0
ADVICE = "use the api_key that run() gets, or in a program OPENAI_API_KEY"
"""Advice for an agent that sends another key."""


@dataclass(frozen=True, slots=True)
class SessionDoor:
    """What an agent needs to call the server, and the id of its session."""

    base_url: str
    api_key: str
    id: str


class Frontend:
    """Listens on the loopback interface from the first session until `close`. Use it in the rollout's thread."""

    def __init__(self, speaker: Speaker, model: str, seconds: float = 24 * 3600.0) -> None:
        """`speaker` encodes and parses the model's turns, `model` is the model's name, and `seconds` is the time limit
        of an answer: long, because rollouts have their own limits."""
        self.decoder = TrainingDecoder()
        self._speaker, self._model, self._seconds = speaker, model, seconds
        speaker.refuses_long = False  # the session refuses long prompts, so that the rollout records it
        self._key = secrets.token_urlsafe(24)
        self._service: Service | None = None
        self._server: Any = None
        self._thread: Thread | None = None
        self._url = ""

    def open(self, inbox: Inbox[Mail], rules: SessionRules) -> SessionDoor:
        """Begin a session, whose requests go to `inbox`."""
        if self._service is None:
            self._service = self._start(rules)
        session = secrets.token_hex(16)
        self._service.open(session, rules)
        self.decoder.open(session, inbox)
        return SessionDoor(f"{self._url}/s/{session}/v1", self._key, session)

    def end(self, door: SessionDoor) -> SessionMemory:
        """End a session, and refuse its further requests. Returns the messages of the session."""
        assert self._service is not None
        self.decoder.close(door.id)
        return self._service.end(door.id)

    def close(self) -> None:
        """Stop the server."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(END_SECONDS)
            self._server = self._thread = self._service = None

    def _start(self, rules: SessionRules) -> Service:
        with extra("serve", "environment.agent"):
            from grpo.serving import server
            from grpo.serving.app import application
        limits = ServingLimits(MOST_REQUESTS, self._seconds)
        models = PolicyModels(self._model)
        service = Service(self.decoder, self._speaker, models, rules.sampling, limits, sessions_only=True)
        at = server.listening("127.0.0.1", 0)
        self._url = server.url_of(at).removesuffix("/v1")
        self._server = server.made(application(service, Guard(self._key, advice=ADVICE)), drain=1, connections=None)
        self._thread = Thread(target=self._server.run, args=([at],), name="agents' server", daemon=True)
        self._thread.start()
        until = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > until:
                raise RunError("the server for the run's agents did not start: see the output above")
            time.sleep(0.002)
        return service
