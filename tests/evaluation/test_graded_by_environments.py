"""Evaluation of conversations: the environment grades where no function does."""

from __future__ import annotations

import pytest
from scoring.hosts import talk

from grpo.backend.tickets import Deal
from grpo.config import EvalConfig
from grpo.errors import RunError
from grpo.evaluation.evaluator import Evaluator
from grpo.scoring.own import OwnTerms
from grpo.scoring.scorer import Scorer
from grpo.types import Group, Rollout, Task

TASKS = [Task(0, "?", (), {}), Task(1, "?", (), {})]


class Engine:
    """Answers by heart: the rollouts of each task, of which a group takes the first."""

    def __init__(self, *rollouts: list[Rollout]) -> None:
        self.rollouts = rollouts

    def deal(self, ranks, tasks, n):
        return Deal.of(ranks, tasks, n)

    def rollout(self, tasks, n, *_):
        return [Group(task, tuple(self.rollouts[task.index][:n])) for task in tasks]


def evaluator(*rollouts: list[Rollout], environments=("Game",), rewards=None, rate: float = 1.0) -> Evaluator:
    terms = {name: OwnTerms(max_failure_rate=rate) for name in environments}
    scorer = Scorer(rewards or {}, environments=terms)
    cfg = EvalConfig(split="test", samples=2)
    return Evaluator(cfg, TASKS, Engine(*rollouts), scorer, 1.0, 0)


def test_the_environments_own_reward_grades() -> None:
    metrics = evaluator([talk(outcome=1.0), talk(outcome=0.5)], [talk(outcome=0.0), talk(turn_rewards=[2.0])])(3)
    assert metrics.grader == "Game"
    assert (metrics.values["greedy"], metrics.values["avg@2"], metrics.values["pass@2"]) == (0.5, 0.5, 1.0)
    assert metrics.values["rewards/Game"] == pytest.approx((0.75 + 1.0) / 2)


def test_each_environment_grades_its_own() -> None:
    made = evaluator(
        [talk(outcome=1.0)] * 2, [talk(outcome=1.0, environment="Quiz")] * 2, environments=("Game", "Quiz")
    )
    metrics = made(0)
    assert (metrics.grader, metrics.values["avg@2"], metrics.n) == ("Game or Quiz", 1.0, 2)
    assert metrics.values["rewards/Quiz"] == 1.0
    assert {"rewards/Game", "rewards/Quiz"} <= set(made.names)


def test_what_agents_measured_is_measured_of_the_policy() -> None:
    """Each prompt's mean, with an interval."""
    first = [talk(outcome=1.0, metrics={"moves": 3.0}), talk(outcome=0.0, metrics={"moves": 5.0})]
    metrics = evaluator(first, [talk(outcome=1.0, metrics={"moves": 8.0})] * 2)(0)
    assert metrics.values["environment/Game/moves"] == 6.0
    assert "environment/Game/moves" in metrics.intervals


def test_a_function_comes_first() -> None:
    rewards = {"right": lambda completions, **_: [float("7" in c[-1]["content"]) for c in completions]}
    metrics = evaluator([talk("7", outcome=0.0)] * 2, [talk("8", outcome=1.0)] * 2, rewards=rewards)(0)
    assert (metrics.grader, metrics.values["avg@2"]) == ("right", 0.5)


@pytest.mark.parametrize("with_function", [False, True])
def test_a_conversation_that_failed_is_not_right(with_function: bool) -> None:
    """And is counted as a grading that failed, whoever grades: or one success and three crashes would be 100 %."""
    rewards = {"right": lambda completions, **_: [1.0] * len(completions)} if with_function else None
    broken = talk(failed="crash")
    metrics = evaluator([talk(outcome=1.0), broken], [broken, broken], rewards=rewards)(0)
    assert (metrics.values["greedy"], metrics.values["avg@2"], metrics.failed_gradings) == (0.5, 0.25, 4)


def test_conversations_that_nobody_rewarded_are_not_right(caplog) -> None:
    """A model that is cut off before its first reward must be able to begin; what to do is said."""
    cut = [talk(ended="length")] * 2
    metrics = evaluator(cut, cut)(0)
    assert (metrics.values["greedy"], metrics.values["avg@2"], metrics.n, metrics.failed_gradings) == (0.0, 0.0, 2, 0)
    assert "rewards/Game" not in metrics.values  # there is none to take the mean of
    assert "6 of 6 conversations ended by length. To get rewards, raise rollout.max_comp" in caplog.text
    caplog.clear()
    assert evaluator([talk(outcome=1.0)] * 2, cut)(0).values["avg@2"] == 0.5
    assert not caplog.text


def test_an_evaluation_in_which_every_conversation_failed_is_none() -> None:
    broken = [talk(failed="crash")] * 2
    with pytest.raises(RunError, match=r"environment's own reward, 'Game', scored no completion: it failed on 6"):
        evaluator(broken, broken)(0)


def test_votes_are_on_what_the_model_said() -> None:
    """The tool's number is no answer."""
    tool = {"role": "tool", "name": "look", "content": "\\boxed{5}"}
    rows = [talk([{"role": "assistant", "content": f"\\boxed{{{n}}}"}, tool], outcome=float(n == 7)) for n in (8, 7)]
    metrics = evaluator(rows, rows)(0)
    assert metrics.values["maj@2"] == 0.0  # of 8 and 7 the first; with the tool's 5 both would be one answer
