"""Solve rates: a task's mean score over its completions, as a share of the best score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from grpo.types import Rollout


@dataclass(frozen=True, slots=True)
class Solved:
    """Computes solve rates: score / `best`, clipped to 0 to 1, from the reward that grades.

    `graders` are the names of this reward: a single name, or the names of environments, each of which grades its own
    conversations (`own`).
    """

    graders: Sequence[str]
    own: bool = False
    best: float = 1.0

    def share(self, rollout: Rollout) -> float | None:
        """A completion's score as a share of the best score, 0 to 1; None without a score.

        If a reward or an environment failed, the share is None, too. A conversation that its environment did not reward
        counts as 0, as in evaluations: it was cut off, or never did anything that is rewarded.
        """
        score = next((score for name in self.graders if (score := rollout.scores.get(name)) is not None), None)
        if score is not None:
            return min(1.0, max(0.0, score / self.best))
        return 0.0 if self._unrewarded(rollout) else None

    def rate(self, rollouts: Iterable[Rollout]) -> float | None:
        """The solve rate of a task: the mean share of its completions; None if no completion has a share."""
        shares = [share for rollout in rollouts if (share := self.share(rollout)) is not None]
        return fmean(shares) if shares else None

    def _unrewarded(self, rollout: Rollout) -> bool:
        """Whether this is a conversation without failures that its environment, which grades, did not reward."""
        conversation = rollout.trajectory.conversation
        if not self.own or conversation is None or conversation.environment not in self.graders:
            return False
        return conversation.failure is None and not any(name in rollout.failures for name in self.graders)
