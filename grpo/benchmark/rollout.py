"""`grpo bench rollout`: grpo's generator against mlx-lm's, with the same model, prompts and lengths."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.random import derive_key
from grpo.benchmark.distributions import FIXED
from grpo.benchmark.forced import sample
from grpo.benchmark.models import model_for, vocabulary_of
from grpo.benchmark.protocol import Measurement, Side, Values, alternate
from grpo.benchmark.setting import Setting
from grpo.errors import RunError
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.model.drawn import NoTokenizer
from grpo.model.mlxlm import BatchGenerator, generate_step, make_prompt_cache, make_sampler


def against_mlx_lm(setting: Setting) -> list[Measurement]:
    """Compare grpo's generator with mlx-lm's: its loop for one row, or else its batched generator."""
    model = model_for(setting)
    return alternate(str(setting), [mlx_lm(model, setting), ours(model, setting)], setting.runs)


def by_itself(setting: Setting) -> list[Measurement]:
    """Measure only grpo's generator."""
    return alternate(str(setting), [ours(model_for(setting), setting)], setting.runs)


def mlx_lm(model: nn.Module, setting: Setting) -> Side:
    """mlx-lm's generator for the setting's number of rows."""
    return (mlx_lm_stream if setting.rows == 1 else mlx_lm_batched)(model, setting)


def timed(work: Callable[[], object], tokens: int) -> Values:
    """Tokens per second and peak memory (GB) of a function call."""
    mx.clear_cache()
    mx.reset_peak_memory()
    start = time.perf_counter()
    work()
    return {"tok/s": tokens / (time.perf_counter() - start), "GB": mx.get_peak_memory() / 1e9}


def untold(model: nn.Module, slots: int) -> Generator:
    """A generator without text and without stop tokens: every completion has its full length."""
    return Generator(model, cast("Any", NoTokenizer()), slots)


def requests_of(setting: Setting, model: nn.Module) -> list[Request]:
    """The requests for the setting's prompts and completions."""
    return [Request(ids, setting.completions) for ids in setting.draw(vocabulary_of(model))]


def ours(
    model: nn.Module, setting: Setting, sampling: Sampling | None = None, logprobs: bool = True, name: str = "grpo"
) -> Side:
    """The side of grpo's generator; rows have the setting's lengths."""
    generator, requests = untold(model, setting.at_once), requests_of(setting, model)
    sampling, lengths = sampling or Sampling(max_tokens=setting.completion_length), setting.completion_lengths

    def work() -> None:
        if setting.lengths == FIXED:
            generator.generate(requests, sampling, derive_key(0, "draw"), logprobs)
        else:
            sample(generator, requests, lengths, sampling, logprobs)

    return Side(name, lambda: timed(work, sum(lengths)))


def mlx_lm_batched(model: nn.Module, setting: Setting) -> Side:
    """The side of mlx-lm's `BatchGenerator`, which admits rows as others end. Logprobs are read as in
    `batch_generate`."""
    prompts, lengths = setting.draw(vocabulary_of(model)), setting.completion_lengths
    return Side("mlx-lm", lambda: timed(lambda: _batch_generate(model, prompts, lengths, setting), sum(lengths)))


def _batch_generate(
    model: nn.Module, prompts: Sequence[list[int]], lengths: Sequence[int], setting: Setting
) -> list[list[float]]:
    rows = setting.peer_slots or setting.at_once
    generator = BatchGenerator(
        model,
        sampler=make_sampler(1.0),
        completion_batch_size=rows,
        prefill_batch_size=rows,  # the fastest value; the default prefills eight prompts at a time
    )
    inputs = [ids for ids in prompts for _ in range(setting.completions)]
    caches = None
    if setting.peer_prompts_once:
        with mx.stream(generator.stream):
            caches = [copy.deepcopy(cache) for cache in _prefilled(model, prompts) for _ in range(setting.completions)]
        inputs = [ids[-1:] for ids in inputs]
    uids = generator.insert(inputs, list(lengths), caches=caches)
    logprobs: dict[int, list[float]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            logprobs[response.uid].append(response.logprobs[response.token].item())
    generator.close()
    if [len(found) for found in logprobs.values()] != list(lengths):
        raise RunError("mlx-lm has not sampled the requested lengths, so its speed would be wrong")
    return [logprobs[uid] for uid in uids]


def _prefilled(model: nn.Module, prompts: Sequence[list[int]]) -> list[list[Any]]:
    """mlx-lm's caches of each prompt, without the prompt's last token."""
    found = []
    for ids in prompts:
        caches: list[Any] = make_prompt_cache(model)
        if ids[:-1]:
            model(mx.array([ids[:-1]]), cache=caches)
            mx.eval([cache.state for cache in caches])
        found.append(caches)
    return found


def mlx_lm_stream(model: nn.Module, setting: Setting) -> Side:
    """The side of mlx-lm's loop for one row, which `stream_generate` wraps, at temperature 1."""
    (prompt,) = setting.draw(vocabulary_of(model))

    def work() -> None:
        steps = generate_step(mx.array(prompt), model, max_tokens=setting.tokens, sampler=make_sampler(1.0))
        for _ in steps:
            pass

    return Side("mlx-lm", lambda: timed(work, setting.tokens))
