"""The section `data.curriculum`: draws tasks depending on how often they were solved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import model_validator

from grpo.config.section import Above0, AtLeast0, Fraction, Section

if TYPE_CHECKING:
    from grpo.config.data import DataConfig
    from grpo.config.rewards import RewardConfig


class CurriculumConfig(Section):
    hard: AtLeast0 = 0.1
    """Weight of a hard task when tasks are drawn: a task with weight 0.1 is drawn a tenth as often as a task with
    weight 1. 0: never."""
    normal: AtLeast0 = 1.0
    """Weight of a task that is neither hard nor easy."""
    easy: AtLeast0 = 0.2
    """Weight of an easy task."""
    unseen: AtLeast0 = 1.0
    """Weight of a task that has no solve rate yet."""
    hard_threshold: Fraction = 0.1
    """A task is hard if its solve rate is at most this. A solve rate goes from 0 (no completion solved the task) to 1
    (every completion did). With the default, a task that one of eight completions solved is normal: the rewards in its
    group differ, so the policy learns from it."""
    easy_threshold: Fraction = 0.9
    """A task is easy if its solve rate is above this."""
    reward: str | None = None
    """Name of the reward from which solve rates are computed. Default: the reward that grades evaluations, which is the
    first of `rewards`, or the environment's own reward if there are no `rewards`."""
    best: Above0 = 1.0
    """Score that this reward gives to a fully solved task. A task's solve rate is the mean of score / best over the
    completions of its latest group, with each value limited to the range from 0 to 1. The scores of a reward model have
    no upper limit: name another reward in `reward`, or set here the score that counts as solved."""

    @model_validator(mode="after")
    def _something_is_drawn(self) -> CurriculumConfig:
        if self.hard_threshold > self.easy_threshold:
            raise ValueError(
                f"data.curriculum.hard_threshold ({self.hard_threshold:g}) is above easy_threshold "
                f"({self.easy_threshold:g}), so a task could be both hard and easy: lower hard_threshold"
            )
        if not self.hard + self.normal + self.easy + self.unseen:
            raise ValueError("data.curriculum: every weight is 0, so no task would be drawn: give one pool a weight")
        return self


def check_graders(data: DataConfig, rewards: Sequence[RewardConfig]) -> None:
    """Raise ValueError if a curriculum would compute solve rates from a reward model's scores, which are unbounded."""
    of_sources = [(f"data.sources.{place}.curriculum", one.curriculum) for place, one in enumerate(data.sources)]
    for section, cfg in [("data.curriculum", data.curriculum), *of_sources]:
        if cfg is None or "best" in cfg.changed:
            continue
        graders = [reward for reward in rewards if cfg.reward in (None, _called(reward))]
        if data.sources and cfg.reward is None:  # each source may have another first reward
            graders = []
        if graders and graders[0].use.startswith("model:") and not graders[0].kwargs.get("sigmoid"):
            raise ValueError(
                f"{section}: a solve rate is score / best, but the scores of {graders[0].use} have no upper limit. "
                f"Set {section}.reward to another reward (a reward of weight 0 is only measured), set {section}.best "
                "to the score of a solved task, or set sigmoid: true in the reward's kwargs"
            )


def _called(reward: RewardConfig) -> str:
    return reward.name or reward.use.rstrip("/").rpartition("/")[2].removeprefix("model:")
