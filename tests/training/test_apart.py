"""Sampling and training at the same time: a lag of one step, and what is learnt from completions that lag behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from objective.oracle import loss_and_gradient
from runs.driver import run, same_end
from training.apart import ONE_OF_EACH, emulated

from grpo.backend.ranks import Ranks
from grpo.config import RanksConfig
from grpo.errors import RunError, UserError
from grpo.planning.held import FORMER
from grpo.planning.planner import Planner
from grpo.recipes import load_recipe
from grpo.runs.completions import read_completions, stored_steps
from grpo.runs.prepare import prepare
from grpo.runs.processes import on_roles, one_plan
from grpo.scoring.own import OwnTerms
from grpo.scoring.scorer import Scorer
from grpo.tools.replay import replay
from grpo.training.ahead import Ahead, Sampled
from grpo.training.apart import ApartTrainer, Handed
from grpo.training.batches import forced
from grpo.training.roles import Roles
from grpo.types import Batch, Conversation, Group, Rollout, Task, Trajectory

MORE = (
    "optim.steps=4",
    "optim.learning_rate=0.02",
    "checkpoint.every=1",
    "checkpoint.keep=9",
    "rollout.speculate=off",
)
EVAL = "eval={split: train, every: 2, prompts: 2, samples: 2}"
VARIED = [0, 1, 1, 1, 0, 0, 1, 0]
"""The rewards of a step: of two groups of four."""


def alone(recipe: Path, *overrides: str) -> ApartTrainer:
    """A trainer of four steps, which samples and trains one after the other, and whose rewards always differ."""
    trainer = prepare(load_recipe(recipe, [*MORE, ONE_OF_EACH, *overrides]), alone=True).trainer
    assert isinstance(trainer, ApartTrainer)
    trainer.scorer = Scorer({"digits": lambda completions, **_: VARIED[: len(completions)]})
    return trainer


def stored(folder: Path) -> list[list[Group]]:
    return [read_completions(path)[1] for path in stored_steps(folder / "completions")]


def test_each_step_learns_from_the_policy_before_the_last_update(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated(monkeypatch, recipe, *MORE)
    rollouts = [[rollout for group in groups for rollout in group.rollouts] for groups in stored(Path("runs/toy"))]
    sampled_by = [{(one.trajectory.policy_step, one.lag) for one in step} for step in rollouts]
    assert sampled_by == [{(0, 0)}, {(0, 1)}, {(1, 1)}, {(2, 1)}]
    assert not any(one.replayed for step in rollouts for one in step)
    steps = [json.loads(line) for line in Path("runs/toy/metrics.jsonl").read_text().splitlines()]
    for name in ("mean", "max"):
        assert [step[f"policy_lag/{name}"] for step in steps] == [0, 1, 1, 1]
    assert not any("reuse/groups" in step for step in steps)
    assert all(0 <= step[f"ranks/{side}"] <= 1 for step in steps for side in ("sampling", "training"))


def test_completions_on_which_a_reward_breaks_are_stored_under_their_own_step(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samplers are one step ahead: the completions are of step 2, and the step that is not finished is step 1."""
    Path("digits.py").write_text(
        "def reward(completions, trainer_state, **_):\n    if trainer_state.global_step == 1:\n"
        "        raise ValueError('no')\n    return [len(c) / 9 for c in completions]\n"
    )
    with pytest.raises(RunError, match="ValueError: no"):
        emulated(monkeypatch, recipe, *MORE, "rewards.0.max_failure_rate=0")
    assert read_completions(Path("runs/toy/failed_step.parquet"))[0] == 2
    assert not Path("runs/toy/metrics.jsonl").exists()


def test_a_checkpoint_has_the_failures_of_all_samplers(recipe: Path) -> None:
    trainer = alone(recipe)

    class WithAnotherSampler(Ranks):
        def __init__(self) -> None:
            super().__init__()
            self.size = 2

        def gather(self, mine: Any) -> list[Any]:
            """The other sampler has had no tasks left, and three failures so far."""
            other = {"sampled": None, "metrics": None, "failed": {**trainer.scorer.counted(), "error/digits": 3.0}}
            return [mine, replace(mine, **other) if isinstance(mine, Handed) else mine]

    trainer.ranks = WithAnotherSampler()
    trainer.step(1)
    saved = trainer.counts()["scorer"]["records"]["digits"]
    assert (saved["failures"], saved["kinds"]) == (3, {"error": 3})


def test_tasks_come_in_the_order_of_a_run_without_lag(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the first two steps sample is the first policy's, whose tokens that run has in the first alone."""
    curriculum = "data.curriculum={}"
    emulated(monkeypatch, recipe, *MORE, curriculum, "output_dir=lagging")
    run(recipe, *MORE, curriculum, "output_dir=plain")
    lagging, plain = stored(Path("lagging")), stored(Path("plain"))
    assert [group.task for group in lagging[0]] == [group.task for group in plain[0]]
    tokens = [[r.trajectory.token_ids for group in step for r in group.rollouts] for step in (lagging[0], plain[0])]
    assert tokens[0] == tokens[1]
    trainer = alone(recipe)
    calls: list[str] = []
    take, observe = trainer.tasks.take, trainer.tasks.observe
    trainer.tasks.take = lambda n: calls.append("take") or take(n)
    trainer.tasks.observe = lambda groups: calls.append("observe") or observe(groups)
    for step in range(1, 5):
        trainer.step(step)
    assert calls == ["take", "observe"] * 4  # nothing is taken beyond the last step


def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("digits.py").write_text(
        "def reward(completions, log_extra=None, log_metric=None, **columns):\n"
        "    scores = [sum(c.isdigit() for c in text) / 8 for text in completions]\n"
        "    log_extra('length', [len(text) for text in completions])\n"
        "    log_metric('mine', sum(scores))\n"
        "    return scores\n"
    )
    emulated(monkeypatch, recipe, *MORE, EVAL, "output_dir=runs/whole")
    shutil.copytree("runs/whole", "runs/parts")
    for at in (1, 2, 3):
        checkpoint = Path(f"runs/parts/checkpoints/step-{at:06d}")
        assert (checkpoint / "groups_ahead.safetensors").exists()
        emulated(monkeypatch, recipe, *MORE, EVAL, "output_dir=runs/parts", checkpoint=checkpoint)
        same_end(Path("runs/whole"), Path("runs/parts"))
    assert not Path("runs/whole/checkpoints/step-000004/groups_ahead.safetensors").exists()


def test_a_run_may_go_on_by_other_processes_and_with_more_steps(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many steps more as one likes: of the first of these nothing was sampled ahead, so it does not lag."""
    emulated(monkeypatch, recipe, *MORE, "optim.steps=2")
    emulated(monkeypatch, recipe, *MORE, "ranks={sample: 2, train: 1}", resume=True, changed=True)
    assert [groups[0].lag for groups in stored(Path("runs/toy"))] == [0, 1, 0, 1]
    with pytest.raises(UserError, match=r"was written with another recipe(.|\n)*ranks: sample and train apart → null"):
        run(recipe, *MORE, resume=True)
    from_one = Path("runs/toy/checkpoints/step-000001")
    run(recipe, *MORE, "output_dir=runs/plain", checkpoint=from_one, changed=True)
    assert [groups[0].lag for groups in stored(Path("runs/plain"))] == [0, 0, 0]
    emulated(
        monkeypatch,
        recipe,
        *MORE,
        "output_dir=runs/apart",
        checkpoint=Path("runs/plain/checkpoints/step-000002"),
        changed=True,
    )
    assert [groups[0].lag for groups in stored(Path("runs/apart"))] == [0, 1]
    hotter = "rollout.temperature=1.1", "output_dir=runs/hotter"
    emulated(monkeypatch, recipe, *MORE, *hotter, checkpoint=from_one, changed=True)
    assert [groups[0].lag for groups in stored(Path("runs/hotter"))] == [0, 1, 1]  # what waited was drawn otherwise


@pytest.mark.quick_cases("loss.type=dppo", "loss.importance_sampling_correction=sequence_mask rollout.top_k=8")
@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("loss.type=gspo",),
        ("loss.type=dppo",),
        ("loss.importance_sampling_correction=token_truncate",),
        ("loss.importance_sampling_correction=sequence_mask", "rollout.top_k=8"),
        ("loss.type=rloo", "loss.importance_sampling_correction=token_truncate"),
    ],
    ids=" ".join,
)
def test_every_update_of_a_lagging_step_is_the_oracles(recipe: Path, settings: tuple[str, ...]) -> None:
    """Without a correction ratios are to the policy that sampled; with one they are to the policy before the step, and
    the weight is of that policy to the one that sampled."""
    twice = () if "loss.type=rloo" in settings else ("optim.num_iterations=2",)
    trainer = alone(recipe, *twice, *settings)
    trainer.step(1)
    made: list[Any] = []
    gradient = trainer.update.gradient

    def noted(batches: Sequence[Batch], key: mx.array | None = None) -> Any:
        current = [forced(trainer.policy, batch) for batch in batches]
        made.append((list(zip(batches, current, strict=True)), gradient(batches, key)))
        return made[-1][1]

    trainer.update.gradient = noted
    trainer.step(2)
    corrects = trainer.cfg.loss.importance_sampling_correction
    starts: dict[int, np.ndarray] = {}
    moved: list[float] = []
    for pairs, found in made:
        expected = 0.0
        for place, (batch, current) in enumerate(pairs):
            lp, behaviour = np.array(current, np.float64), np.array(batch.behaviour, np.float64)
            before = starts.setdefault(place, lp)
            trained = np.array(batch.trained)
            moved += np.abs((lp - behaviour)[trained > 0]).tolist()
            assert (batch.stale is None) == (corrects != "none")
            known = {"mask": trained, "weights": np.array(batch.weights, np.float64), "behaviour": behaviour}
            known |= {"advantages": np.array(batch.advantages)[:, 0]}
            known |= {"anchor": before if corrects != "none" else behaviour}
            known |= {} if batch.sampler is None else {"sampler": np.array(batch.sampler, np.float64)}
            chosen = {"importance_sampling_correction": corrects}
            expected += loss_and_gradient(trainer.cfg.loss.type, lp, known, chosen)[0]
        assert found.loss == pytest.approx(expected, abs=1e-6, rel=2e-6)
    assert len(made) == 1 + len(twice)
    assert max(moved) > 0.01


def test_the_gap_between_decoding_and_training_is_checked_where_nothing_lags(recipe: Path) -> None:
    trainer = alone(recipe, "loss.importance_sampling_correction=token_truncate", "optim.max_logp_difference=4")
    checked: list[int] = []
    check = trainer.gap.check
    trainer.gap.check = lambda step, metrics: checked.append(step) or check(step, metrics)
    steps = [trainer.step(n) for n in (1, 2, 3)]
    assert checked == [1]
    gaps = [step.values["sampling/sampling_logp_difference/mean"] for step in steps]
    assert gaps[0] < 1e-4 < 1e-2 < min(gaps[1:])  # the update before has moved the policy
    with pytest.raises(RunError, match="do not compute the same model"):
        trainer.gap.check(2, steps[1].values)


def test_what_waits_is_kept_with_all_that_rewards_have_logged(recipe: Path) -> None:
    trainer = alone(recipe)
    trainer.step(1)
    assert trainer.ahead is not None
    logged = [
        replace(group, rollouts=tuple(replace(one, logged={"length": float(place)}) for one in group.rollouts))
        for place, group in enumerate(trainer.ahead.groups)
    ]
    ahead = replace(trainer.ahead, groups=tuple(logged))
    assert Ahead.loaded(ahead.arrays(), json.loads(json.dumps(ahead.plain())), trainer.scorer) == ahead


def test_a_failed_step_leaves_what_waits_as_it_was(recipe: Path) -> None:
    trainer = alone(recipe)
    trainer.step(1)
    waits = trainer.ahead
    apply = trainer.update.apply

    def broken(*_: object) -> None:
        raise MemoryError

    trainer.update.apply = broken
    with pytest.raises(MemoryError), trainer.wholly():
        trainer.step(2)
    assert trainer.ahead is waits
    trainer.update.apply = apply


def test_a_process_without_moments_saves_nothing(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ApartTrainer, "whole", property(lambda self: self.roles.sampler is None))
    emulated(monkeypatch, recipe, *MORE)
    assert not list(Path("runs/toy/checkpoints").glob("*"))


def test_a_step_is_made_again_by_one_process(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated(monkeypatch, recipe, *MORE, "checkpoint.every=2")
    made = replay(Path("runs/toy"), 4)
    assert "its completions are those that the run stored" in made.notes
    assert {group.lag for group in made.metrics.groups} == {1}


class Several(Ranks):
    """One of several processes that are not there; what is summed is kept, and `given` is added to it."""

    def __init__(self, rank: int, size: int, given: Sequence[mx.array] = ()) -> None:
        super().__init__()
        self.rank, self.size, self._given, self.sent = rank, size, list(given), list[mx.array]()

    def sum(self, tree: Any) -> Any:
        self.sent += tree
        return [tree[0] + self._given.pop(0)] if self._given else tree


def role(rank: int, sample: int = 2, given: Sequence[mx.array] = ()) -> Roles:
    return Roles.of(Several(rank, sample + 1, given), RanksConfig(sample=sample, train=1))


def test_the_first_processes_train_and_the_others_share_the_prompts() -> None:
    trainer, first, second = map(role, range(3))
    assert [(one.trains, one.sampler, one.chief) for one in (trainer, first, second)] == [
        (True, None, True),
        (False, 0, False),
        (False, 1, False),
    ]
    assert (trainer.trainers, trainer.samplers, Roles.alone().trainers) == (1, 2, 1)
    assert [one.deal(3, 5, 9).begin for one in (trainer, first, second)] == [[], [0, 2, 4], [1, 3]]
    second.everyone.watch = object()
    dealt = second.deal(3, 5, 3)  # each has room for its whole share
    assert dealt.begin == [dealt.take(False), dealt.take(False)] == [1, 3]
    assert not dealt.goes_on
    dealt = second.deal(3, 5, 1)
    assert dealt.begin == [dealt.take(False)] == [1]
    assert dealt.goes_on  # by ticket
    assert (trainer.learners.size, trainer.learners.first, first.learners.first) == (1, True, False)


def test_arrays_reach_the_others_to_the_bit() -> None:
    """Also where a sum of numbers would change them: -0.0 and NaN."""
    odd = mx.array([-0.0, 1.5, float("nan"), -float("inf"), 1e-40])
    arrays = {"a": odd, "b": mx.array(-0.0), "c": odd[:3].astype(mx.bfloat16), "d": mx.full((2, 3), -0.0, mx.float16)}
    chief = role(0)
    gone = {path: array for part in chief.spread(arrays) for path, array in part.items()}
    sampler = role(1, given=chief.everyone.sent)
    own = {path: mx.ones_like(array) for path, array in arrays.items()}
    come = {path: array for part in sampler.spread(own) for path, array in part.items()}
    for found in (gone, come):
        for path, array in arrays.items():
            assert (found[path].dtype, found[path].shape) == (array.dtype, array.shape)
            assert found[path].reshape(-1).view(mx.uint8).tolist() == array.reshape(-1).view(mx.uint8).tolist()


def test_other_numbers_of_processes_are_refused_and_so_are_groups_that_cannot_be() -> None:
    with pytest.raises(
        UserError, match=r"sample: 2 and train: 1 need 3 processes, but this is a single process\. Start"
    ):
        Roles.of(Ranks(), RanksConfig(sample=2, train=1))
    with pytest.raises(UserError, match="need 3 processes, but 4 are running"):
        Roles.of(Several(0, 4), RanksConfig(sample=2, train=1))

    class Ring:
        def split(self, _color: int) -> None:
            raise RuntimeError("[ring] Group split not supported.")

    four = Several(0, 4)
    four.group = Ring()
    with pytest.raises(UserError, match=r"ranks.train: 2 .*\[ring\] Group split not supported.*Set ranks.train to 1"):
        Roles.of(four, RanksConfig(sample=2, train=2))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("model.shard=tensor",), "with model.shard several processes share one model"),
        (("rollout.dynamic_sampling=1",), "dynamic_sampling chooses prompts by the rewards"),
        (("rollout.reuse=1",), "completions are one step old"),
        (("teacher={adapter: saved}",), "on-policy distillation"),
        (("loss={beta: 0.1, kl_in: reward}",), "the KL of the policy that sampled"),
        (("loss.type=rloo",), "loss.type rloo has no ratio"),
        (("ranks.sample=0",), "ranks.sample"),
    ],
)
def test_what_does_not_go_with_a_lag_is_refused(recipe: Path, settings: tuple[str, ...], why: str) -> None:
    with pytest.raises(UserError, match=why):
        load_recipe(recipe, [ONE_OF_EACH, *settings])


def test_fewer_prompts_than_samplers_are_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "launched", lambda: Several(0, 4))
    with pytest.raises(UserError, match="prompts_per_step: 2 is too few for 3 processes"):
        prepare(load_recipe(recipe, ["ranks={sample: 3, train: 1}"]))


def test_a_process_that_samples_is_planned_without_an_update(recipe: Path) -> None:
    prepared = prepare(load_recipe(recipe))
    both = prepared.planner
    load = replace(both.load, updates=False)
    plan, optim = Planner(load, both.policy, both.decoding).plan()
    assert set(plan.phases) == {"rollout"}
    assert plan.stays["optimizer"] == plan.stays[FORMER] == 0
    assert plan.total < prepared.plan.total
    assert set(prepared.plan.phases) == {"rollout", "update", "optimizer's step"}
    small = replace(plan, micro_batch=1)
    gathered = Several(0, 3)
    gathered.gather = lambda mine: [mine, (small, optim), (small, optim)]
    least, _, _ = one_plan(gathered, both.policy, prepared.plan, optim, trainers=1)
    assert least.micro_batch == prepared.plan.micro_batch  # samplers make none
    assert on_roles(role(0), [3 * 2**20, 2**20, 2 * 2**20]) == [
        "ranks: process 0 trains and takes about 3 MB; processes 1 to 2 sample, about 2 MB each. A step learns from "
        "completions of the policy before its last update"
    ]
    assert on_roles(None, []) == on_roles(Roles.alone(), [1]) == []


def test_scores_do_not_depend_on_which_sampler_saw_a_step_rewarded() -> None:
    """Which environments reward steps, a sampler knows by its own conversations; what others have none of is 0 then."""

    def talk(name: str, turn_rewards: tuple[float | None, ...], scores: dict[str, float | None]) -> Rollout:
        trajectory = replace(
            Trajectory.sampled((5,), (-0.5,), "4", "max_turns"),
            conversation=Conversation(name, (), (), turn_rewards),
        )
        return Rollout(trajectory, scores)

    rewarded = talk("room", (0.5, None), {"room": 0.5, "hall": None})
    cut = talk("room", (None,), {"room": None, "hall": None})
    never_played = talk("room", (), {"room": None, "hall": None})
    other = talk("hall", (None,), {"room": None, "hall": None})
    scorer = Scorer({}, environments={"room": OwnTerms(), "hall": OwnTerms()})
    task = Task(0, "?", (1,), {})
    shares = (Group(task, (never_played, other)), 1), (Group(task, (rewarded, cut)), 0)
    parts = [Sampled([group], [number], {}, {}, {}, {"rollout": 1.0}) for group, number in shares]
    first, second = Ahead.of(parts, scorer).groups
    assert [one.scores["room"] for one in first.rollouts] == [0.5, 0.0]
    assert [one.scores for one in second.rollouts] == [never_played.scores, other.scores]
    assert scorer.state()["by_steps"] == ["room"]
