"""`grpo bench adapter`: what switching to another state of the adapter costs, and the first token after it."""

from __future__ import annotations

import time
from typing import Any, cast

import mlx.core as mx

from grpo.backend.device import setup
from grpo.backend.random import derive_key
from grpo.benchmark.models import NoTokenizer, make_model
from grpo.benchmark.protocol import Row, Side, Values, alternate
from grpo.config import AdapterConfig
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.model.adapters import POLICY, REFERENCE, Adapters


def switch_costs(shape: str, prompt_length: int, runs: int) -> list[Row]:
    """One token after a prompt with the adapter as it was, and just after a switch; and the switch itself."""
    setup()
    model = make_model(shape, rank=None)
    adapters = Adapters(model, AdapterConfig(), mx.random.key(0))
    adapters.load_state({path: array + 0.01 for path, array in adapters.state().items()})
    generator = Generator(model, cast("Any", NoTokenizer()), slots=1)
    requests = [Request(list(range(1, prompt_length + 1)), 1)]

    def first_token() -> float:
        start = time.perf_counter()
        generator.generate(requests, Sampling(max_tokens=1), derive_key(0, "draw"))
        return 1e3 * (time.perf_counter() - start)

    def switched() -> Values:
        start = time.perf_counter()
        with adapters.use(REFERENCE):
            spent = 1e3 * (time.perf_counter() - start)
            return {"ms": first_token(), "ms switch": spent}

    assert adapters.active == POLICY
    sides = [Side("same adapter", lambda: {"ms": first_token()}), Side("after a switch", switched)]
    return alternate(f"{shape} first token", sides, runs)
