"""`grpo bench roofline`: how near the generator and the trainer come to what this machine can do at all."""

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
"""Bytes of the array that is passed over, by whether on a GPU: far more than any cache holds, and in numbers of the
dtype less than 2³¹, since MLX's shapes are 32 bits wide."""
SQUARE = {False: 1536, True: 8192}
"""Rows and columns of the matrices that are multiplied: enough to keep the machine busy."""
TRIES = 3
"""Of which the fastest is what the machine can do."""


@dataclass(slots=True)
class Rates:
    """What this machine did in the turn that is under way."""

    flops_per_second: float = 0.0
    bytes_per_second: float = 0.0

    def reached(self, work: Demand, seconds: float) -> Values:
        """A piece of work's time beside the least it could take at these rates."""
        return {
            "ms": 1e3 * seconds,
            "ms by bytes": 1e3 * work.bytes / self.bytes_per_second,
            "ms by operations": 1e3 * work.flops / self.flops_per_second,
            "of roofline": work.seconds(self.flops_per_second, self.bytes_per_second) / seconds,
            "GB moved": work.bytes / 1e9,
            "Gflop": work.flops / 1e9,
        }


def roofline(setting: Setting) -> list[Measurement]:
    """The machine's rates, and a decoding step and an update by the share of them that they reach.

    The rates are those of the same turn: a pass over memory (bytes read and written), and a product in the model's
    dtype. The least work is that of `model/costs.py`. A share near or above 1 means caches: what is small need not come
    from memory each time.
    """
    rates = Rates()
    sides = [_machine(rates), _decoding(setting, rates), _update(setting, rates)]
    return alternate(str(setting), sides, setting.runs)


def shapes(gpu: bool) -> tuple[tuple[int], tuple[int, int], mx.Dtype]:
    """The array that is passed over, the matrix that is multiplied, and their dtype, on a GPU or a CPU."""
    dtype = mx.bfloat16 if gpu else mx.float32
    return (COPIED[gpu] // dtype.size,), (SQUARE[gpu], SQUARE[gpu]), dtype


def _machine(rates: Rates) -> Side:
    gpu = on_gpu()
    copied, squared, dtype = shapes(gpu)
    held = [mx.ones(copied, dtype)]
    square = mx.ones(squared, dtype)
    mx.eval(held, square)

    def copy() -> None:
        held[0] = -held[0]  # into the same memory: on a CPU pages that are new take ten times as long as to fill them
        mx.eval(held)

    def run() -> Values:
        rates.bytes_per_second = 2 * held[0].nbytes / _best(copy)
        rates.flops_per_second = 2 * SQUARE[gpu] ** 3 / _best(lambda: mx.eval(square @ square))
        return {"GB/s": rates.bytes_per_second / 1e9, "Gflop/s": rates.flops_per_second / 1e9}

    return Side("machine", run)


def _decoding(setting: Setting, rates: Rates) -> Side:
    """The steps of a whole rollout, the prompts' among the work; each attends to one token more than the one before."""
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
    """One update with activations kept, so that nothing is computed twice but the head's logits."""
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
