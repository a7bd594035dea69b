"""`grpo bench rollout`: the generator against mlx-lm's, on the same model, prompts and lengths."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.device import setup
from grpo.backend.random import derive_key
from grpo.benchmark.models import NoTokenizer, make_model
from grpo.benchmark.protocol import Row, Side, Values, alternate
from grpo.errors import RunError
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Load:
    """How much is sampled: prompts × completions of each, of these lengths in tokens."""

    prompts: int
    completions: int
    prompt_length: int
    completion_length: int

    def __str__(self) -> str:
        return f"{self.prompts}x{self.completions} {self.prompt_length}+{self.completion_length}"

    @property
    def rows(self) -> int:
        return self.prompts * self.completions

    def draw(self, vocabulary: int) -> list[list[int]]:
        ids: Any = mx.random.randint(
            1, vocabulary, (self.prompts, self.prompt_length), key=derive_key(0, "bench")
        ).tolist()
        return cast("list[list[int]]", ids)


def model_for(shape: str, lora: bool) -> nn.Module:
    """A model of this shape, with or without adapters, on a machine that is set up."""
    setup()
    return make_model(shape, rank=16 if lora else None)


def against_mlx_lm(shape: str, load: Load, lora: bool, runs: int) -> list[Row]:
    """One shape and load, this generator against mlx-lm's: its loop for one row, or its batched generator."""
    model = model_for(shape, lora)
    peer = mlx_lm_stream if load.rows == 1 else mlx_lm_batched
    return alternate(f"{shape} {load}", [peer(model, load), ours(model, load)], runs)


def timed(work: Callable[[], object], tokens: int) -> Values:
    """Tokens a second and peak memory of one piece of work."""
    mx.clear_cache()
    mx.reset_peak_memory()
    start = time.perf_counter()
    work()
    return {"tok/s": tokens / (time.perf_counter() - start), "GB": mx.get_peak_memory() / 1e9}


def ours(
    model: nn.Module, load: Load, sampling: Sampling | None = None, logprobs: bool = True, name: str = "grpo"
) -> Side:
    """This project's generator with a slot for every row."""
    generator = Generator(model, cast("Any", NoTokenizer()), slots=load.rows)
    requests = [Request(ids, load.completions) for ids in load.draw(model.args.vocab_size)]
    sampling = sampling or Sampling(max_tokens=load.completion_length)

    def run() -> Values:
        return timed(
            lambda: generator.generate(requests, sampling, derive_key(0, "draw"), logprobs),
            load.rows * sampling.max_tokens,
        )

    return Side(name, run)


def mlx_lm_batched(model: nn.Module, load: Load) -> Side:
    """mlx-lm's `BatchGenerator` with a row for every completion, logprobs read as `batch_generate` does."""
    prompts = [ids for ids in load.draw(model.args.vocab_size) for _ in range(load.completions)]
    return Side(
        "mlx-lm", lambda: timed(lambda: _batch_generate(model, prompts, load), load.rows * load.completion_length)
    )


def _batch_generate(model: nn.Module, prompts: Sequence[list[int]], load: Load) -> list[list[float]]:
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.sample_utils import make_sampler

    generator = BatchGenerator(
        model,
        max_tokens=load.completion_length,
        sampler=make_sampler(1.0),
        completion_batch_size=load.rows,
        prefill_batch_size=load.rows,  # its fastest: by default prompts go in eight at a time
    )
    uids = generator.insert(prompts)
    logprobs: dict[int, list[float]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            logprobs[response.uid].append(response.logprobs[response.token].item())
    generator.close()
    if any(len(found) != load.completion_length for found in logprobs.values()):
        raise RunError("mlx-lm has not sampled what it was asked for: its speed would mean nothing")
    return [logprobs[uid] for uid in uids]


def mlx_lm_stream(model: nn.Module, load: Load) -> Side:
    """mlx-lm's loop for one row, which `stream_generate` wraps, at temperature 1."""
    (prompt,) = load.draw(model.args.vocab_size)

    def work() -> None:
        from mlx_lm.generate import generate_step
        from mlx_lm.sample_utils import make_sampler

        steps = generate_step(mx.array(prompt), model, max_tokens=load.completion_length, sampler=make_sampler(1.0))
        for _ in steps:
            pass

    return Side("mlx-lm", lambda: timed(work, load.completion_length))
