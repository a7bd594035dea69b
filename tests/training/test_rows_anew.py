"""Conversations that go on in new rows: their tokens, masks, advantages, weights and gradients, beside an oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from environments.conversing import Host, LastTwo, Numbers
from mlx.utils import tree_flatten
from training.sections import gauges, make_batches, updater, with_advantages
from training.test_conversations_in_a_step import STOPS, TASKS, answers, gaps, opens
from training.test_update import recipe

from grpo.config.log import CompletionsConfig
from grpo.environments.conversations import Conversations
from grpo.environments.play import Table
from grpo.environments.sampler import Sampler
from grpo.environments.seats import ConversationLimits
from grpo.generation import engine
from grpo.generation.sampling import Sampling
from grpo.model.adapters import REFERENCE
from grpo.objective.kl import kl_estimate
from grpo.rollout import RolloutEngine
from grpo.runs.completions import read_completions, store_completions
from grpo.tools.replay import _logprobs
from grpo.training.batches import batch_logprobs, collate
from grpo.training.packing import Shape
from grpo.types import Conversation, Group, Rollout, Task, Totals, Trajectory

NUMBERS = Numbers(ends=STOPS)


LAST_TWO = LastTwo(NUMBERS)


def sampled(toy, n: int = 3, slots: int = 2, logprobs: bool = True, **sampling) -> list[Group]:
    toy.generator.stop_ids, toy.generator.slots, toy.generator.kept_bytes = STOPS, slots, 5_000
    host = Host("messages", reset=opens, step=answers)
    table = Table(host, NUMBERS, ConversationLimits(max_turns=4), anew=LAST_TWO)
    engine = RolloutEngine(toy.generator, Sampling(1.0, 40, **sampling), Conversations({"": table}, 0, 64))
    groups = engine.rollout(TASKS, n, 1.0, mx.random.key(1), logprobs)
    assert sum(len(r.trajectory.begins) for g in groups for r in g.rollouts) >= 4
    return groups


def scored(groups: list[Group]) -> list[Group]:
    return [
        replace(g, rollouts=tuple(replace(r, scores={"r": i}, reward=float(i)) for i, r in enumerate(g.rollouts)))
        for g in groups
    ]


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("slots", [1, 4])
def test_the_update_computes_what_was_sampled_in_every_row(make_policy, shares: bool, slots: int) -> None:
    toy = make_policy()
    groups = sampled(toy, slots=slots)
    toy.policy.share_prompts = shares
    found = gaps(toy, groups)
    assert len(found) > 60
    assert max(found) < 1e-4


def test_what_is_drawn_does_not_depend_on_the_slots_nor_on_the_others(make_policy) -> None:
    toy = make_policy()
    one, other, fewer = sampled(toy, slots=1), sampled(toy, slots=6), sampled(toy, n=2)
    tokens = [[r.trajectory.token_ids for r in g.rollouts] for g in one]
    assert tokens == [[r.trajectory.token_ids for r in g.rollouts] for g in other]
    # `answers` depend on the place of the seat alone, so the first two rows are the same
    spoken = [[r.trajectory.of_trained(r.trajectory.token_ids) for r in g.rollouts[:2]] for g in one]
    assert spoken == [[r.trajectory.of_trained(r.trajectory.token_ids) for r in g.rollouts] for g in fewer]


def test_all_rows_say_what_they_were_drawn_from(make_policy) -> None:
    """`min_tokens` changes the first row's distribution alone; the rows after it are drawn from the policy's own."""
    groups = sampled(make_policy(), min_tokens=3)
    rows = [r.trajectory for g in groups for r in g.rollouts if r.trajectory.begins]
    for trajectory in rows:
        first, *later = trajectory.parts
        drawn = list(zip(first.of_trained(first.sampler), first.of_trained(first.behaviour), strict=True))
        assert all(sampler > behaviour for sampler, behaviour in drawn[:2])
        assert all(part.sampler == part.behaviour for part in later)


def test_no_row_draws_what_another_drew(make_policy, monkeypatch) -> None:
    keys: list[tuple[int, ...]] = []
    made = engine.derive_key
    monkeypatch.setattr(engine, "derive_key", lambda *path: keys.append(path) or made(*path))
    rows = sum(len(r.trajectory.parts) for g in sampled(make_policy()) for r in g.rollouts)
    assert len(set(keys)) == len(keys) == rows


def told(talk: Conversation) -> tuple[list[tuple[list[int], list[bool]]], int]:
    """The rows that a conversation must have, whole and with the mask, and the tokens that count to its limit."""
    rows, counted = [(NUMBERS.prompt_ids(talk.prompt), [])], 0
    last = max(place for place, one in enumerate(talk.messages) if one["role"] == "assistant")
    for place, one in enumerate(talk.messages[: last + 1]):
        ids, trained = rows[-1]
        trained += [False] * (len(ids) - len(trained))
        if one["role"] == "assistant":
            spoken = list(map(int, one["content"].split()))
            ids += spoken
            trained += [True] * len(spoken)
            counted += len(spoken)
            continue
        counted += len(suffix := NUMBERS.suffix_ids((), [one]))
        if one["role"] == "user":
            rows.append((LAST_TWO.prompt_ids(talk.prompt, talk.messages[: place + 1]), []))
        else:  # a tool's result stays in the row
            ids += suffix
    return rows, counted


def test_each_row_reads_what_the_template_writes(make_policy) -> None:
    """Of the conversation before, without what it drops; and the limit is of the whole conversation."""
    reasons, called = set(), 0
    for group in sampled(make_policy(), n=6):
        shared = group.task.prompt_ids
        for rollout in group.rollouts:
            row, talk = rollout.trajectory, rollout.trajectory.conversation
            rows, counted = told(talk)
            assert [([*shared, *part.token_ids], [False] * len(shared) + [*part.trained]) for part in row.parts] == rows
            assert row.turns == len(talk.turn_rewards)
            assert counted <= 40
            assert row.finish_reason == "length" if counted == 40 else row.finish_reason in ("length", "max_turns")
            reasons.add(row.finish_reason)
            called += talk.calls
    assert reasons == {"length", "max_turns"}
    assert called


def test_a_row_has_the_min_tokens_that_are_left(make_policy) -> None:
    for group in sampled(make_policy(), min_tokens=12):
        assert all(r.trajectory.trained_tokens >= 9 for r in group.rollouts)


MADE = [  # token ids, trained, where rows begin, turn advantages
    ((1, 2, 7, 8, 3, 9), (1, 1, 0, 0, 1, 0), (2,), (2.0, -1.0)),
    ((4, 5, 6), (1, 1, 1), (), (1.0,)),
]


def by_hand(turns: bool = False) -> list[Group]:
    """Two completions of one prompt; the first has two rows: `12` and `78 3 9`, of which 7, 8 and 9 are not trained."""
    rollouts = []
    for ids, trained, begins, advantages in MADE:
        row = Trajectory(
            ids, tuple(map(bool, trained)), {"behaviour": tuple(-i / 10 for i in ids)}, "", "stop", begins=begins
        )
        rollouts.append(
            Rollout(
                row,
                scores={"r": 1.0},
                reward=1.0,
                advantage=advantages[0],
                turn_advantages=advantages if turns else None,
            )
        )
    return [Group(Task(0, "", (50, 51), {}), tuple(rollouts))]


def weights_of(loss: str, turns: bool = False, tokens: int = 999) -> dict[tuple[int, ...], tuple[list, list]]:
    """By the tokens of a row: weights and advantages."""
    cfg, found = recipe(loss={"type": loss}, optim={"micro_batch_tokens": tokens}), {}
    for batch in make_batches(by_hand(turns), cfg):
        for ids, weights, advantages in zip(
            batch.token_ids.tolist(), batch.weights.tolist(), batch.advantages.tolist(), strict=True
        ):
            found[tuple(ids)[:4] if ids[0] == 7 else tuple(i for i in ids if i)] = (weights, advantages)
    return found


@pytest.mark.parametrize("tokens", [999, 1])
@pytest.mark.parametrize(
    ("loss", "one", "other"),
    [
        ("grpo", 1 / (2 * 3), 1 / (2 * 3)),  # 1 / (N × trained tokens of the completion), of both rows together
        ("dapo", 1 / 6, 1 / 6),  # 1 / trained tokens of the update
        ("luspo", 1 / 2, 1 / 2),  # 1 / N
    ],
)
def test_a_completion_counts_once_however_many_rows_it_has(loss: str, one: float, other: float, tokens: int) -> None:
    found = weights_of(loss, tokens=tokens)
    assert set(found) == {(1, 2), (7, 8, 3, 9), (4, 5, 6)}
    assert found[1, 2][0][:3] == pytest.approx([one, one, 0][: len(found[1, 2][0][:3])])
    assert found[7, 8, 3, 9][0][:4] == pytest.approx([0, 0, one, 0])
    assert found[4, 5, 6][0][:3] == pytest.approx([other] * 3)
    assert found[7, 8, 3, 9][1][:4] == [0, 0, 2, 0]


def test_the_advantages_are_those_of_the_rows_own_turns() -> None:
    found = weights_of("grpo", turns=True)
    assert found[1, 2][1][:2] == [2, 2]
    assert found[7, 8, 3, 9][1][:4] == [0, 0, -1, 0]
    assert found[4, 5, 6][1][:3] == [1, 1, 1]


def test_the_rows_of_a_completion_are_counted_as_one(make_policy) -> None:
    (group,) = by_hand()
    row = group.rollouts[0].trajectory
    assert (row.trained_tokens, row.turns, len(row.parts)) == (3, 2, 2)
    assert Totals.of([group]) == Totals(2, 6)
    assert [part.token_ids for part in row.parts] == [(1, 2), (7, 8, 3, 9)]
    assert row.parts[1].columns["behaviour"] == row.columns["behaviour"][2:]
    assert row.parts[0].parts == row.parts[:1]


def test_kl_and_logprobs_are_put_together_again_by_completions(make_policy) -> None:
    toy, cfg = make_policy(), recipe(loss={"type": "grpo", "beta": 0.1, "kl_in": "reward"})
    groups = sampled(toy)
    sums, of_replay = (
        gauges(toy.policy, cfg).divergences(groups),
        _logprobs(toy.policy, groups, gauges(toy.policy, cfg).packing),
    )
    rollouts = [(g.task, r) for g in groups for r in g.rollouts]
    assert len(sums) == len(of_replay) == len(rollouts)
    for total, logprobs, (task, rollout) in zip(sums, of_replay, rollouts, strict=True):
        assert logprobs == pytest.approx(rollout.trajectory.of_trained(rollout.trajectory.behaviour), abs=1e-4)
        expected = 0.0
        for part in rollout.trajectory.parts:
            with toy.policy.use(REFERENCE):
                batch = collate(
                    [(task, replace(rollout, trajectory=part))], Shape(1, len(task.prompt_ids), 1, len(part.token_ids))
                )
                estimate = kl_estimate(batch.behaviour, batch_logprobs(toy.policy, batch)[0], cfg.loss.kl_estimator)
            expected += (estimate * batch.trained).sum().item()
        assert total == pytest.approx(expected, abs=1e-3)


def test_the_gradient_is_that_of_its_rows_one_after_another(make_policy) -> None:
    """An oracle without batches, prompts that are shared, or weights: each row goes through the model alone."""
    toy = make_policy()
    cfg = recipe(loss={"type": "grpo"}, optim={"micro_batch_tokens": 64, "compile": False})
    groups = with_advantages(scored(sampled(toy)), cfg)
    found = updater(toy.policy, cfg).gradient(make_batches(groups, cfg)).arrays
    completions = [(g.task.prompt_ids, r) for g in groups for r in g.rollouts]
    model = toy.policy.model

    def loss(parameters) -> mx.array:
        model.update(parameters)
        total = mx.array(0.0)
        for prompt, rollout in completions:
            row = rollout.trajectory
            for start, end in zip((0, *row.begins), (*row.begins, len(row.token_ids)), strict=True):
                ids = [*prompt, *row.token_ids[start:end]]
                logits = model(mx.array([ids[:-1]]))[0, len(prompt) - 1 :]
                logprobs = (logits - mx.logsumexp(logits, axis=-1, keepdims=True))[
                    mx.arange(end - start), mx.array(ids[len(prompt) :])
                ]
                mine = mx.exp(logprobs - mx.stop_gradient(logprobs)) * mx.array(row.trained[start:end])
                total = total - rollout.advantage * mine.sum() / (len(completions) * sum(row.trained))
        return total

    gradient = dict(tree_flatten(mx.grad(loss)(model.trainable_parameters())))
    assert set(gradient) == set(found)
    assert max(mx.abs(array).max().item() for array in gradient.values()) > 1e-3
    for path, array in gradient.items():
        assert mx.allclose(found[path], array, atol=2e-6, rtol=1e-3), path


def test_another_target_of_what_is_read_again_changes_no_gradient(make_policy, monkeypatch) -> None:
    toy = make_policy()
    cfg = recipe(optim={"micro_batch_tokens": 9999})
    (batch,) = make_batches(with_advantages(scored(sampled(toy)), cfg), cfg)
    projected = toy.policy._projected

    def gradient(where: mx.array) -> dict[str, mx.array]:
        def changed(hidden, tokens, *rest):
            return projected(hidden, mx.where(where, (tokens + 1) % 200, tokens), *rest)

        monkeypatch.setattr(toy.policy, "_projected", changed)
        return updater(toy.policy, cfg).gradient([batch]).arrays

    expected, found = gradient(mx.zeros(batch.trained.shape, mx.bool_)), gradient(batch.trained == 0)
    assert max(mx.abs(array).max().item() for array in expected.values()) > 1e-3
    assert all(mx.array_equal(found[path], array) for path, array in expected.items())
    other = gradient(batch.trained == 1)
    assert not all(mx.array_equal(other[path], array) for path, array in expected.items())


def test_entropy_left_out_and_the_updates_tokens_are_all_there_are(make_policy) -> None:
    """With advantages of turns some rows of a completion learn and others do not: together they are every token."""
    toy, cfg = make_policy(), recipe(loss={"type": "grpo"})
    groups = [
        replace(
            g, rollouts=tuple(replace(r, turn_advantages=(1.0, *(0.0,) * (r.trajectory.turns - 1))) for r in g.rollouts)
        )
        for g in scored(sampled(toy))
    ]
    rest = gauges(toy.policy, cfg).entropy_left_out(groups)
    seen = sum(batch.trained.sum().item() for batch in make_batches(groups, cfg))
    assert rest.tokens > 0
    assert seen == sum(r.trajectory.parts[0].trained_tokens for g in groups for r in g.rollouts)
    assert seen + rest.tokens == Totals.of(groups).tokens


def test_what_is_stored_comes_back(make_policy, tmp_path: Path) -> None:
    groups = sampled(make_policy())
    _, again = read_completions(store_completions(tmp_path, 1, groups, CompletionsConfig(), 0, 2))
    for one, other in zip(groups, again, strict=True):
        for mine, theirs in zip(one.rollouts, other.rollouts, strict=True):
            assert theirs.trajectory.begins == mine.trajectory.begins
            assert theirs.trajectory.parts[-1].token_ids == mine.trajectory.parts[-1].token_ids


def test_an_evaluation_has_rows_without_logprobs(make_policy) -> None:
    assert all(not r.trajectory.columns for g in sampled(make_policy(), logprobs=False) for r in g.rollouts)


def test_keys_and_values_of_the_prompt_are_shared_with_the_new_rows(make_policy, monkeypatch) -> None:
    toy, prompts = make_policy(), []
    made = engine.SharedPrompt
    monkeypatch.setattr(engine, "SharedPrompt", lambda *given: prompts.append(given) or made(*given))
    sampled(toy)
    assert len(prompts) == len(TASKS)


def test_a_row_is_freed_when_the_next_has_begun(make_policy, monkeypatch) -> None:
    states, begin = [], Sampler.begin_anew

    def begun(sampler, row, *given):
        found = begin(sampler, row, *given)
        states.append((row.state, row.kept, found.state))
        return found

    monkeypatch.setattr(Sampler, "begin_anew", begun)
    sampled(make_policy())
    assert set(states) == {("released", None, "queued")}


def test_time_may_be_up_before_a_new_row_has_said_anything(make_policy, monkeypatch) -> None:
    """What it read again is there, and neither trained nor a turn."""
    turn = Sampler.turn
    monkeypatch.setattr(
        Sampler, "turn", lambda self, row, until: turn(self, row, 0.0 if row.stopping._begin > 8 else None)
    )
    groups, empty = sampled(make_policy()), 0
    for row in (rollout.trajectory for group in groups for rollout in group.rollouts):
        assert row.turns == len(row.conversation.turn_rewards)
        assert row.trained[-1] or row.finish_reason == "rollout_timeout"  # a token in flight may still have come
        empty += not any(row.parts[-1].trained)
    assert empty
    learning = make_batches(with_advantages(scored(groups), recipe()), recipe())
    assert all(any(row) for batch in learning for row in batch.trained.tolist())
