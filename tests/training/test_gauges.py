"""Entropy of all tokens, and KL where no penalty tells it: what is measured beside the update."""

from dataclasses import replace

import mlx.core as mx
import pytest
from training.sections import gauges, make_minibatches, updater, with_advantages
from training.test_update import groups, recipe

from grpo.backend.ranks import Ranks
from grpo.config import Recipe
from grpo.errors import UserError
from grpo.generation.generator import Request
from grpo.generation.sampling import Sampling
from grpo.recipes import load_recipe
from grpo.runs.prepare import prepare
from grpo.scoring.scorer import Scorer
from grpo.training.batches import learns
from grpo.training.gauges import mean_kl, with_all_entropy
from grpo.training.update import Update
from grpo.types import BEHAVIOUR, SAMPLER, Group, Rollout, Task, Totals


def scored(policy, cfg: Recipe, truncated: bool = False) -> list:
    """The toy groups, the middle one uniform; with `truncated` the first completion of each is cut off."""
    made = groups(policy, uniform=True)
    if truncated:
        cut = [
            replace(g.rollouts[0], trajectory=replace(g.rollouts[0].trajectory, finish_reason="length")) for g in made
        ]
        made = [replace(g, rollouts=(first, *g.rollouts[1:])) for g, first in zip(made, cut, strict=True)]
    return with_advantages(made, cfg)


def cut(rollout: Rollout) -> Rollout:
    return replace(rollout, trajectory=replace(rollout.trajectory, finish_reason="length"))


def filtered(made: list) -> list:
    """The same groups as if filters had reshaped what was sampled: their logprobs do not tell entropy then."""
    return [replace(group, rollouts=tuple(map(reshaped, group.rollouts))) for group in made]


def reshaped(rollout: Rollout) -> Rollout:
    trajectory = rollout.trajectory
    columns = {**trajectory.columns, SAMPLER: tuple(0.0 for _ in trajectory.token_ids)}
    return replace(rollout, trajectory=replace(trajectory, columns=columns))


def by_hand(policy, made: list) -> tuple[float, int]:
    """The sum of all tokens' entropies, row by row, and the number of tokens."""
    total, tokens = 0.0, 0
    for group in made:
        for rollout in group.rollouts:
            prompt, ids = group.task.prompt_ids, rollout.trajectory.token_ids
            logits = policy.model(mx.array([[*prompt, *ids]]))[0, len(prompt) - 1 : -1].astype(mx.float32)
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            total += -(mx.exp(logprobs) * logprobs).sum().item()
            tokens += len(ids)
    return total, tokens


@pytest.mark.each_value
@pytest.mark.parametrize(
    "settings", [{}, {"mask_truncated_completions": True}, {"top_entropy_quantile": 0.5}, {"type": "bnpo"}]
)
@pytest.mark.parametrize("size", [40, 999])
def test_the_entropy_is_of_every_token_of_the_step(make_policy, settings: dict, size: int) -> None:
    policy = make_policy().policy
    cfg = recipe(loss=settings, optim={"micro_batch_tokens": size, "learning_rate": 1e-9, "num_iterations": 2})
    made = filtered(scored(policy, cfg, truncated=True))
    total, tokens = by_hand(policy, made)
    rest = gauges(policy, cfg).entropy_left_out(made)
    update = updater(policy, cfg)(make_minibatches(made, cfg), 1)
    whole = with_all_entropy(update, rest, Totals.of(made))
    assert whole.metrics["entropy"] == pytest.approx(total / tokens, rel=1e-5)
    if not settings:  # what the update saw is another number
        assert abs(update.metrics["entropy"] - total / tokens) > 1e-3
    assert whole.metrics | {"entropy": 0} == update.metrics | {"entropy": 0}


def test_without_filters_the_sampler_tells_the_entropy_of_rows_that_teach_nothing(make_policy, monkeypatch) -> None:
    policy, cfg = make_policy().policy, recipe()
    made = scored(policy, cfg)
    left = made[1].rollouts
    monkeypatch.setattr(policy, "group_logprobs", None)  # calling it would fail
    rest = gauges(policy, cfg).entropy_left_out(made)
    assert rest.total == pytest.approx(-sum(sum(rollout.trajectory.behaviour) for rollout in left))
    assert rest.tokens == sum(len(rollout.trajectory.token_ids) for rollout in left)


def test_what_the_sampler_tells_is_the_entropy_in_the_mean(make_policy) -> None:
    toy, cfg = make_policy(), recipe()
    (answers,) = toy.generator.generate([Request([5, 6, 7], 200)], Sampling(1.0, 8), mx.random.key(3))
    rollouts = tuple(Rollout(completion, {"r": 1.0}, advantage=0.0) for completion in answers)
    made = [Group(Task(0, "?", (5, 6, 7), {}), rollouts)]
    told = gauges(toy.policy, cfg).entropy_left_out(made)
    exact = gauges(toy.policy, cfg).entropy_left_out(filtered(made))
    assert told.tokens == exact.tokens
    assert told.total == pytest.approx(exact.total, rel=0.02)
    assert told.total != exact.total


def test_a_nan_of_the_sampler_does_not_tell_entropy(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe()
    made = scored(policy, cfg)
    trajectory = made[1].rollouts[0].trajectory
    odd = replace(trajectory, columns={BEHAVIOUR: (float("nan"),) * len(trajectory.token_ids)})
    one = replace(made[1], rollouts=(replace(made[1].rollouts[0], trajectory=odd), *made[1].rollouts[1:]))
    found = gauges(policy, cfg).entropy_left_out([made[0], one, made[2]])
    assert found.total == pytest.approx(by_hand(policy, [made[1]])[0], rel=1e-5)


def test_nothing_is_measured_where_the_update_sees_everything(make_policy, monkeypatch) -> None:
    policy, cfg = make_policy().policy, recipe(loss={"beta": 0.1})
    made = scored(policy, cfg)
    monkeypatch.setattr(policy, "group_logprobs", None)  # calling it would fail
    rest = gauges(policy, cfg).entropy_left_out(made)
    assert (rest.total, rest.tokens) == (0, 0)


def test_no_entropy_is_told_of_a_step_whose_updates_were_all_skipped(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe()
    made = scored(policy, cfg)
    rest = gauges(policy, cfg).entropy_left_out(made)
    skipped = Update(float("nan"), float("nan"), {}, skipped=1)
    assert with_all_entropy(skipped, rest, Totals.of(made)) == skipped


class Halves(Ranks):
    """One of two processes, of which the other has found the same sums for other rows."""

    def __init__(self, rank: int, others: dict) -> None:
        self.rank, self.size, self.others = rank, 2, others

    def gather(self, mine):
        self.others.setdefault(self.rank, []).append(mine)
        return [mine if rank == self.rank else self.others[rank][len(self.others[self.rank]) - 1] for rank in (0, 1)]


def test_processes_divide_the_passes_among_them(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe(optim={"micro_batch_tokens": 1}, log={"kl": 1})
    made = filtered(scored(policy, cfg))
    alone = gauges(policy, cfg).entropy_left_out(made), gauges(policy, cfg).divergences(made)
    left = sum(not learns(rollout, cfg.loss) for group in made for rollout in group.rollouts)
    said: dict = {1: [[[0.0]] * (left // 2), [[0.0]] * 6]}
    gauges(policy, cfg, first := Halves(0, said)).entropy_left_out(made)
    gauges(policy, cfg, first).divergences(made)
    said[1] = []
    second = Halves(1, said)
    together = gauges(policy, cfg, second).entropy_left_out(made), gauges(policy, cfg, second).divergences(made)
    assert together[0].total == pytest.approx(alone[0].total, rel=1e-5)
    assert 0.2 < sum(value for row in said[0][0] for value in row) / alone[0].total < 0.8
    assert together[0].tokens == alone[0].tokens
    assert together[1] == pytest.approx(alone[1], rel=1e-4, abs=1e-6)


def test_kl_is_measured_where_no_penalty_tells_it(make_policy) -> None:
    policy, base = make_policy().policy, make_policy(trained=False).policy
    cfg = recipe(log={"kl": 3})
    made, total, tokens = scored(policy, cfg), 0.0, 0
    for group in made:
        for rollout in group.rollouts:
            prompt, ids = group.task.prompt_ids, rollout.trajectory.token_ids
            reference, _ = base.logprobs(mx.array([[*prompt, *ids]]), mx.array([len(prompt)]), mx.array([ids]))
            d = reference[0] - mx.array(rollout.trajectory.behaviour)
            total, tokens = total + (mx.exp(d) - d - 1).sum().item(), tokens + len(ids)
    found = mean_kl(gauges(policy, cfg).divergences(made), Totals.of(made))
    assert found == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize(
    ("sections", "every", "reference"),
    [
        ({}, 10, True),
        ({"log": {"kl": 4}}, 4, True),
        ({"log": {"kl": None}}, None, False),
        ({"adapter": {"type": "full"}}, None, False),
        ({"adapter": {"type": "full"}, "log": {"kl": 4}}, 4, True),
        ({"loss": {"beta": 0.1}}, None, True),
        ({"loss": {"beta_end": 0.1}}, None, True),
    ],
)
def test_when_kl_is_measured_and_whether_that_needs_a_reference(sections: dict, every, reference: bool) -> None:
    cfg = recipe(**sections)
    assert (cfg.kl_every, cfg.needs_reference) == (every, reference)


def test_a_step_tells_both(recipe) -> None:
    """The reward makes the first group teach and the others not; weights are far from the base."""
    trainer = prepare(load_recipe(recipe, ["log.kl=2", "optim.learning_rate=0.05"])).trainer
    trainer.scorer = Scorer({"digits": lambda completions, **_: [1.0, 0.0, 1.0, 0.0, *[1.0] * (len(completions) - 4)]})
    first, second = trainer.step(1).values, trainer.step(2).values
    assert "kl" not in first
    assert second["kl"] > 1e-3
    policy, before = trainer.policy, trainer.policy.adapters.state()
    third = trainer.step(3)
    policy.adapters.load_state(before)
    total, tokens = by_hand(policy, list(third.groups[:1]))
    for rollout in (rollout for group in third.groups[1:] for rollout in group.rollouts):
        total, tokens = total - sum(rollout.trajectory.behaviour), tokens + len(rollout.trajectory.token_ids)
    assert third.values["entropy"] == pytest.approx(total / tokens, rel=1e-4)
    assert "kl" not in third.values


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_a_penalty_tells_kl_wherever_it_is(recipe, kl_in: str) -> None:
    settings = ["loss.beta=0.1", "optim.learning_rate=0.05", *([f"loss.kl_in={kl_in}"] if kl_in == "reward" else [])]
    trainer = prepare(load_recipe(recipe, settings)).trainer
    trainer.step(1)
    assert trainer.step(2).values["kl"] > 1e-3
    with pytest.raises(UserError, match=r"log\.kl does nothing with loss\.beta"):
        load_recipe(recipe, [*settings, "log.kl=2"])
