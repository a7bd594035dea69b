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
"""So much of the memory, one part of so many, is for keys and values of what sessions were answered."""


@dataclass(frozen=True, slots=True)
class Serving:
    """How to serve.

    slots    rows decoded at once; None for as many as the run had
    longest  tokens of prompt and answer together; None for what the model was made for
    drain    seconds that requests under way get when the server is asked to end
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
    """See `grpo.serving.shelf.Models`. `adapters` are folders by name, None for the model without an adapter, and
    `aliases` further names for these. Of a `run` each checkpoint can be had, as NAME@STEP."""

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
        assert self.run is not None, "only of a run other names are found"
        return find_checkpoint(self.run, name.rpartition("@")[2])

    def _steps(self) -> list[str]:
        """The names of the checkpoints that there are now, newest first: the run may go on meanwhile."""
        if self.run is None:
            return []
        found = checkpoints(self.run / CHECKPOINTS)
        return [_at(self.run, int(path.name.removeprefix("step-"))) for path in reversed(found)]


def served_models(found: Answering) -> ServedModels:
    """What can be asked for: of a run its newest checkpoint by the run's name, the others by their steps."""
    if found.adapter is None:
        return ServedModels({found.model.name: None}, {BASE: found.model.name})
    base: dict[str, Path | None] = {BASE: None}
    run = found.adapter.resolve().parent.parent
    if is_run(run):
        name = _at(run, step_of(found.adapter))
        return ServedModels({name: found.adapter.resolve(), **base}, {run.name: name, found.model.name: BASE}, run)
    return ServedModels({found.adapter.resolve().name: found.adapter, **base}, {found.model.name: BASE})


def serve(target: str, adapter: Path | None, how: Serving, tell: Callable[[str], object]) -> None:
    """Serve until SIGINT or SIGTERM, and answer what is under way then; while the model loads they end the process.
    `tell` is given lines for a person.

    Raises UserError for what cannot be loaded, a place where it cannot listen, and where the extra is not installed.
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
    """Loads the model and what belongs to it, in the thread that is to decode."""

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
            self.notes.append("the run's system message is not added: clients send it, as the first of their messages")
        return DecodingLoop(generator, Shelf(adapters, self._models), kept_bytes=memory_bytes() // KEPT_PART)


def adapters_of(model: nn.Module, folder: Path | None) -> Adapters:
    """The model (changed in place) with layers for adapters like the one in this folder; the model's own state is the
    active one. Raises UserError for a folder without an adapter that fits."""
    if folder is None:
        return NoAdapters(model)
    saved = read_adapter(folder)
    if saved.kind != "full" and saved.rank is None:
        raise UserError(f"adapter {folder}: it has no adapter_config.json, which says its rank and scale")
    kind = with_settings(AdapterConfig(), saved.section(len(model.layers)), f"adapter {folder}")
    made = Adapters(model, kind, derive_key(0, "adapter"), reference=False)
    made.read(folder, "serve it")  # what does not fit is found out now
    model.eval()
    return made


@contextmanager
def _signals_end_it_at_once() -> Iterator[None]:
    """Around what has signals of its own: they end the process with 128 + the signal. Nothing can stop the thread in
    which a model loads, and Python's own end may crash in it."""

    def end(number: int, _: object) -> None:
        print("grpo: stopped at once", file=sys.stderr, flush=True)
        os._exit(128 + number)

    former = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _guard(how: Serving) -> Guard:
    """Raises UserError for a server that others can reach, and anybody can use."""
    local = how.host in LOOPBACK
    if not local and not how.key:
        raise UserError(
            f"--host {how.host} lets other machines in: give an --api-key (or GRPO_API_KEY in the environment), or "
            "leave --host out to serve this machine alone"
        )
    return Guard(how.key or None, LOOPBACK if local else None)


def _check_no_step(target: str) -> None:
    """Raise UserError for RUN@STEP, which is a name for clients."""
    folder, _, step = target.rpartition("@")
    if step.isdecimal() and not Path(target).exists() and is_run(run := Path(folder)):
        name = _at(run.resolve(), int(step))
        raise UserError(f"{target}: a step is for clients to choose: serve {folder}, and let them ask for model {name}")


def _at(run: Path, step: int) -> str:
    return f"{run.name}@{step}"
