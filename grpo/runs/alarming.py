"""What the alarms of a run compare its metrics with."""

from __future__ import annotations

from grpo.alarms.terms import AlarmTerms
from grpo.recipes import with_settings
from grpo.training.trainer import Trainer


def terms_of(trainer: Trainer) -> AlarmTerms | None:
    """The alarm terms of a trainer's run: thresholds and the settings they depend on. None with `alarms: off`."""
    cfg, scorer, alarms = trainer.cfg, trainer.scorer, trainer.cfg.alarms
    if alarms is None:
        return None
    if cfg.ranks is not None:  # the logprobs come from two policies, which differ by more than rounding
        alarms = with_settings(alarms, {"logp_difference": None})
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
    )
