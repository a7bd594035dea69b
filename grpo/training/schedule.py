"""The learning rate of a step: a pure function, so that a run resumed at a step has that step's."""

from __future__ import annotations

import math

from grpo.config import OptimConfig


def learning_rate(cfg: OptimConfig, step: int) -> float:
    """The learning rate of `step` (from 1 to `cfg.steps`).

    It rises linearly to `cfg.learning_rate` over `warmup_steps`, then is constant or falls, on a line or half a
    cosine, to reach 0 one step after the last.
    """
    if step <= cfg.warmup_steps:
        return cfg.learning_rate * step / cfg.warmup_steps
    progress = (step - 1 - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    match cfg.lr_scheduler_type:
        case "constant":
            return cfg.learning_rate
        case "linear":
            return cfg.learning_rate * (1 - progress)
        case "cosine":
            return cfg.learning_rate * (1 + math.cos(math.pi * progress)) / 2
