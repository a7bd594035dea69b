"""`grpo bench roofline`: how close the generator and the trainer come to the limits of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from grpo.backend.device import on_gpu
from grpo.backend.random import derive_key
from grpo.benchmark.models import base_model, model_for
from grpo.benchmark.protocol import Measurement, Side, Values, alternate
from grpo.benchmark.rollout import requests_of, untold
from grpo.benchmark.setting import Setting
from grpo.benchmark.updates import update_side
from grpo.benchmark.work import policy_of, recipe
from grpo.generation.sampling import Sampling
from grpo.model.costs import Demand
from grpo.model.outline import costs_of

COPIED = {False: 2**28, True: 2**31}
"""Bytes of the array for the memory bandwidth, on a CPU and on a GPU: much larger than any cache, but with less than
2³¹ elements, because MLX's shapes have 32 bits."""
SQUARE = {False: 1536, True: 8192}
"""Rows and columns of the matrices for the matmul rate, on a CPU and on a GPU: enough to keep the machine busy."""
TRIES = 3
"""Number of tries; the fastest gives the machine's rate."""


@dataclass(slots=True)
class Rates:
    """The machine's rates in the current turn."""

    flops_per_second: float = 0.0
    bytes_per_second: float = 0.0

    def reached(self, work: Demand, seconds: float) -> Values:
        """The time of a piece of work, and the minimum times at these rates."""
        return {
            "ms": 1e3 * seconds,
            "ms by bytes": 1e3 * work.bytes / self.bytes_per_second,
            "ms by operations": 1e3 * work.flops / self.flops_per_second,
            "of roofline": work.seconds(self.flops_per_second, self.bytes_per_second) / seconds,
            "GB moved": work.bytes / 1e9,
            "Gflop": work.flops / 1e9,
        }


def roofline(setting: Setting) -> list[Measurement]:
    """The machine's rates, and the fraction of them that a rollout and an update reach.

    The rates are measured in the same turn: a pass over memory (bytes read and written), and a matmul in the dtype of
    `shapes`. `model/costs.py` gives the minimum work. A fraction near or above 1 means that small arrays come from
    caches instead of memory.
    """
    rates = Rates()
    sides = [_machine(rates), _decoding(setting, rates), _update(setting, rates)]
    return alternate(str(setting), sides, setting.runs)


def shapes(gpu: bool) -> tuple[tuple[int], tuple[int, int], mx.Dtype]:
    """The shapes of the array for the bandwidth and of the matrix for the matmul rate, and their dtype."""
    dtype = mx.bfloat16 if gpu else mx.float32
    return (COPIED[gpu] // dtype.size,), (SQUARE[gpu], SQUARE[gpu]), dtype


def _machine(rates: Rates) -> Side:
    gpu = on_gpu()
    copied, squared, dtype = shapes(gpu)
    held = [mx.ones(copied, dtype)]
    square = mx.ones(squared, dtype)
    mx.eval(held, square)

    def copy() -> None:
        held[0] = -held[0]  # into the same memory: on a CPU, new pages take ten times as long
        mx.eval(held)

    def run() -> Values:
        rates.bytes_per_second = 2 * held[0].nbytes / _best(copy)
        rates.flops_per_second = 2 * SQUARE[gpu] ** 3 / _best(lambda: mx.eval(square @ square))
        return {"GB/s": rates.bytes_per_second / 1e9, "Gflop/s": rates.flops_per_second / 1e9}

    return Side("machine", run)


def _decoding(setting: Setting, rates: Rates) -> Side:
    """A whole rollout. The work includes prefill; each decoding step attends to one more token."""
    model = model_for(setting)
    costs, generator, requests = costs_of(model), untold(model, setting.rows), requests_of(setting, model)
    work = costs.prefill(setting.prompts, setting.prompt_length - 1)
    for step in range(setting.completion_length):
        context = setting.prompt_length + step
        work += costs.decode(setting.rows, context, setting.prompt_length - 1, setting.prompts)
    sampling = Sampling(max_tokens=setting.completion_length)

    def run() -> Values:
        return rates.reached(work, _seconds(lambda: generator.generate(requests, sampling, derive_key(0, "draw"))))

    return Side("rollout", run)


def _update(setting: Setting, rates: Rates) -> Side:
    """One update without gradient checkpointing, so that only the head's logits are computed twice."""
    cfg = recipe(setting, {"micro_batch_tokens": 8192, "gradient_checkpointing": False})
    policy = policy_of(base_model(setting), cfg.optim)
    update = update_side("update", policy, cfg, setting)
    sizes = setting.prompts, setting.prompt_length, setting.completions, setting.completion_length
    work = costs_of(policy.model).update(*sizes)
    return Side("update", lambda: rates.reached(work, update.run()["s"]))


def _best(work: Callable[[], object]) -> float:
    return min(_seconds(work) for _ in range(TRIES))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
