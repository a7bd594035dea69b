"""Steps on conversations: what they are worth, what is learnt of their turns, and what is told of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scoring.hosts import group, talk

from grpo.backend.ranks import Ranks
from grpo.config import LossConfig, Recipe
from grpo.objective.groups import with_rewards
from grpo.recipes import load_recipe, with_settings
from grpo.runs.prepare import prepare
from grpo.scoring.own import OwnTerms
from grpo.scoring.scorer import Scorer
from grpo.training.batches import learns
from grpo.training.metrics import step_metrics
from grpo.training.trainer import Trainer
from grpo.training.update import Update
from grpo.types import Conversation, Failure, Group, Task, Trajectory


class Playing:
    """An environment of two turns: the middle token is its own. It rewards even tokens, and fails for the last row."""

    def __init__(self, fails: bool = True) -> None:
        self.fails = fails

    async def rollout(self, task: Task, sampler) -> list[Trajectory]:
        rows = await sampler.sample(task.prompt_ids, sampler.n)
        return [self.played(row, self.fails and place == len(rows) - 1) for place, row in enumerate(rows)]

    def played(self, row: Trajectory, fails: bool) -> Trajectory:
        middle = len(row.token_ids) // 2
        trained = tuple(t != middle for t in range(len(row.token_ids)))
        parts = row.token_ids[:middle], row.token_ids[middle + 1 :]
        rewards = tuple(sum(token % 2 == 0 for token in part) / 8 for part in parts if part)
        failure = Failure("timeout", "no answer in 1 s") if fails else None
        said = ({"role": "assistant", "content": row.text},)
        conversation = Conversation("Game", (), said, rewards, 0.5, 2, 1, failure)
        reason = "failed" if fails else "done"
        return replace(row, trained=trained, finish_reason=reason, conversation=conversation)


def trainer_of(recipe, environment: Playing, *overrides: str, **sections) -> Trainer:
    trainer = prepare(load_recipe(recipe, list(overrides))).trainer
    trainer.cfg = with_settings(trainer.cfg, {"environment": {"use": "game.py:Game"}, **sections})
    trainer.engine.environment = environment
    trainer.scorer = Scorer(
        {"zero": lambda completions, **_: [0.0] * len(completions)}, environments={"Game": OwnTerms()}
    )
    trainer.scorer.has_tools = True
    return trainer


@pytest.mark.parametrize("turns", ["trajectory", "turn"])
def test_a_step_of_conversations(recipe, turns: str) -> None:
    trainer = trainer_of(recipe, Playing(), **{"advantage.turns": turns})
    metrics = trainer.step(1)
    values, rollouts = metrics.values, [r for g in metrics.groups for r in g.rollouts]
    told = {name: values[name] for name in values if name.startswith(("stop/", "tools/", "turns/", "environment/"))}
    assert {name: value for name, value in told.items() if value} == {
        "stop/done": 0.75,
        "stop/failed": 0.25,
        "tools/call_frequency": 2.0,
        "tools/failure_frequency": 0.5,
        "turns/mean": pytest.approx(sum(r.trajectory.turns for r in rollouts) / len(rollouts)),
        "environment/failures/timeout": 2.0,
    }
    assert (values["rewards/Game/timeout_rate"], values["rewards/Game/failures"]) == (0.25, 2.0)
    assert (values["rewards/Game/crash_rate"], values["rewards/Game/memory_rate"]) == (0.0, 0.0)
    assert [r.failed for r in rollouts] == [False, False, False, True] * 2
    assert [r.has_advantage for r in rollouts if r.failed] == [False, False]
    if turns == "turn":
        assert all(len(r.turn_advantages) == r.trajectory.turns for r in rollouts)
        assert any(len(set(r.turn_advantages)) > 1 for r in rollouts)
    else:
        assert all(r.turn_advantages is None for r in rollouts)
    assert values["grad_norm"] > 0
    assert all(r.reward == pytest.approx(r.trajectory.conversation.reward) for r in rollouts if not r.failed)


def test_steps_that_give_rewards_in_another_process_count_in_this_one(recipe, monkeypatch) -> None:
    """Or the same conversation would have the sum 0 in one, and no score in the other."""

    class Lost(Playing):
        def played(self, row: Trajectory, fails: bool) -> Trajectory:
            played = super().played(row, False)
            nothing = (None,) * played.turns
            return replace(played, conversation=replace(played.conversation, turn_rewards=nothing, outcome=None))

    for there, score in ((set(), None), ({"Game"}, 0.0)):
        monkeypatch.setattr(Ranks, "gather", lambda _, mine, there=there: [mine, *([there] * isinstance(mine, set))])
        metrics = trainer_of(recipe, Lost()).step(1)
        assert {r.scores["Game"] for g in metrics.groups for r in g.rollouts} == {score}


def test_turns_that_differ_teach_where_completions_do_not(recipe) -> None:
    """All conversations are worth the same, and dynamic sampling keeps them for their turns alone."""

    class Level(Playing):
        def played(self, row: Trajectory, fails: bool) -> Trajectory:
            played = super().played(row, False)
            turns = played.turns
            rewards = ((1.0, 0.0) if row.token_ids[0] % 2 else (0.0, 1.0)) if turns == 2 else (1.0,)
            return replace(played, conversation=replace(played.conversation, turn_rewards=rewards))

    plain = trainer_of(recipe, Level(), "rollout.dynamic_sampling=1").step(1)
    assert (plain.values["num_prompts"], plain.values["steps_without_signal"]) == (4, 1)
    taught = trainer_of(recipe, Level(), "rollout.dynamic_sampling=1", **{"advantage.turns": "turn"}).step(1)
    assert (taught.values["num_prompts"], taught.values["steps_without_signal"]) == (2, 0)
    assert taught.values["frac_reward_zero_std"] == 1


def test_a_conversation_is_replayed_with_the_advantages_of_its_turns(recipe) -> None:
    class Dull(Playing):
        def played(self, row: Trajectory, fails: bool) -> Trajectory:
            played = super().played(row, False)
            return replace(played, conversation=replace(played.conversation, turn_rewards=()))

    trainer = trainer_of(recipe, Playing(), "rollout.reuse=1", **{"advantage.turns": "turn"})
    first = trainer.step(1)
    trainer.engine.environment = Dull()
    second = trainer.step(2)
    assert [group.lag for group in second.groups] == [1, 1, 0, 0]
    assert second.values["grad_norm"] > 0
    advantages = [[r.turn_advantages for r in group.rollouts] for group in first.groups]
    assert [[r.turn_advantages for r in group.rollouts] for group in second.groups[:2]] == advantages[::-1]
    talks = [r.trajectory.conversation for group in first.groups[::-1] for r in group.rollouts]
    assert [r.trajectory.conversation for group in second.groups[:2] for r in group.rollouts] == talks
    assert second.values["environment/failures/timeout"] == first.values["environment/failures/timeout"]  # once


def told(*groups: Group, has_tools: bool = True) -> dict[str, float]:
    scored = with_rewards(Scorer({}, environments={"Game": OwnTerms()}).score(groups), {"Game": 1.0})
    return dict(step_metrics(1, scored, Update(0.0, 0.0, {}), {}, {"rollout": 1.0}, has_tools).values)


def test_what_is_told_of_conversations() -> None:
    """TRL's definitions: calls by all completions, failures by calls."""
    rows = [
        group(talk(calls=(3, 1), turns=3, ended="done"), talk(calls=(0, 0), ended="max_turns")),
        group(talk(calls=(1, 1), turns=2), talk(ended="length"), place=1),
    ]
    values = told(*rows)
    assert (values["tools/call_frequency"], values["tools/failure_frequency"]) == (1.0, 0.5)
    assert values["turns/mean"] == (3 + 1 + 2 + 1) / 4
    assert {n: v for n, v in values.items() if n[:5] == "stop/" and v} == {
        "stop/done": 0.25, "stop/max_turns": 0.25, "stop/stop": 0.25, "stop/length": 0.25,
    }  # fmt: skip
    assert values["completions/clipped_ratio"] == 0.25
    assert values["completions/max_terminated_length"] == 6  # of those that stopped or were done: 6 and 4 tokens
    assert values["completions/min_terminated_length"] == 4


def test_what_agents_measured_is_told_under_their_names() -> None:
    """The mean of the rollouts that told it."""
    rows = [
        group(talk(metrics={"moves": 3.0, "won": 1.0}), talk(metrics={"moves": 4.0})),
        group(talk(failed="crash"), talk(metrics={"moves": 8.0}, environment="Quiz"), place=1),
    ]
    values = told(*rows)
    assert {n: v for n, v in values.items() if n.startswith(("environment/Game", "environment/Quiz"))} == {
        "environment/Game/moves": 3.5, "environment/Game/won": 1.0, "environment/Quiz/moves": 8.0,
    }  # fmt: skip


def test_nothing_failed_where_nothing_was_called() -> None:
    values = told(group(talk(), talk()))
    assert (values["tools/call_frequency"], values["tools/failure_frequency"]) == (0.0, 0.0)
    assert not [name for name in told(group(talk(), talk()), has_tools=False) if name.startswith("tools/")]


def test_nothing_is_told_of_single_answers(recipe) -> None:
    values = prepare(load_recipe(recipe)).trainer.step(1).values
    assert not [name for name in values if name.startswith(("tools/", "stop/", "turns/", "environment/"))]
    assert not [name for name in values if name.endswith(("crash_rate", "memory_rate"))]


@pytest.mark.parametrize(
    ("ended", "masked"),
    [
        ("stop", False),
        ("done", False),
        ("length", True),
        ("max_turns", True),
        ("rollout_timeout", True),
        ("failed", True),
    ],
)
def test_what_a_limit_ended_is_masked(ended, masked: bool) -> None:
    rollout = replace(talk(ended=ended), advantage=1.0)
    assert learns(rollout, LossConfig(mask_truncated_completions=True)) is not masked
    assert learns(rollout, LossConfig())


def test_an_environment_alone_gives_rewards() -> None:
    """As the schema has it: no `rewards`, and the environment grades."""
    own = {"model": {"name": "m"}, "data": {"source": "d"}, "optim": {"steps": 1}, "environment": {"use": "g.py:G"}}
    assert Recipe.model_validate(own).rewards == ()
