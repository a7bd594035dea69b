"""Schedules as pure functions of the step, so that a resumed run has the same values at the same step."""

from __future__ import annotations

import math

from grpo.config import LossConfig, OptimConfig


def learning_rate(cfg: OptimConfig, step: int) -> float:
    """The learning rate of `step` (from 1 to `cfg.steps`).

    It rises linearly to `cfg.learning_rate` over `cfg.warmup` steps, then stays constant or decays, linearly or along
    half a cosine, to 0 one step after the last. The decay is that of `get_linear_schedule_with_warmup` and related
    functions in transformers, which TRL uses. Their warm-up starts at 0; this one starts at the first fraction of the
    peak.
    """
    if step <= cfg.warmup:
        return cfg.learning_rate * step / cfg.warmup
    progress = (step - 1 - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    match cfg.lr_scheduler_type:
        case "constant":
            return cfg.learning_rate
        case "linear":
            return cfg.learning_rate * (1 - progress)
        case "cosine":
            return cfg.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def penalty_weight(cfg: LossConfig, steps: int, step: int) -> float:
    """beta at `step` (from 1) of `steps`: `cfg.beta`, changing linearly to `cfg.beta_end` at the last step."""
    if cfg.beta_end is None:
        return cfg.beta
    progress = (step - 1) / max(1, steps - 1)
    return cfg.beta + (cfg.beta_end - cfg.beta) * progress
