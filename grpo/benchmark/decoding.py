"""What sampling settings, logprobs and lengths cost: `grpo bench sampling`, `length` and `context`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.random import derive_key
from grpo.benchmark.models import NoTokenizer
from grpo.benchmark.protocol import Row, Side, Values, alternate
from grpo.benchmark.rollout import Load, model_for, ours
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling

FILTERS = {
    "temperature 0.7": {"temperature": 0.7},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "repetition_penalty 1.1": {"repetition_penalty": 1.1},
    "all of them": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1},
}
LENGTHS = (10, 25, 50, 100, 400)
CONTEXTS = (32, 64, 116, 120, 124, 127, 128, 129, 132, 140, 256, 512, 1023, 1024, 1025)
NEAR, STEP = 1.2, 1.15
"""Between lengths that are this near to each other a pass may get this much slower."""


def sampling_costs(shape: str, load: Load, lora: bool, runs: int) -> list[Row]:
    """Plain sampling with logprobs, held against it without them and with each filter."""
    model, plain = model_for(shape, lora), Sampling(max_tokens=load.completion_length)
    sides = [ours(model, load, name="plain"), ours(model, load, logprobs=False, name="no logprobs")]
    for name, settings in FILTERS.items():
        sides.append(ours(model, load, replace(plain, **cast("dict[str, Any]", settings)), name=name))
    return alternate(f"{shape} {load}", sides, runs)


def length_costs(shape: str, load: Load, lora: bool, runs: int) -> list[Row]:
    """Milliseconds a decoding step by the completion's length, without the first token, which waits for the prompt."""
    model = model_for(shape, lora)
    generator = Generator(model, cast("Any", NoTokenizer()), load.rows)
    requests = [Request(ids, load.completions) for ids in load.draw(model.args.vocab_size)]

    def seconds(length: int) -> float:
        start = time.perf_counter()
        generator.generate(requests, Sampling(max_tokens=length), derive_key(0, "draw"))
        return time.perf_counter() - start

    def side(length: int) -> Side:
        return Side(f"{length} tokens", lambda: {"ms": 1e3 * (seconds(length) - seconds(1)) / (length - 1)})

    return alternate(f"{shape} {load.prompts}x{load.completions}", [side(length) for length in LENGTHS], runs)


def context_costs(shape: str, lora: bool, runs: int) -> Iterator[Row]:
    """Milliseconds of one forward pass by its length in tokens: is there a length at which it suddenly costs more?"""
    model = model_for(shape, lora)
    sides = [Side(f"{length} tokens", _forward(model, length)) for length in CONTEXTS]
    yield from alternate(shape, sides, runs)


def _forward(model: nn.Module, length: int) -> Any:
    tokens = mx.zeros((1, length), mx.int32)

    def run() -> Values:
        start = time.perf_counter()
        mx.eval(model(tokens))
        return {"ms": 1e3 * (time.perf_counter() - start)}

    return run


def cliffs(rows: list[Row]) -> list[str]:
    """Near neighbours between which a pass gets slower by more than `STEP`, by the fastest run of each."""
    found = []
    for before, after in pairwise(rows):
        growth = int(after.side.split()[0]) / int(before.side.split()[0])
        if growth < NEAR and min(after.runs) > min(before.runs) * STEP:
            found.append(f"{before.side} → {after.side}: {min(before.runs):.2f} → {min(after.runs):.2f} ms")
    return found
