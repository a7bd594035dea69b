"""Advantages of turns: process supervision, against loops in float64 written from the paper's words."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import mlx.core as mx
import numpy as np
import pytest
from pydantic import ValidationError

from grpo.config import AdvantageConfig, LossConfig, Recipe
from grpo.objective import policy_loss
from grpo.objective.groups import has_variance, turn_rewards, with_advantages, with_rewards
from grpo.presets import PRESETS, PresetName
from grpo.types import Batch, Conversation, Failure, Group, Rollout, Task, Trajectory

WEIGHTS = {"judge": 0.5, "Game": 2.0}
TURN = AdvantageConfig(turns="turn")


def row(turns: list[float | None], outcome: float | None = None, judge: float | None = None) -> Rollout:
    """A completion with a turn of two tokens for each reward of its environment's steps."""
    trained = (False,) + (True, True, False) * len(turns)
    conversation = Conversation("Game", (), (), tuple(turns), outcome)
    trajectory = Trajectory(tuple(range(len(trained))), trained, {}, "", "stop", None, conversation)
    return Rollout(trajectory, {"judge": judge, "Game": conversation.reward})


def group(*rollouts: Rollout) -> Group:
    return with_rewards([Group(Task(0, "", (1,), {}), rollouts)], WEIGHTS)[0]


def turns_of(groups: list[Group], scale: str = "group") -> list[list[tuple[float, ...]]]:
    cfg = AdvantageConfig(turns="turn", scale_rewards=scale)
    made = with_advantages(groups, WEIGHTS, cfg, PRESETS["grpo"])
    assert all(r.advantage == (r.turn_advantages or (0.0,))[0] for g in made for r in g.rollouts)
    return [[r.turn_advantages for r in g.rollouts] for g in made]


def oracle(groups: list[Group], scale: str = "group") -> list[list[list[float]]]:
    """§4.1.3 of arXiv 2402.03300, literally: R is the set of all rewards of all turns; outcomes go to the last."""
    sets = []
    for g in groups:
        rewards = []
        for r in g.rollouts:
            talk, own = r.trajectory.conversation, []
            for t, reward in enumerate(talk.turn_rewards):
                last = t == len(talk.turn_rewards) - 1
                value = None if reward is None else WEIGHTS["Game"] * reward
                ends = [WEIGHTS["Game"] * x for x in [talk.outcome] if x is not None]
                ends += [WEIGHTS["judge"] * x for x in [r.scores["judge"]] if x is not None]
                ends += [-r.penalty] if r.penalty else []
                if last and r.reward is not None and ends:
                    value = (value or 0.0) + sum(ends)
                own.append(None if r.failed or r.reward is None else value)
            rewards.append(own)
        sets.append(rewards)
    everything = [x for rewards in sets for own in rewards for x in own if x is not None]
    found = []
    for rewards in sets:
        known = [x for own in rewards for x in own if x is not None]
        spread = everything if scale == "batch" else known
        deviation = np.std(spread, ddof=1) if len(spread) > 1 else 0.0
        divisor = 1.0 if scale == "none" else deviation + 1e-4
        varied = len(set(known)) > 1
        normal = [[(x - np.mean(known)) / divisor if varied and x is not None else 0.0 for x in o] for o in rewards]
        found.append([[sum(own[t:]) for t in range(len(own))] for own in normal])
    return found


def test_by_hand() -> None:
    """Rewards 1, 0 and 1, 2: μ is 1, σ is √(2/3); the first turn's advantage has the second's in it."""
    made = turns_of([group(row([0.5, 0.0]), row([0.5, 1.0]))])
    one = 1 / (math.sqrt(2 / 3) + 1e-4)
    assert made == [[pytest.approx((-one, -one), abs=1e-6), pytest.approx((one, one), abs=1e-6)]]
    assert turns_of([group(row([0.5, 0.0]), row([0.5, 1.0]))], "none") == [[(-1.0, -1.0), (1.0, 1.0)]]


def test_the_outcome_belongs_to_the_last_turn() -> None:
    """The judge's 3 · 0.5, and 2 · 0.25 of `get_reward`; the turn itself has 2 · 0.5."""
    rows = group(row([None, 0.5], outcome=0.25, judge=3.0), row([0.5], judge=None))
    assert turn_rewards([rows], WEIGHTS) == [[pytest.approx(math.nan, nan_ok=True), 3.0], [1.0]]


def test_a_penalty_is_taken_off_the_last_turn() -> None:
    """Of a completion that only its turns have scored, too; and of none that nothing scored."""
    rows = [replace(one, penalty=0.25) for one in (row([0.5, None]), row([None, 0.5]), row([None, None]))]
    nothing = pytest.approx(math.nan, nan_ok=True)
    assert turn_rewards([group(*rows)], WEIGHTS) == [[1.0, -0.25], [nothing, 0.75], [nothing, nothing]]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_against_the_paper(scale: str) -> None:
    draw = np.random.default_rng(0)

    def drawn(chance: float) -> float | None:
        return None if draw.random() < chance else round(float(draw.normal()), 3)

    groups = [
        group(*(row([drawn(0.3) for _ in range(draw.integers(1, 6))], drawn(0.5), drawn(0.3)) for _ in range(5)))
        for _ in range(4)
    ]
    rollouts = groups[0].rollouts
    failure = replace(rollouts[1].trajectory.conversation, failure=Failure("crash", "gone"))
    failed = replace(rollouts[1], failed=True, reward=None)
    failed = replace(failed, trajectory=replace(failed.trajectory, conversation=failure))
    punished = replace(rollouts[2], penalty=0.25)
    groups[0] = replace(groups[0], rollouts=(rollouts[0], failed, punished, *rollouts[3:]))
    for made, right in zip(turns_of(groups, scale), oracle(groups, scale), strict=True):
        for got, want in zip(made, right, strict=True):
            assert got == pytest.approx(want, abs=2e-5)
    assert set(turns_of(groups, scale)[0][1]) == {0.0}


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_with_one_turn_each_it_is_the_group_baseline_exactly(scale: str) -> None:
    draw = np.random.default_rng(1)
    groups = [
        group(*(row([None], float(draw.integers(0, 4)), float(draw.normal())) for _ in range(6))) for _ in range(3)
    ]
    groups[0] = group(*(row([None]) for _ in range(6)))  # nothing scored any
    groups[1] = group(*(row([None], 1.0) for _ in range(6)))
    rollouts = groups[2].rollouts
    groups[2] = replace(groups[2], rollouts=(replace(rollouts[0], penalty=0.5), *rollouts[1:]))
    plain = with_advantages(groups, WEIGHTS, AdvantageConfig(scale_rewards=scale), PRESETS["grpo"])
    assert turns_of(groups, scale) == [[(r.advantage,) for r in g.rollouts] for g in plain]


def test_without_rewards_of_turns_every_turn_has_the_completions_advantage() -> None:
    groups = [group(row([None] * 3, 1.0), row([None], 0.0), row([None] * 2, 0.5))]
    (plain,) = with_advantages(groups, WEIGHTS, AdvantageConfig(), PRESETS["grpo"])
    lengths = (3, 1, 2)
    assert turns_of(groups) == [[(r.advantage,) * n for r, n in zip(plain.rollouts, lengths, strict=True)]]


def test_a_weight_of_0_leaves_the_rewards_of_turns_out() -> None:
    rows = group(row([5.0, None], judge=1.0), row([None, 7.0], judge=0.0))
    metric = {"judge": 1.0, "Game": 0.0}
    nothing = pytest.approx(math.nan, nan_ok=True)
    assert turn_rewards([rows], metric) == [[nothing, 1.0], [nothing, 0.0]]


def test_equal_rewards_of_turns_teach_exactly_nothing() -> None:
    same = group(row([0.1, 0.1]), row([0.1, 0.1, 0.1]))
    assert turns_of([same]) == [[(0.0, 0.0), (0.0, 0.0, 0.0)]]
    assert not has_variance(same, WEIGHTS)


def test_a_last_turn_that_nothing_scored_has_no_reward() -> None:
    """Not a reward of 0: rows that all did the same would teach that their last turns were worse than the others."""
    same = group(row([0.5, None]), row([0.5, 0.5, None]))
    nothing = pytest.approx(math.nan, nan_ok=True)
    assert turn_rewards([same], WEIGHTS) == [[1.0, nothing], [1.0, 1.0, nothing]]
    assert turns_of([same]) == [[(0.0, 0.0), (0.0, 0.0, 0.0)]]
    assert not has_variance(same, WEIGHTS)


def test_who_never_got_a_reward_is_compared_with_who_did() -> None:
    """Where steps give rewards, a conversation without any has the sum 0 for a score."""
    lost = replace(row([None, None]), scores={"judge": None, "Game": 0.0})
    game = group(row([None, 0.5]), lost)
    assert turn_rewards([game], WEIGHTS)[1] == [pytest.approx(math.nan, nan_ok=True), 0.0]
    assert turns_of([game], "none") == [[(0.5, 0.5), (-0.5, -0.5)]]
    assert has_variance(game, WEIGHTS)


def test_a_group_teaches_whose_turns_differ_though_its_sums_do_not() -> None:
    swapped = group(row([1.0, 0.0]), row([0.0, 1.0]))
    assert not has_variance(swapped)
    assert has_variance(swapped, WEIGHTS)
    assert turns_of([swapped], "none") == [[(0.0, -1.0), (0.0, 1.0)]]


def test_rewards_of_more_turns_than_there_are_tell_of_themselves() -> None:
    odd = row([1.0, 0.0])
    talk = replace(odd.trajectory.conversation, turn_rewards=(1.0, 0.0, 1.0))
    odd = replace(odd, trajectory=replace(odd.trajectory, conversation=talk))
    with pytest.raises(ValueError, match="rewards for 3 turns, but its tokens are from 2"):
        turn_rewards([group(odd)], WEIGHTS)


def recipe(**sections: object) -> Recipe:
    own = {"model": {"name": "m"}, "data": {"source": "d"}, "optim": {"steps": 1}, "environment": {"use": "g.py:Game"}}
    return Recipe.model_validate(own | sections)


@pytest.mark.parametrize(
    ("sections", "baseline"),
    [
        ({"advantage": {"turns": "turn", "baseline": "leave_one_out"}}, "leave_one_out"),
        ({"advantage": {"turns": "turn"}, "loss": {"type": "reinforce++"}}, "batch"),
        ({"advantage": {"turns": "turn", "baseline": "maxrl"}}, "maxrl"),
    ],
)
def test_baselines_of_whole_completions_are_refused(sections: dict, baseline: str) -> None:
    with pytest.raises(ValidationError, match=f"needs advantage.baseline: group; {baseline} compares whole"):
        recipe(**sections)
    assert recipe(advantage={"turns": "turn"}, loss={"type": "dr_grpo"}).advantage.turns == "turn"


@pytest.mark.parametrize("name", get_args(PresetName))
def test_a_loss_whose_tokens_share_a_gradient_is_refused(name: PresetName) -> None:
    """Found out from the gradient, at advantages of 1 and -1: two turns of a token each."""
    loss = LossConfig(type=name)
    row = {key: mx.array([values]) for key, values in {"trained": [1.0, 1.0], "weights": [0.5, 0.5]}.items()}
    batch = Batch(
        mx.array([[1]]), mx.array([1]), mx.array([0]), mx.array([[1, 2]]), **row,
        advantages=mx.array([[1.0, -1.0]]), behaviour=mx.array([[-1.0, -1.0]]),
    )  # fmt: skip
    first, last = mx.grad(lambda current: policy_loss(current, batch, loss)[0])(mx.array([[-1.0, -1.0]])).tolist()[0]
    assert (first == last) is loss.preset.shares_gradient
    sections = {"advantage": {"turns": "turn", "baseline": "group"}, "loss": {"type": name}}
    if loss.preset.shares_gradient:
        with pytest.raises(ValidationError, match=rf"turn does nothing with loss\.type {name}: .*gspo_token"):
            recipe(**sections)
    else:
        assert recipe(**sections).advantage.turns == "turn"
