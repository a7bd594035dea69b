"""A turn's own advantage reaches its tokens and no others, through batches, masks, minibatches and what is stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from training.holes import made
from training.sections import gauges, make_batches, make_minibatches, updater, with_top_entropy
from training.test_update import recipe

from grpo.config.log import CompletionsConfig
from grpo.runs.completions import read_completions, store_completions
from grpo.training.batches import learns
from grpo.types import Group, Rollout

TURNS = [[(1.0, -2.0), (0.5, 0.25), (3.0,)], [(-1.0,), (0.0, 0.0), (0.0, 4.0)]]
EXPECTED = [  # of the rows of `made`: ssttss, tsts, sss; sstttttt, tstss, stss
    [1, 1, 0, 0, -2, -2],
    [0, 0.5, 0, 0.25],
    [3, 3, 3],
    [-1, -1, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0],
    [0, 0, 4, 4],
]


def with_turns(groups: list[Group]) -> list[Group]:
    def own(rollout: Rollout, turns: tuple[float, ...]) -> Rollout:
        return replace(rollout, advantage=turns[0], turn_advantages=turns)

    return [
        replace(g, rollouts=tuple(own(r, t) for r, t in zip(g.rollouts, turns, strict=True)))
        for g, turns in zip(groups, TURNS, strict=True)
    ]


def test_each_token_has_the_advantage_of_its_turn(make_policy) -> None:
    groups = with_turns(made(make_policy().policy))
    found: dict[tuple[int, ...], list[float]] = {}
    for batches in make_minibatches(groups, recipe(loss={"type": "dapo"}, optim={"micro_batch_tokens": 20})):
        for batch in batches:
            for ids, advantages in zip(batch.token_ids.tolist(), batch.advantages.tolist(), strict=True):
                found[tuple(ids)] = advantages
    rows = [r.trajectory.token_ids for g in groups for r in g.rollouts]
    for place, (ids, expected) in enumerate(zip(rows, EXPECTED, strict=True)):
        held = [advantages for known, advantages in found.items() if known[: len(ids)] == ids]
        if place == 4:  # no advantage at all: the row is left out
            assert not held
        else:
            assert held[0][: len(ids)] == expected
            assert not any(held[0][len(ids) :])


def test_a_row_learns_if_any_of_its_turns_does(make_policy) -> None:
    cfg = recipe(loss={"type": "dapo"})
    groups = with_turns(made(make_policy().policy))
    assert [learns(r, cfg.loss) for g in groups for r in g.rollouts] == [True, True, True, True, False, True]
    left_out = gauges(make_policy().policy, cfg).entropy_left_out(groups)
    assert left_out.tokens == 3  # of tstss


def test_the_gradient_is_the_sum_of_those_of_the_turns(make_policy) -> None:
    """One turn's advantage at a time, the others 0: the loss is linear in advantages."""
    policy, cfg = make_policy().policy, recipe(loss={"type": "grpo"}, optim={"compile": False})
    update, groups = updater(policy, cfg), with_turns(made(policy))

    def gradient(of: list[Group]) -> dict[str, mx.array]:
        return update.gradient(make_batches(of, cfg)).arrays

    whole = gradient(groups)
    parts = []
    for turn in (0, 1):

        def alone(rollout: Rollout, turn: int = turn) -> Rollout:
            turns = tuple(a if t == turn else 0.0 for t, a in enumerate(rollout.turn_advantages))
            return replace(rollout, turn_advantages=turns)

        parts.append(gradient([replace(g, rollouts=tuple(map(alone, g.rollouts))) for g in groups]))
    for name, array in whole.items():
        assert mx.abs(array).max().item() > 1e-4
        assert mx.allclose(array, parts[0][name] + parts[1][name], atol=1e-6).item()


def test_equal_turns_are_one_advantage_to_the_bit(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe(loss={"type": "gspo"})
    plain = [
        replace(g, rollouts=tuple(replace(r, advantage=1.0 - i) for i, r in enumerate(g.rollouts)))
        for g in made(policy)
    ]
    split = [
        replace(
            g,
            rollouts=tuple(replace(r, turn_advantages=(r.advantage,) * r.trajectory.turns) for r in g.rollouts),
        )
        for g in plain
    ]
    for one, other in zip(make_batches(plain, cfg), make_batches(split, cfg), strict=True):
        assert all(mx.array_equal(a, other.arrays()[name]).item() for name, a in one.arrays().items())


def test_the_entropy_mask_leaves_the_advantages_of_turns_alone(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe(loss={"type": "dapo", "top_entropy_quantile": 0.5})
    minibatches = make_minibatches(with_turns(made(policy)), cfg)
    for before, after in zip(minibatches, with_top_entropy(minibatches, policy, cfg), strict=True):
        assert all(mx.array_equal(a.advantages, b.advantages).item() for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("learnt", [2, 1])
def test_the_advantages_of_turns_are_stored(make_policy, tmp_path: Path, learnt: int) -> None:
    groups = with_turns(made(make_policy().policy))
    path = store_completions(tmp_path, 1, groups, CompletionsConfig(), 0, learnt)
    _, (first, second) = read_completions(path)
    assert [r.turn_advantages for r in first.rollouts] == TURNS[0]
    assert [r.turn_advantages for r in second.rollouts] == (TURNS[1] if learnt == 2 else [None] * 3)
