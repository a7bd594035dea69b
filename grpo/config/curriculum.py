"""The section `data.curriculum`: how often tasks are drawn, by how often they were solved."""

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
    """How often a hard task is drawn, compared with a task of another pool: 0.1 is a tenth as often as 1. 0: never."""
    normal: AtLeast0 = 1.0
    """The same of a task that is neither hard nor easy."""
    easy: AtLeast0 = 0.2
    """The same of an easy task."""
    unseen: AtLeast0 = 1.0
    """The same of a task that has no solve rate yet."""
    hard_threshold: Fraction = 0.1
    """A task is hard up to this solve rate, from 0 (no completion solved it) to 1 (all did). The default leaves a task
    that one of eight completions solved to the normal ones: its group's rewards differ, so it teaches."""
    easy_threshold: Fraction = 0.9
    """A task is easy above this solve rate."""
    reward: str | None = None
    """The name of the reward that solve rates are of. Default: the reward that grades evaluations, which is the first
    of `rewards`, or the environment's own reward where there are none."""
    best: Above0 = 1.0
    """The score of that reward for a task that is wholly solved. A task's solve rate is the mean of score / best over
    the completions of its latest group, where less than 0 counts as 0 and more than 1 as 1. The scores of a reward
    model have no best of their own: name another reward in `reward`, or say here what counts as solved."""

    @model_validator(mode="after")
    def _something_is_drawn(self) -> CurriculumConfig:
        if self.hard_threshold > self.easy_threshold:
            raise ValueError(
                f"data.curriculum.hard_threshold ({self.hard_threshold:g}) is above easy_threshold "
                f"({self.easy_threshold:g}): a task would be hard and easy"
            )
        if not self.hard + self.normal + self.easy + self.unseen:
            raise ValueError("data.curriculum: every weight is 0, so no task would be drawn: give one pool a weight")
        return self


def check_graders(data: DataConfig, rewards: Sequence[RewardConfig]) -> None:
    """Raise ValueError where a curriculum would take the score of a reward model, a number of any size, for the share
    of a task that was solved."""
    own = [(f"data.sources.{place}.curriculum", one.curriculum) for place, one in enumerate(data.sources)]
    for section, cfg in [("data.curriculum", data.curriculum), *own]:
        if cfg is None or "best" in cfg.changed:
            continue
        graders = [reward for reward in rewards if cfg.reward in (None, _called(reward))]
        if data.sources and cfg.reward is None:  # whose first reward may be another one
            graders = []
        if graders and graders[0].use.startswith("model:") and not graders[0].kwargs.get("sigmoid"):
            raise ValueError(
                f"{section}: a solve rate is score / best, and the scores of {graders[0].use} are numbers of any size. "
                f"Name another reward by {section}.reward (one of weight 0 is only measured), say by {section}.best "
                "which score a solved task has, or set sigmoid: true in the reward's kwargs"
            )


def _called(reward: RewardConfig) -> str:
    return reward.name or reward.use.rstrip("/").rpartition("/")[2].removeprefix("model:")
