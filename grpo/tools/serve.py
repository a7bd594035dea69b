"""A run or a model behind an OpenAI-compatible endpoint, for `grpo serve`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.nn as nn

from grpo.backend.device import memory_bytes, setup
from grpo.backend.imports import extra
from grpo.backend.random import derive_key
from grpo.config import AdapterConfig, RolloutConfig
from grpo.errors import UserError
from grpo.generation.controller import speculation_of
from grpo.generation.generator import Generator
from grpo.model.adapters import Adapters, NoAdapters
from grpo.model.load import load
from grpo.model.saved import read_adapter
from grpo.planning.positions import limit_of
from grpo.recipes import with_settings
from grpo.runs.checkpoint import checkpoints, step_of
from grpo.runs.folder import CHECKPOINTS, find_checkpoint, is_run
from grpo.serving.decoder import DecodingLoop, DecodingThread
from grpo.serving.guard import LOOPBACK, Guard
from grpo.serving.service import Service, ServingLimits
from grpo.serving.shelf import Shelf
from grpo.serving.speaker import Speaker
from grpo.tools.generate import Answering, find_answering

BASE = "base"
KEPT_PART = 8
"""One part in this many of the memory is for keys and values of the sessions' earlier answers."""


@dataclass(frozen=True, slots=True)
class Serving:
    """How to serve.

    host, port  the address to listen on
    key         the API key that clients must send; None: no key
    slots       number of rows that decode simultaneously; None: as in the run
    longest     maximum number of tokens of prompt and answer together; None: the model's context length
    drain       seconds that running requests get when the server is stopped
    limits      limits on requests
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    slots: int | None = None
    longest: int | None = None
    drain: float = 60.0
    limits: ServingLimits = field(default_factory=ServingLimits)


@dataclass(frozen=True, slots=True)
class ServedModels:
    """The models that clients can name: see `grpo.serving.shelf.Models`.

    `adapters` maps names to folders, None for the model without an adapter. `aliases` maps further names to these
    names. Each checkpoint of `run` is available as NAME@STEP.
    """

    adapters: Mapping[str, Path | None]
    aliases: Mapping[str, str]
    run: Path | None = None

    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.aliases, *self.adapters, *self._steps()]))

    def find(self, name: str) -> str | None:
        name = self.aliases.get(name, name)
        return name if name in self.adapters or name in self._steps() else None

    def folder(self, name: str) -> Path | None:
        if name in self.adapters:
            return self.adapters[name]
        assert self.run is not None, "only a run has further names"
        return find_checkpoint(self.run, name.rpartition("@")[2])

    def _steps(self) -> list[str]:
        """Return the names of the current checkpoints, newest first. The run may still be adding checkpoints."""
        if self.run is None:
            return []
        found = checkpoints(self.run / CHECKPOINTS)
        return [_at(self.run, int(path.name.removeprefix("step-"))) for path in reversed(found)]


def served_models(found: Answering) -> ServedModels:
    """Return the models to serve. The run's name means its newest checkpoint; other checkpoints are named by step."""
    if found.adapter is None:
        return ServedModels({found.model.name: None}, {BASE: found.model.name})
    base: dict[str, Path | None] = {BASE: None}
    run = found.adapter.resolve().parent.parent
    if is_run(run):
        name = _at(run, step_of(found.adapter))
        return ServedModels({name: found.adapter.resolve(), **base}, {run.name: name, found.model.name: BASE}, run)
    return ServedModels({found.adapter.resolve().name: found.adapter, **base}, {found.model.name: BASE})


def serve(target: str, adapter: Path | None, how: Serving, tell: Callable[[str], object]) -> None:
    """Serve until SIGINT or SIGTERM, and finish the running requests. While the model loads, a signal ends the process
    immediately. `tell` gets lines for the user.

    Raises UserError if the model cannot be loaded, if the address cannot be used, and if the extra is not installed.
    """
    with extra("serve", "grpo serve"):
        from grpo.serving import server
        from grpo.serving.app import application
    guard = _guard(how)
    _check_no_step(target)
    found = find_answering(target, adapter, base=False)
    models = served_models(found)
    with (
        _signals_end_it_at_once(),
        closing(server.listening(how.host, how.port)) as at,
        DecodingThread(loading := _Loading(found, models, how)) as decoder,
    ):
        for line in loading.notes:
            tell(line)
        tell(f"models: {', '.join(models.names())}")
        tell(f"serving at {server.url_of(at)}")
        service = Service(decoder, loading.speaker, models, loading.defaults, how.limits)
        server.run(application(service, guard), at, how.drain, decoder.close)


class _Loading:
    """Loads the model, its adapters, and its tokenizer, in the thread that will decode."""

    speaker: Speaker

    def __init__(self, found: Answering, models: ServedModels, how: Serving) -> None:
        self._found, self._models, self._how = found, models, how
        self.notes: list[str] = []
        sampling = found.sampling
        self.defaults = sampling if found.rollout is not None else replace(sampling, temperature=1.0)

    def __call__(self) -> DecodingLoop:
        setup()
        found, how = self._found, self._how
        model, tokenizer = load(found.model)
        adapters = adapters_of(model, found.adapter)
        rollout = found.rollout or RolloutConfig()
        generator = Generator(model, tokenizer, how.slots or rollout.max_concurrency)
        generator.speculation = speculation_of(rollout.speculate)
        longest = min(filter(None, (how.longest, limit_of(model))), default=None)
        vocabulary, kwargs = generator.decoding.vocabulary, found.data.chat_template_kwargs
        self.speaker = Speaker(tokenizer, vocabulary, longest, kwargs)
        self.notes += generator.describe()
        if found.data.system is not None:
            self.notes.append("the run's system message is not added: clients must send it as their first message")
        return DecodingLoop(generator, Shelf(adapters, self._models), kept_bytes=memory_bytes() // KEPT_PART)


def adapters_of(model: nn.Module, folder: Path | None) -> Adapters:
    """Add layers to the model, in place, for adapters like the one in this folder. The state without an adapter is
    active. Raises UserError if the folder has no adapter that fits."""
    if folder is None:
        return NoAdapters(model)
    saved = read_adapter(folder)
    if saved.kind != "full" and saved.rank is None:
        raise UserError(f"adapter {folder}: there is no adapter_config.json, which has the adapter's rank and scale")
    kind = with_settings(AdapterConfig(), saved.section(len(model.layers)), f"adapter {folder}")
    made = Adapters(model, kind, derive_key(0, "adapter"), reference=False)
    made.read(folder, "serve it")  # fail now if it does not fit
    model.eval()
    return made


@contextmanager
def _signals_end_it_at_once() -> Iterator[None]:
    """End the process on SIGINT and SIGTERM with exit code 128 + signal, until the server sets its own handlers. The
    thread in which a model loads cannot be stopped, and Python's regular exit may crash in it."""

    def end(number: int, _: object) -> None:
        print("grpo: stopped immediately", file=sys.stderr, flush=True)
        os._exit(128 + number)

    former = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _guard(how: Serving) -> Guard:
    """Return the access rules. Raises UserError for a server that other machines can reach without a key."""
    local = how.host in LOOPBACK
    if not local and not how.key:
        raise UserError(
            f"--host {how.host} lets other machines in: set --api-key (or GRPO_API_KEY in the environment), or remove "
            "--host to serve this machine only"
        )
    return Guard(how.key or None, LOOPBACK if local else None)


def _check_no_step(target: str) -> None:
    """Raise UserError for RUN@STEP, which is a name that only clients use."""
    folder, _, step = target.rpartition("@")
    if step.isdecimal() and not Path(target).exists() and is_run(run := Path(folder)):
        name = _at(run.resolve(), int(step))
        raise UserError(f"{target}: clients choose the step: serve {folder}, and request model {name}")


def _at(run: Path, step: int) -> str:
    return f"{run.name}@{step}"
