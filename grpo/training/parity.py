"""Do decoding and teacher forcing agree? Asked of every model before a run, because GRPO rests on it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import mlx.core as mx

from grpo.backend.hub import one_line
from grpo.backend.random import derive_key
from grpo.errors import RunError, UserError
from grpo.generation.generator import Request
from grpo.generation.sampling import Sampling
from grpo.model.logprobs import ROUNDING
from grpo.model.policy import Policy
from grpo.rollout import RolloutEngine
from grpo.types import Task

TOKENS, GENERATIONS = 16, 2


def check_parity(policy: Policy, engine: RolloutEngine, tasks: Sequence[Task], seed: int) -> str:
    """Sample a few tokens, compare their logprobs with the trainer's, and say in one line how far they are apart.

    Raises RunError when the mean gap is beyond what rounding in the model's dtype explains: then ratios would
    differ from 1 with no change of policy, and training would follow the difference.
    """
    sampling = Sampling(policy.temperature, TOKENS)
    requests = [Request(task.prompt_ids, GENERATIONS) for task in tasks]
    try:
        groups = engine.generator.generate(requests, sampling, derive_key(seed, "parity"))
    except (ValueError, TypeError, AttributeError, IndexError) as error:  # raised by the model's own code
        raise UserError(f"this model cannot be decoded in batches: {one_line(error)}") from error
    pairs = [(task, c) for task, completions in zip(tasks, groups, strict=True) for c in completions]
    gaps: list[float] = []
    for task, completion in pairs:
        ids = mx.array([completion.token_ids])
        tokens = mx.array([[*task.prompt_ids, *completion.token_ids]])
        forced, _ = policy.logprobs(tokens, mx.array([len(task.prompt_ids)]), ids)
        assert completion.logprobs is not None
        here: Any = mx.abs(forced[0] - mx.array(completion.logprobs)).tolist()
        gaps += here
    return _verdict(fmean(gaps), max(gaps), policy.dtype)


def _verdict(mean: float, worst: float, dtype: mx.Dtype) -> str:
    bound = ROUNDING.get(dtype, min(ROUNDING.values()))
    line = (
        f"decoded against teacher-forced logprobs: mean gap {mean:.1e}, max {worst:.1e} (bound on the mean {bound:.0e})"
    )
    if not mean <= bound:
        raise RunError(
            f"{line}. This model decodes something else than it trains on: its cache or its positions are handled "
            "wrongly for batched decoding. Please report the model; training on it would not be sound."
        )
    return line
