"""`grpo bench breakdown`: where the time of a decoding step and of a GRPO step goes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from rich.console import Console

from grpo.backend.random import derive_key
from grpo.benchmark.models import model_for
from grpo.benchmark.protocol import Measurement, Side, Values, alternate
from grpo.benchmark.rollout import requests_of, untold
from grpo.benchmark.setting import Setting
from grpo.benchmark.train import step_trainer
from grpo.config.log import CompletionsConfig
from grpo.generation.batching import Run, _Step
from grpo.generation.sampling import Sampling, TokenSampler
from grpo.recipes import dump_recipe
from grpo.runs.checkpoint import Context, save_checkpoint
from grpo.runs.completions import store_completions
from grpo.runs.state import RunState
from grpo.telemetry.loggers import open_loggers
from grpo.types import StepMetrics

DECODING = {
    "building": (Run, "_next_step"),
    "sampling": (TokenSampler, "draw"),
    "evaluation": (_Step, "launch"),
    "waiting": (Run, "_read"),
}
"""The method of each part of a step. Building the graph includes building the sampler's graph."""

Method = tuple[type, str]


def breakdown(setting: Setting) -> Iterator[Measurement]:
    """Milliseconds and shares of a decoding step, and of a GRPO step with its checkpoint and its logging.

    Parts of a decoding step: building the forward pass's graph, building the sampler's graph, submitting both for
    evaluation, and waiting for the token that is being computed in the meantime (with the bookkeeping of its rows).
    """
    sides = [_grpo_step(setting), _decoding(setting)]  # errors of the GRPO step come before any measurement
    for side in reversed(sides):
        yield from alternate(f"{side.name}, {setting}", [side], setting.runs)


def _decoding(setting: Setting) -> Side:
    model = model_for(setting)
    generator, requests = untold(model, setting.rows), requests_of(setting, model)
    sampling = Sampling(max_tokens=setting.completion_length)

    def run() -> Values:
        with watched(DECODING) as spent:
            start = time.perf_counter()
            generator.generate(requests, sampling, derive_key(0, "draw"))
            total = time.perf_counter() - start
        parts = {
            "forward building": spent["building"] - spent["sampling"],
            "sampling": spent["sampling"],
            "evaluation": spent["evaluation"],
            "waiting": spent["waiting"],
        }
        return shares(total, parts, setting.completion_length)

    return Side("decoding step", run)


def _grpo_step(setting: Setting) -> Side:
    trainer, steps = step_trainer(setting), iter(range(1, 1_000_000))

    def run() -> Values:
        start = time.perf_counter()
        metrics = trainer.step(next(steps))
        parts = {name: metrics.values[f"time/{name}"] for name in ("rollout", "reward", "logprobs", "update")}
        stepped = time.perf_counter() - start
        with TemporaryDirectory() as folder:
            parts |= _written(Path(folder), trainer, metrics)
        return shares(stepped + parts["checkpoint"] + parts["logging"], parts)

    return Side("GRPO step", run)


def _written(folder: Path, trainer: Any, metrics: StepMetrics) -> dict[str, float]:
    """Seconds for the writes of the loop around the steps: a checkpoint, the line of metrics, the completions."""
    context = Context(dump_recipe(trainer.cfg), {}, trainer.policy.adapters.config, {}, {})
    with ExitStack() as stack, (folder / "log").open("w") as log:
        tell = open_loggers(stack, trainer.cfg, folder, Console(file=log), "bench")
        start = time.perf_counter()
        tell(metrics)
        store_completions(folder, metrics.step, metrics.groups, CompletionsConfig(), 0, len(metrics.groups))
        logged = time.perf_counter()
        save_checkpoint(folder, RunState("bench", trainer.state(), metrics.step), context, keep=1)
        return {"checkpoint": time.perf_counter() - logged, "logging": logged - start}


def shares(total: float, parts: Mapping[str, float], times: int = 1) -> Values:
    """Milliseconds of the whole and of its parts, each divided by `times`, the rest as `other`, and the parts' shares
    in percent."""
    parts = {**parts, "other": total - sum(parts.values())}
    values = {"ms": 1e3 * total / times}
    for name, seconds in parts.items():
        values |= {f"ms {name}": 1e3 * seconds / times, f"% {name}": 100 * seconds / total}
    return values


@contextmanager
def watched(methods: Mapping[str, Method]) -> Iterator[Counter[str]]:
    """A block that counts the seconds spent in each of these methods."""
    spent: Counter[str] = Counter()
    with ExitStack() as stack:
        for name, (owner, attribute) in methods.items():
            stack.enter_context(patch.object(owner, attribute, _counting(getattr(owner, attribute), spent, name)))
        yield spent


def _counting(method: Callable[..., Any], spent: Counter[str], name: str) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - start  # type: ignore[assignment]

    return counted
