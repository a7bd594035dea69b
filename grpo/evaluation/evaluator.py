"""Evaluation on held-out prompts: greedy, avg@k, pass@k and maj@k, with intervals."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from math import comb, sqrt
from statistics import fmean

from grpo.agents.outcome import measured as told_by_agent
from grpo.backend.random import derive_seed
from grpo.backend.ranks import Ranks
from grpo.config import EvalConfig
from grpo.errors import RunError
from grpo.evaluation.votes import final_answer, majority
from grpo.rollout import RolloutEngine
from grpo.scoring.own import unrewarded
from grpo.scoring.scorer import Scorer
from grpo.scoring.sharing import scoring_once
from grpo.scoring.text import said_in
from grpo.training.metrics import SOLVED
from grpo.types import EvalMetrics, Group, Rollout, Task

log = logging.getLogger(__name__)

RESAMPLES = 1000
Z = 1.959963984540054
"""Half the width of a normal distribution's central 95 % interval, in standard deviations."""


class Evaluator:
    """Measures a policy on fixed prompts.

    A completion is right if the grader gives it 1 or more. The grader is the first reward that scores the held-out
    prompts, or the environment's own reward if there is none. A completion without a score (None: the reward does not
    apply) is left out. A completion on which the grader or the environment failed counts as wrong: leaving it out would
    turn one right answer and three timeouts into 100 %. A conversation that its environment did not reward counts as
    wrong, too: it was truncated, or never did what the environment rewards.

    With several processes, each process samples and scores some of the prompts (`Deal`), and all get the same metrics.
    """

    def __init__(
        self,
        cfg: EvalConfig,
        tasks: Sequence[Task],
        engine: RolloutEngine,
        scorer: Scorer,
        temperature: float,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        """`temperature` is for the samples (greedy answers are measured in addition); draws derive from `seed`."""
        self.samples, self.temperature, self.seed = cfg.samples, temperature, seed
        self.tasks, self.engine, self.scorer = tasks, engine, scorer
        self.graders = scorer.graders("eval")
        self.grader = " or ".join(self.graders)
        self.ranks = ranks or Ranks()

    @property
    def _own(self) -> bool:
        """Whether environments grade their own conversations because no reward function scores the prompts."""
        return not set(self.graders) & set(self.scorer.rewards)

    @property
    def names(self) -> list[str]:
        """The metrics of every evaluation, for all of which higher is better; metrics that rewards log are extra."""
        sampled = [f"avg@{self.samples}", *(f"pass@{k}" for k in self._ks()), f"maj@{self.samples}"]
        return ["greedy", *sampled, *(f"rewards/{name}" for name in self.scorer.weights)]

    def __call__(self, step: int) -> EvalMetrics:
        """Measure the current policy, after `step` (0: before training). The draws are the same at every step."""
        return self.measured(step)[0]

    def measured(self, step: int) -> tuple[EvalMetrics, list[Group]]:
        """The metrics, and the scored groups that were sampled at `temperature`."""
        greedy = self._sampled(1, 0.0)
        sampled = self._sampled(self.samples, self.temperature)
        right = [graded for group in sampled if (graded := self._graded(group))]
        solved = [[right for _, right in graded] for graded in right]
        measured = {
            "greedy": [float(graded[0][1]) for group in greedy if (graded := self._graded(group))],
            f"avg@{self.samples}": [fmean(marks) for marks in solved],
            **{f"pass@{k}": [pass_at(k, len(marks), sum(marks)) for marks in solved] for k in self._ks()},
            f"maj@{self.samples}": [_voted(graded) for graded in right],
            **{f"rewards/{name}": _means(sampled, _scores, name) for name in self.scorer.weights},
        }
        measured |= {name: _means(sampled, _told, name) for name in _logged(sampled) if name not in measured}
        rollouts = [rollout for group in (*greedy, *sampled) for rollout in group.rollouts]
        known = any(self._score(rollout) is not None for rollout in rollouts)
        if not known and self._own and not all(map(self._failed, rollouts)):
            log.warning("evaluation: %s. They count as wrong", unrewarded(self.graders, [*greedy, *sampled]))
        elif not measured["greedy"] or not solved or not known:
            what = "environment's own reward" if self._own else "first reward"
            raise RunError(f"evaluation: the {what}, {self.grader!r}, scored no completion: {self._why_none(rollouts)}")
        measured = {name: values for name, values in measured.items() if values}
        metrics = EvalMetrics(
            step=step,
            n=len(measured["greedy"]),
            grader=self.grader,
            values={name: fmean(values) for name, values in measured.items()},
            intervals={name: interval(values, self.seed) for name, values in measured.items()},
            failed_gradings=sum(map(self._failed, rollouts)),
        )
        return metrics, sampled

    def _why_none(self, rollouts: Sequence[Rollout]) -> str:
        """The end of the error if no completion has a score: what the grader did, and what to do."""
        failed = sum(map(self._failed, rollouts))
        without = sum(self._score(rollout) is None for rollout in rollouts) - failed
        did = [f"failed on {failed}"] * bool(failed) + [f"returned None for {without}"] * bool(without)
        if self._own:
            return f"it {did[0]}, which are all conversations. Look at the exception that it raises"
        return (
            f"of {len(rollouts)} completions it {' and '.join(did)}. An evaluation counts the completions to which the "
            "first of `rewards` gives 1 or more: put a reward first that scores the held-out rows, or test this reward "
            "(grpo rewards test)"
        )

    def _score(self, rollout: Rollout) -> float | None:
        """The grader's score of a completion; each environment grades its own conversations."""
        return next((score for name in self.graders if (score := rollout.scores[name]) is not None), None)

    def _failed(self, rollout: Rollout) -> bool:
        """Whether the grader failed on a completion, or could not grade it because the environment failed."""
        conversation = rollout.trajectory.conversation
        broke = conversation is not None and conversation.failure is not None
        return broke or any(name in rollout.failures for name in self.graders)

    def _ks(self) -> list[int]:
        """The powers of two k with 1 < k < samples, then the number of samples."""
        return [k for k in (2**i for i in range(1, self.samples.bit_length())) if k < self.samples] + [self.samples]

    def _sampled(self, n: int, temperature: float) -> list[Group]:
        """All groups, scored. A prompt's draws depend neither on the process that samples it nor on `eval.prompts`."""
        seeds = [derive_seed(self.seed, "eval", n, task.index) for task in self.tasks]
        deal = self.engine.deal(self.ranks, len(self.tasks), n)
        with scoring_once(self.scorer, self.tasks, self.ranks) as scoring:
            groups = self.engine.rollout(self.tasks, n, temperature, seeds, False, "evaluation", scoring.add, deal)
            scored = scoring.scored(groups)
        return deal.merge(scored)

    def _graded(self, group: Group) -> list[tuple[Rollout, bool]]:
        """The completions to which the grader applies, and whether each is right. A failed grading counts as wrong, and
        so does a conversation that its environment did not reward."""
        scores = [(rollout, self._score(rollout)) for rollout in group.rollouts]
        return [
            (rollout, score is not None and score >= SOLVED)
            for rollout, score in scores
            if score is not None or self._own or self._failed(rollout)
        ]


def pass_at(k: int, n: int, correct: int) -> float:
    """The unbiased estimate of the probability that at least one of `k` samples is right, from `n` samples of which
    `correct` are right.

    Chen et al. 2021 (arXiv 2107.03374), equation 1. With fewer than `k` samples, the probability for `n` samples.
    """
    k = min(k, n)
    return 1 - comb(n - correct, k) / comb(n, k)


def _voted(graded: Sequence[tuple[Rollout, bool]]) -> float:
    """1 if the most common answer is right, else 0 (self-consistency, arXiv 2203.11171).

    The answer is right if any completion with it was graded right: the grader may have failed on the others.
    """
    answers = [final_answer(said_in(rollout.trajectory)) for rollout, _ in graded]
    chosen = answers[majority(answers)]
    return float(any(right for answer, (_, right) in zip(answers, graded, strict=True) if answer == chosen))


def _logged(groups: Sequence[Group]) -> list[str]:
    """The names of metrics that rewards logged for single completions (such as the strict and lenient matches of
    `math_answer`), and of metrics that agents returned."""
    return sorted({name for group in groups for rollout in group.rollouts for name in _told(rollout)})


def _told(rollout: Rollout) -> Mapping[str, float | None]:
    return {**rollout.logged, **told_by_agent(rollout.trajectory)}


def _scores(rollout: Rollout) -> Mapping[str, float | None]:
    return rollout.scores


def _means(groups: Sequence[Group], of: Callable[[Rollout], Mapping[str, float | None]], name: str) -> list[float]:
    """Each prompt's mean of a named value over its completions, without prompts that have no value."""
    known = [[of(rollout).get(name) for rollout in group.rollouts] for group in groups]
    return [fmean(values) for row in known if (values := [value for value in row if value is not None])]


def interval(values: Sequence[float], seed: int) -> tuple[float, float]:
    """The 95 % interval of a mean over prompts: Wilson's if each value is 0 or 1, else the bootstrap's.

    The bootstrap interval has width 0 if all values are equal, for example at 0 or 100 %.
    """
    if all(value in (0.0, 1.0) for value in values):
        return wilson_interval(sum(values), len(values))
    return bootstrap_interval(values, seed)


def hidden_by_failures(metrics: EvalMetrics, name: str) -> float:
    """The maximum increase of a metric if every failed grading had been right. A completion counts as 1 / k of its
    prompt in `avg@k`, and as the whole prompt in the other metrics."""
    kind, _, k = name.partition("@")
    return metrics.failed_gradings / (metrics.n * (int(k) if kind == "avg" else 1))


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927)."""
    p, z2 = successes / n, Z**2
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * sqrt(p * (1 - p) / n + z2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap_interval(
    values: Sequence[float], seed: int, statistic: Callable[[Sequence[float]], float] = fmean
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a statistic over prompts (Efron 1979)."""
    generator = random.Random(derive_seed(seed, "bootstrap"))
    draws = sorted(statistic(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return draws[int(0.025 * RESAMPLES)], draws[int(0.975 * RESAMPLES) - 1]
