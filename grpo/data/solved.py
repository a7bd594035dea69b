"""What a solve rate is: the share of its best score that a task's completions get on average."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from grpo.types import Rollout


@dataclass(frozen=True, slots=True)
class Solved:
    """How far a completion solved its task: score / `best`, within 0 and 1, of the reward that grades.

    `graders` are the names of that reward: one, or those of the environments, each of which grades its own
    conversations (`own`).
    """

    graders: Sequence[str]
    own: bool = False
    best: float = 1.0

    def share(self, rollout: Rollout) -> float | None:
        """How far a completion solved its task; None where the reward gave it no score.

        A reward or an environment that failed says nothing of the task: None, too. A conversation that its environment
        did not reward has solved nothing, as in evaluations: it was cut off, or never did what is rewarded.
        """
        score = next((score for name in self.graders if (score := rollout.scores.get(name)) is not None), None)
        if score is not None:
            return min(1.0, max(0.0, score / self.best))
        return 0.0 if self._unrewarded(rollout) else None

    def rate(self, rollouts: Iterable[Rollout]) -> float | None:
        """The solve rate of a task, of its completions: their mean share; None where none has one."""
        shares = [share for rollout in rollouts if (share := self.share(rollout)) is not None]
        return fmean(shares) if shares else None

    def _unrewarded(self, rollout: Rollout) -> bool:
        """Whether it is a conversation, whole, of an environment that grades here and did not reward it."""
        conversation = rollout.trajectory.conversation
        if not self.own or conversation is None or conversation.environment not in self.graders:
            return False
        return conversation.failure is None and not any(name in rollout.failures for name in self.graders)
