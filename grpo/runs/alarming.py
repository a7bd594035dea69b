"""What the alarms of a run compare its metrics with."""

from __future__ import annotations

import mlx.core as mx

from grpo.alarms.terms import AlarmTerms
from grpo.training.trainer import Trainer


def terms_of(trainer: Trainer) -> AlarmTerms | None:
    """The alarm terms of a trainer's run: thresholds and the settings they depend on. None with `alarms: off`."""
    cfg, scorer, alarms = trainer.cfg, trainer.scorer, trainer.cfg.alarms
    if alarms is None:
        return None
    return AlarmTerms(
        alarms,
        cfg.rollout,
        cfg.loss,
        cfg.optim,
        scorer.weights,
        scorer.environments,
        trainer.gap.explained,
        cfg.best_metric if cfg.eval else None,
        cfg.has_penalty,
        cfg.ranks is not None,
        trainer.policy.dtype == mx.float32,
    )
