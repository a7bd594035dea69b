"""Checks before a run that decoding and teacher forcing agree. `training/gap.py` checks it again at each step.

GRPO depends on this: if the sampler does not compute the same model as the update, ratios differ from 1 without any
change of the policy, and training follows the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from statistics import fmean
from typing import Any

import mlx.core as mx

from grpo.backend.blame import cause
from grpo.backend.random import derive_key
from grpo.errors import RunError, UserError
from grpo.generation.generator import Request
from grpo.generation.sampling import Sampling
from grpo.model.policy import Policy
from grpo.rollout import RolloutEngine
from grpo.training.batches import by_row, forced, rows_of
from grpo.training.gap import gap_bound
from grpo.training.packing import Packing
from grpo.types import Group, Rollout, Task

TOKENS, GENERATIONS = 16, 2
SHOWN = 0.1, 10.0, 1.0
"""How far the random B should move logprobs on average: at least this many nats, or this many times the bound if that
is more; and at most this many nats. A larger move distorts the model, and its rounding errors grow."""
FIRST_B, TRIES = 0.05, 10
"""Standard deviation of the first random B, before the scale; and the number of sizes to try."""
TRIED = "parity"
"""Name of the adapter state with the random B during the check."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """Absolute gaps in nats between decoding and teacher forcing, a value per token; and the mean change of the same
    tokens' logprobs by the random B (None: the weights are checked unchanged)."""

    gaps: list[float]
    moved: float | None


def check_parity(
    policy: Policy, engine: RolloutEngine, tasks: Sequence[Task], seed: int, packing: Packing | None = None
) -> str:
    """Sample a few tokens, compare their logprobs with the update's, and return a line that reports the difference.

    A new adapter's B is zero, so a decoder that ignores the adapter would pass. The check therefore adds random numbers
    to B, large enough to be seen; afterwards the policy has its own arrays again, also after an error. Full weights are
    checked unchanged. `packing` is the update's; without it all rows go through the model together.

    Raises RunError if the mean gap is more than rounding in the model's dtype explains: ratios would differ from 1
    without any change of the policy, and training would follow the difference. Raises UserError for a model that cannot
    be decoded.
    """
    bits = engine.generator.kv_bits

    def measured(of: Sequence[Task], size: float | None) -> _Measured:
        return _measured(policy, engine, of, seed, packing, size)

    if not any(path.endswith("lora_b") for path in policy.adapters.state()):
        return _verdict(measured(tasks, None), policy, bits)
    first = measured(tasks, _first_b(policy))
    if _shows(first.moved, policy, bits):
        return _verdict(first, policy, bits)
    shortest = min(tasks, key=lambda task: len(task.prompt_ids))
    size = _size_of_b(policy, lambda size: measured([shortest], size).moved, bits)
    return _verdict(measured(tasks, size), policy, bits)


def _first_b(policy: Policy) -> float:
    """The first standard deviation of B to try. For most models it moves logprobs by the intended amount."""
    scale: float = policy.adapters.config["lora_parameters"]["scale"]
    return FIRST_B / scale


def _shows(moved: float | None, policy: Policy, kv_bits: int | None) -> bool:
    """Whether B moved logprobs far enough to be seen, but not too far."""
    least, most = _window(policy, kv_bits)
    return moved is not None and least <= moved <= most


def _size_of_b(policy: Policy, moved: Callable[[float], float | None], kv_bits: int | None = None) -> float:
    """The standard deviation at which a random B moves logprobs by the intended amount. `moved` measures the change.

    In a very confident model, logprobs hardly change at first and then change abruptly: hence a bisection.
    """
    least, most = _window(policy, kv_bits)
    size, low, high = _first_b(policy), 0.0, math.inf
    for _ in range(TRIES):
        found = moved(size)
        assert found is not None
        if least <= found <= most:
            break
        if found < least:
            low = size
        else:  # too far, or NaN after an overflow
            high = size
        size = math.sqrt(low * high) if low > 0 and high < math.inf else size * (4 if low > 0 else 1 / 4)
    return size


def _window(policy: Policy, kv_bits: int | None) -> tuple[float, float]:
    """The least and most nats by which the random B should move logprobs.

    The least is what can be seen despite rounding, also of quantized keys and values. A larger move is avoided, because
    larger numbers are rounded more.
    """
    nats, times, most = SHOWN
    least = max(nats, times * gap_bound(policy), 3 * gap_bound(policy, kv_bits))
    return least, max(most, 3 * least)


def _measured(
    policy: Policy,
    engine: RolloutEngine,
    tasks: Sequence[Task],
    seed: int,
    packing: Packing | None,
    size: float | None,
) -> _Measured:
    """Decode and teacher-force with the policy, with random numbers of deviation `size` added to B if it is given."""
    with _moved(policy, seed, size):
        groups = _decoded(policy, engine, tasks, seed)
        forced = _forced(policy, groups, packing)
    trajectories = [rollout.trajectory for group in groups for rollout in group.rollouts]
    sampled = [value for t in trajectories for value in t.of_trained(t.behaviour or ())]
    gaps = [abs(here - there) for here, there in zip(forced, sampled, strict=True)]
    if size is None:
        return _Measured(gaps, None)
    unmoved = _forced(policy, groups, packing)
    return _Measured(gaps, fmean(abs(here - there) for here, there in zip(forced, unmoved, strict=True)))


@contextmanager
def _moved(policy: Policy, seed: int, size: float | None) -> Iterator[None]:
    """Inside the block, add `size` × a normal random number to each number of B. With None, change nothing.

    Processes that share a model draw the whole B and take their parts, so that any number of processes checks the same
    policy.
    """
    if size is None:
        yield
        return
    state = policy.adapters.state()
    paths, shards = [path for path in state if path.endswith("lora_b")], policy.adapters.shards
    keys = mx.random.split(derive_key(seed, "parity", 1), len(paths))
    for path, key in zip(paths, keys, strict=True):
        whole = mx.random.normal(shards.shape(path, state[path]), key=key)
        state[path] = (state[path] + size * shards.part_of(path, whole)).astype(state[path].dtype)
    policy.adapters.add(TRIED, state)
    try:
        with policy.use(TRIED):
            yield
    finally:
        policy.adapters.drop(TRIED)


def _decoded(policy: Policy, engine: RolloutEngine, tasks: Sequence[Task], seed: int) -> list[Group]:
    sampling = Sampling(policy.temperature, TOKENS)
    requests = [Request(task.prompt_ids, GENERATIONS) for task in tasks]
    try:
        answers = engine.generator.generate(requests, sampling, derive_key(seed, "parity"))
    except Exception as error:  # the model's own code may raise anything
        way = engine.generator.decoding.description
        raise UserError(f"decoding fails with this model ({way}): {cause(error)}") from error
    return [Group(task, tuple(map(Rollout, completions))) for task, completions in zip(tasks, answers, strict=True)]


def _forced(policy: Policy, groups: Sequence[Group], packing: Packing | None) -> list[float]:
    """The update's logprobs of all trained tokens, in one list."""
    rows = rows_of(groups)
    logprobs = by_row(rows, packing or _together(policy, rows), partial(forced, policy))
    each = (rollout.trajectory.of_trained(values) for (_, rollout), values in zip(rows, logprobs, strict=True))
    return list(chain.from_iterable(each))


def _together(policy: Policy, rows: Sequence[Any]) -> Packing:
    return Packing(2**31, len(rows), GENERATIONS, shares=policy.share_prompts)


def _verdict(measured: _Measured, policy: Policy, kv_bits: int | None) -> str:
    mean, worst, bound = fmean(measured.gaps), max(measured.gaps), gap_bound(policy, kv_bits)
    line = (
        f"decoded against teacher-forced logprobs: mean gap {mean:.1e}, max {worst:.1e} (bound on the mean {bound:.0e})"
    )
    if measured.moved is not None:
        line += f", with a random adapter that changes logprobs by {measured.moved:.1g}"
        if not measured.moved >= 3 * bound:
            line += ": too little to tell whether decoding uses the adapter"
    if not mean <= bound:
        raise RunError(f"{line}. {_why(kv_bits)}")
    return line


def _why(kv_bits: int | None) -> str:
    """What a gap beyond the bound means, and what to do."""
    if kv_bits:
        return (
            f"Keys and values in {kv_bits} bits may be too coarse for this model: "
            f"{'set rollout.kv_bits to 8, or remove it' if kv_bits < 8 else 'remove rollout.kv_bits'}. If the gap "
            "remains without rollout.kv_bits, please report the model."
        )
    return (
        "Decoding and training do not compute the same model, so training would follow the difference. Possible causes "
        "are the cache, the positions or the adapter in batched decoding. Please report the model; training on it "
        "would not be sound."
    )
