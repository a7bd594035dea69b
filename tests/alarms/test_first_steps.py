"""What the first step says of a run that may learn nothing."""

from __future__ import annotations

import pytest
from alarms.signs import terms
from scoring.hosts import talk

from grpo.alarms.past import PastSteps
from grpo.alarms.watch import after_step
from grpo.types import Group, Rollout, StepMetrics, Task, Trajectory

FINE = {"reward": 0.5, "frac_reward_zero_std": 0.75, "completions/clipped_ratio": 0.5}
WEIGHTS = {"exact": 1.0}


def of_first(
    metrics: StepMetrics, weights: dict[str, float], environments: tuple[str, ...] | list[str] = ()
) -> list[str]:
    """The alarms of a first step, as lines."""
    known = terms(weights=weights, environments=environments)
    return [str(alarm) for alarm in after_step(metrics, PastSteps(), known)[0].alarms]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, []),
        ({"completions/clipped_ratio": 0.75}, ["75% of the completions were truncated"]),
        ({"frac_reward_zero_std": 1.0}, ["no group has different rewards (their mean is 0.5)"]),
        (
            {"reward": None, "frac_reward_zero_std": 1.0},
            ["nothing was learned. exact returned None for each of them. None means"],
        ),
        (
            {"reward": None, "rewards/exact/timeout_rate": 0.5},
            [
                "'exact' failed on 50% (timeout) of the completions",
                "nothing was learned. exact failed or returned None",
            ],
        ),
        (
            {"completions/clipped_ratio": 1.0, "reward": 0.0, "frac_reward_zero_std": 1.0},
            ["100% of the completions", "their mean is 0)"],
        ),
    ],
)
def test_what_the_first_step_says(values: dict, said: list[str]) -> None:
    metrics = StepMetrics(1, {name: value for name, value in (FINE | values).items() if value is not None})
    lines = of_first(metrics, WEIGHTS)
    assert len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines, strict=True))


def test_equal_rewards_teach_where_turns_differ_or_penalties() -> None:
    answer = Trajectory.sampled((5,), (-0.5,), "four", "stop")
    for rollout, lines in (
        (Rollout(answer, turn_advantages=(0.0, -1.0)), 0),
        (Rollout(answer, advantage=0.5), 0),
        (Rollout(answer, turn_advantages=(0.0, 0.0)), 1),
    ):
        metrics = StepMetrics(1, FINE | {"frac_reward_zero_std": 1.0}, (Group(Task(0, "", (1,), {}), (rollout,)),))
        assert len(of_first(metrics, WEIGHTS)) == lines


def test_tokens_of_an_environment_take_room_too() -> None:
    said = []
    for trained in ((True, True), (True, False)):
        group = Group(Task(0, "", (), {}), (Rollout(Trajectory((5, 6), trained, {}, "", "length")),))
        metrics = StepMetrics(1, FINE | {"completions/clipped_ratio": 0.75}, (group,))
        said += of_first(metrics, WEIGHTS)
    assert ["which includes tokens that the environment adds" in line for line in said] == [False, True]


def test_only_rewards_that_are_learned_from_are_named() -> None:
    weights = {"exact": 0.0, "mine": 1.0}
    (line,) = of_first(StepMetrics(1, {"completions/clipped_ratio": 0.0}), weights)
    assert "nothing was learned. mine returned None" in line


@pytest.mark.parametrize(
    ("turn_rewards", "ended", "returned"),
    [([], "done", True), ([None], "done", False), ([], "length", False)],
    ids=["an agent", "an environment", "an agent at a limit"],
)
def test_of_agents_that_return_none_it_is_said(turn_rewards: list, ended: str, returned: bool) -> None:
    talks = (talk(turn_rewards=turn_rewards, ended=ended),) * 2
    metrics = StepMetrics(1, {"completions/clipped_ratio": 0.0}, (Group(Task(0, "", (1,), {}), talks),))
    (line,) = of_first(metrics, {"Game": 1.0}, ["Game"])
    assert ("the agent returned None in 2 of 2" in line) is returned
    assert (f"2 of 2 conversations ended by {ended}" in line) is not returned


def test_of_environments_it_is_said_how_their_conversations_ended() -> None:
    talks = [talk(turn_rewards=[None], ended=reason) for reason in ("length", "length", "done")]
    metrics = StepMetrics(1, {"completions/clipped_ratio": 0.0}, (Group(Task(0, "", (), {}), tuple(talks)),))
    (line,) = of_first(metrics, {"Game": 1.0}, ["Game"])
    assert "Game rewarded no conversation" in line
    assert "2 of 3 conversations ended by length. To get rewards, raise rollout.max_completion_length" in line
    assert "returned None" not in line
    assert "grpo rewards" not in line
    (line,) = of_first(metrics, {"exact": 1.0, "Game": 1.0}, ["Game"])
    assert "exact returned None for each of them" in line
    assert "Game rewarded no conversation" in line


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (
            ["max_turns", "max_turns", "done"],
            "2 of 3 conversations ended by max_turns: check whether environment.max_turns",
        ),
        (["max_turns", "done"], None),
        (["done", "done"], None),
        ([], None),
    ],
)
def test_where_rewards_are_equal_the_limit_that_ended_most_is_named(ends: list[str], said: str | None) -> None:
    """As of agents that a limit stops: their reward is 0."""
    groups = (Group(Task(0, "", (), {}), tuple(talk(turn_rewards=[0.0], ended=reason) for reason in ends)),)
    metrics = StepMetrics(1, FINE | {"frac_reward_zero_std": 1.0}, groups)
    (line,) = of_first(metrics, WEIGHTS)
    assert ("conversations ended by" in line) is bool(said)
    assert (said or "") in line


def called(failed: int, *results: str) -> Rollout:
    messages = [{"role": "tool", "name": "price", "content": result} for result in results]
    return talk(messages, outcome=1.0, calls=(len(results), failed))


@pytest.mark.parametrize(
    ("talks", "said"),
    [
        ([called(2, "{'error': 'division by zero'}", "{'error': \"no 'hat'\"}"), called(0, "7")], "2 of 3"),
        ([called(0, "{'error': 'itself'}"), called(2, *["{'error': 'division by zero'}"] * 2)], "2 of 3"),
        ([called(1, "7", "{'error': 'division by zero'}")], None),  # half of them
        ([called(0, "{'error': 'what the tool itself says'}")], None),
        ([talk(outcome=1.0)], None),
    ],
)
def test_tools_that_fail_in_most_calls_are_named_with_their_first_error(talks: list[Rollout], said: str | None) -> None:
    lines = of_first(StepMetrics(1, FINE, (Group(Task(0, "", (), {}), tuple(talks)),)), WEIGHTS)
    if said is None:
        assert not lines
    else:
        assert f"step 1: {said} tool calls failed, the first in 'price': division by zero. The" in lines[0]
