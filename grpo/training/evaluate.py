"""Evaluation on held-out prompts: greedy accuracy, avg@k and pass@k, with intervals, and no logprobs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from statistics import fmean

from grpo.backend.random import derive_key, derive_seed
from grpo.config import Recipe
from grpo.errors import RunError
from grpo.rollout import RolloutEngine
from grpo.scoring.scorer import Scorer
from grpo.training.metrics import SOLVED
from grpo.types import EvalMetrics, Group, Task

RESAMPLES = 1000


class Evaluator:
    """Measures a policy on fixed prompts.

    A completion is right when the recipe's first reward gives it 1 or more, and left out when that gives no score.
    """

    def __init__(self, cfg: Recipe, tasks: Sequence[Task], engine: RolloutEngine, scorer: Scorer) -> None:
        assert cfg.eval is not None
        self.cfg, self.samples = cfg, cfg.eval.samples
        self.tasks, self.engine, self.scorer = tasks, engine, scorer
        self.grader = next(iter(scorer.rewards))

    def __call__(self, step: int) -> EvalMetrics:
        """Measure the policy as it is, before (0) or after `step`. The draws are the same at every step."""
        greedy = self._solved(1, 0.0)
        sampled = self._solved(self.samples, self.cfg.rollout.temperature)
        fractions = {
            "greedy": [fmean(solved) for solved in greedy],
            f"avg@{self.samples}": [fmean(solved) for solved in sampled],
            f"pass@{self.samples}": [float(any(solved)) for solved in sampled],
        }
        if not all(fractions.values()):
            raise RunError(f"evaluation: the first reward, {self.grader!r}, scored no completion")
        return EvalMetrics(
            step=step,
            n=len(fractions["greedy"]),
            grader=self.grader,
            values={name: fmean(values) for name, values in fractions.items()},
            intervals={name: bootstrap_interval(values, self.cfg.seed) for name, values in fractions.items()},
        )

    def _solved(self, n: int, temperature: float) -> list[list[bool]]:
        key = derive_key(self.cfg.seed, "eval", n)
        groups = self.engine.rollout(self.tasks, n, temperature, key, logprobs=False)
        right = [_right(group, self.grader) for group in self.scorer.score(groups)]
        return [solved for solved in right if solved]


def _right(group: Group, grader: str) -> list[bool]:
    scores = [rollout.scores[grader] for rollout in group.rollouts]
    return [score >= SOLVED for score in scores if score is not None]


def bootstrap_interval(
    values: Sequence[float], seed: int, statistic: Callable[[Sequence[float]], float] = fmean
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a statistic over prompts (Efron 1979)."""
    generator = random.Random(derive_seed(seed, "bootstrap"))
    draws = sorted(statistic(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return draws[int(0.025 * RESAMPLES)], draws[int(0.975 * RESAMPLES) - 1]
