"""A toy model behind the endpoints, in this process: no network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from grpo.config import AdapterConfig, ModelConfig
from grpo.generation.generator import Generator
from grpo.generation.sampling import Sampling
from grpo.model.adapters import Adapters, NoAdapters
from grpo.model.load import load
from grpo.serving.decoder import DecodingLoop, DecodingThread
from grpo.serving.service import Service, ServingLimits
from grpo.serving.shelf import Shelf
from grpo.serving.speaker import Speaker


class Folders:
    """Models by name: adapters in folders, and `base`."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders

    def names(self) -> list[str]:
        return ["base", *self.folders]

    def find(self, name: str) -> str | None:
        return name if name in self.names() else None

    def folder(self, name: str) -> Path | None:
        return self.folders.get(name)


@contextmanager
def decoding(
    folder: Path, adapters: dict[str, Path] | None = None, slots: int = 8, patience: float = 1.0
) -> Iterator[tuple[DecodingLoop, Any]]:
    """A decoder of the model in `folder`, in a thread of its own, and its tokenizer."""
    made: list[Any] = []

    def make() -> DecodingLoop:
        model, tokenizer = load(ModelConfig(name=str(folder)))
        kinds = Adapters(model, AdapterConfig(rank=4), mx.random.key(0)) if adapters else NoAdapters(model)
        made.append(tokenizer)
        return DecodingLoop(Generator(model, tokenizer, slots), Shelf(kinds, Folders(adapters or {})), patience)

    with DecodingThread(make) as decoder:
        yield decoder, made[0]


@contextmanager
def served(
    folder: Path,
    adapters: dict[str, Path] | None = None,
    limits: ServingLimits | None = None,
    longest: int = 512,
    **how: Any,
) -> Iterator[Any]:
    """A client of the endpoints. `how` goes to `decoding`, `guard` to the application."""
    from starlette.testclient import TestClient

    from grpo.serving.app import application
    from grpo.serving.guard import Guard

    guard: Any = how.pop("guard", Guard())
    defaults = how.pop("defaults", Sampling(1.0, 16))
    with ExitStack() as opened:
        decoder, tokenizer = opened.enter_context(decoding(folder, adapters, **how))
        speaker = Speaker(tokenizer, len(tokenizer.get_vocab()), longest)
        service = Service(decoder, speaker, Folders(adapters or {}), defaults, limits)
        app = application(service, guard)
        yield opened.enter_context(TestClient(app, "http://localhost", raise_server_exceptions=True))
