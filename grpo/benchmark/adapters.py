"""`grpo bench adapter`: loading, switching and merging an adapter, and the first token after a switch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx

from grpo.backend.random import derive_key
from grpo.benchmark.models import base_model
from grpo.benchmark.protocol import Measurement, Side, Values, alternate, milliseconds
from grpo.benchmark.rollout import requests_of, untold
from grpo.benchmark.setting import Setting
from grpo.config import AdapterConfig
from grpo.generation.sampling import Sampling
from grpo.model.adapters import REFERENCE, Adapters
from grpo.model.drawn import RANK, trained_adapters


def adapter_costs(setting: Setting) -> Iterator[Measurement]:
    """The time to the first token with the same adapter and right after a switch; then the times to load and merge."""
    yield from _switches(setting)
    yield from _loads(setting)


def _switches(setting: Setting) -> list[Measurement]:
    model = base_model(setting)
    adapters = trained_adapters(model)
    generator, requests = untold(model, setting.rows), requests_of(setting, model)

    def first_token() -> float:
        return milliseconds(lambda: generator.generate(requests, Sampling(max_tokens=1), derive_key(0, "draw")))

    def switched() -> Values:
        start = time.perf_counter()
        with adapters.use(REFERENCE):
            spent = 1e3 * (time.perf_counter() - start)
            return {"ms": first_token(), "ms switch": spent}

    sides = [Side("same adapter", lambda: {"ms": first_token()}), Side("after a switch", switched)]
    return alternate(f"first token, {setting}", sides, setting.runs)


def _loads(setting: Setting) -> list[Measurement]:
    """The times to load a saved adapter into a model, and to merge it into the weights."""
    with TemporaryDirectory() as folder:
        trained_adapters(base_model(setting)).save(Path(folder))

        def run() -> Values:
            model, made = base_model(setting), []
            cfg = AdapterConfig(rank=RANK, path=folder)
            loaded = milliseconds(lambda: made.append(Adapters(model, cfg, mx.random.key(0))))
            return {"ms load": loaded, "ms merge": milliseconds(made[0].merge)}

        return alternate(f"load and merge, {setting.name}", [Side("adapter", run)], setting.runs)
