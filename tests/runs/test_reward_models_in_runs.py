"""Runs that a reward model grades: training, evaluation, the plan, and going on with the model of the beginning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub.server import Hub
from mlx.utils import tree_flatten
from model.classifiers import reward_model
from runs.driver import run, same_end

from grpo.config.rewardmodel import RewardModelConfig
from grpo.errors import TooLargeError, UserError
from grpo.model.classifier import new_classifier
from grpo.planning.elsewhere import Elsewhere
from grpo.planning.estimate import estimate, machine_of
from grpo.planning.graders import Graders
from grpo.planning.machines import CHIPS
from grpo.recipes import load_recipe
from grpo.runs.prepare import prepare

BESIDE = "rewards=[{use: 'model:judge', kwargs: {batch_tokens: 64}}, {use: 'digits.py:reward', weight: 0}]"


@pytest.fixture
def graded(recipe: Path, toy_folder: Path) -> Path:
    """The recipe, beside a reward model `judge`."""
    reward_model(recipe.parent / "judge", toy_folder)
    return recipe


def test_a_run_learns_from_it_evaluates_with_it_and_resumes_to_the_bit(graded: Path) -> None:
    """One of the questions has been asked for evaluation, too; scores of both are told under the model's name."""
    more = [BESIDE, "eval={split: train, every: 1, prompts: 2, samples: 2}", "checkpoint.every=1"]
    run(graded, "output_dir=whole", *more, "optim.steps=2")
    run(graded, "output_dir=parts", *more, "optim.steps=1")
    run(graded, "output_dir=parts", *more, "optim.steps=2", changed=True)
    same_end(Path("whole"), Path("parts"))
    steps = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert all(step["rewards/judge/mean"] == pytest.approx(step["reward"], abs=1e-6) for step in steps)
    assert all(step["reward_std"] > 0 and step["rewards/judge/failures"] == 0 for step in steps)
    assert "time/rewards/judge/p50" in steps[0]
    measured = [json.loads(line) for line in Path("whole/eval.jsonl").read_text().splitlines()]
    assert all("rewards/judge" in one for one in measured)


def test_its_weights_and_its_pass_are_in_the_plan(graded: Path) -> None:
    alone, beside = prepare(load_recipe(graded)), prepare(load_recipe(graded, [BESIDE]))
    (grader,) = beside.trainer.scorer.models.values()
    weights = sum(array.nbytes for _, array in tree_flatten(grader.classifier.model.parameters()))
    assert beside.plan.stays["reward models"] == weights
    assert "reward models" not in alone.plan.stays
    assert beside.plan.total >= alone.plan.total + weights
    assert beside.plan.phases["reward models' pass"] > 0
    told = "\n".join(beside.planner.report(beside.plan))
    assert "reward models' pass" in told
    assert "activations of one batch of completions (kwargs.batch_tokens)" in told
    for prepared in (alone, beside):
        prepared.opened.close()


def test_a_pass_that_does_not_fit_is_refused_with_what_helps(recipe: Path, toy_folder: Path) -> None:
    """Of 64 completions in one batch of a wide model, under a limit that all else has room in."""
    reward_model(recipe.parent / "judge", toy_folder, intermediate_size=20_000)
    cfg = ["rollout.num_generations=32", "memory.limit_gb=0.25"]
    with pytest.raises(TooLargeError, match=r"a pass of a reward model.*a smaller batch_tokens") as error:
        prepare(load_recipe(recipe, [*cfg, "rewards=[{use: 'model:judge', kwargs: {batch_tokens: 100000}}]"]))
    assert "reward models" in error.value.parts
    fitting = prepare(load_recipe(recipe, [*cfg, "rewards=[{use: 'model:judge', kwargs: {batch_tokens: 100}}]"]))
    assert fitting.plan.fits
    fitting.opened.close()


def test_other_machines_reckon_with_it(graded: Path, toy_folder: Path) -> None:
    model = f"model.name={toy_folder}"
    plain, beside = load_recipe(graded, [model]), load_recipe(graded, [model, BESIDE])
    config = json.loads((toy_folder / "config.json").read_text())
    there = [Elsewhere.of(cfg, config, machine_of(2**36, "cuda", cfg)) for cfg in (plain, beside)]
    stays = there[1].plan().stays
    (grader,) = there[1].graders.models
    own = json.loads((graded.parent / "judge/config.json").read_text())
    model_ = new_classifier(own)
    count = sum(array.size for _, array in tree_flatten(model_.parameters()))
    assert stays["reward models"] == 2 * count  # bfloat16, no head of a vocabulary
    assert grader.pair == 0  # fused there
    assert "reward models" not in there[0].plan().stays
    for chip in CHIPS:
        without, with_it = (estimate(chip, cfg, config) for cfg in (plain, beside))
        assert with_it.step > without.step
        assert with_it.run - without.run == pytest.approx(2 * (with_it.step - without.step))


def test_a_pass_is_reckoned_by_the_longest_and_by_how_many_go_together(graded: Path) -> None:
    prepared = prepare(load_recipe(graded, [BESIDE]))
    load = prepared.planner.load
    length = load.longest + load.rollout.max_completion_length
    model = new_classifier(json.loads((graded.parent / "judge/config.json").read_text()))

    def bytes_at(**settings: int) -> int:
        graders = Graders.of([(model, RewardModelConfig.model_validate(settings))], fused=True)
        return graders.phases(load)["reward models' pass"]

    one = bytes_at(batch_tokens=1)
    assert bytes_at(batch_tokens=3 * length) == pytest.approx(3 * one, rel=1e-3)
    assert bytes_at(batch_tokens=10**6) == pytest.approx(load.rows * one, rel=1e-3)
    assert bytes_at(batch_tokens=1, max_length=length // 2) == pytest.approx(one * (length // 2) / length, rel=1e-3)
    prepared.opened.close()


def test_commands_dry_run_try_it_and_score_again(graded: Path, run_cli) -> None:
    dry = run_cli("train", graded, BESIDE, "--dry-run")
    assert (dry.code, "reward models" in dry.out) == (0, True), dry.err
    cases = Path("cases.json")
    cases.write_text(json.dumps([{"completion": "2", "score": 99}]))
    tried = run_cli("rewards", "test", "model:judge", "--cases", cases, "--kwarg", "sigmoid=true")
    assert tried.code == 1
    assert "case 1 ('2'): expected 99, got " in tried.out
    assert "0 failures; latency" in tried.out
    assert run_cli("rewards", "test", "model:judge", "--kwarg", "sigmod=true").code == 2
    assert run_cli("train", graded, BESIDE, "optim.steps=1", "output_dir=done").code == 0
    scored = run_cli("rewards", "score", "done", "--reward", "model:judge")
    assert scored.code == 0, scored.err
    assert "0 of 8 completions get a different score; 0 failures" in scored.out
    late = run_cli("rewards", "score", "done", "--reward", "model:judge", "--timeout", "3")
    assert (late.code, late.err.count("timeout does nothing for a reward model")) == (2, 1), late.err


def test_a_recipe_says_where_a_mistake_is(graded: Path) -> None:
    with pytest.raises(UserError, match=r"toy.yaml|rewards.0"):
        load_recipe(graded, ["rewards=[{use: 'model:judge', kwargs: {batch_token: 3}}]"])
    cfg = load_recipe(graded, ["rewards=[{use: 'model:judge'}, {use: 'model:org/name', name: other}]"])
    assert [reward.use for reward in cfg.rewards] == [f"model:{graded.parent / 'judge'}", "model:org/name"]


def test_a_curriculum_needs_to_know_which_score_of_a_reward_model_is_solved(graded: Path) -> None:
    model = "rewards=[{use: 'model:judge', name: liked}, {use: length, weight: 0}]"
    with pytest.raises(UserError, match=r"data.curriculum: a solve rate is score / best, but the scores of model:"):
        load_recipe(graded, [model, "data.curriculum={}"])
    with pytest.raises(UserError, match="the scores of model:judge have no upper limit"):
        load_recipe(graded, [model, "data.curriculum={reward: liked}"])
    for curriculum in ("{best: 4}", "{reward: length}"):
        load_recipe(graded, [model, f"data.curriculum={curriculum}"])
    load_recipe(graded, [model.replace("name: liked", "kwargs: {sigmoid: true}"), "data.curriculum={}"])


@pytest.mark.slow
def test_a_run_keeps_to_the_commit_of_its_reward_model(hub: Hub, qwen3_folder: Path, tmp_path: Path) -> None:
    """Another model that is pushed meanwhile is not what a resumed run is graded by."""
    first = hub.add_model("org/judge", reward_model(tmp_path / "first", qwen3_folder))
    given = ["rewards=[{use: 'model:org/judge'}]", "rollout.prompts_per_step=2", "rollout.num_generations=2"]
    given += ["rollout.max_completion_length=4", "eval=null", "optim.warmup_steps=0", "log.wandb=null"]
    ran = hub.grpo("train", "qwen3-math", *given, "optim.steps=1")
    assert ran.returncode == 0, ran.stderr
    second = hub.add_model("org/judge", reward_model(tmp_path / "second", qwen3_folder, seed=1))
    hub.forget()
    hub.requests.clear()
    ran = hub.grpo("train", "qwen3-math", *given, "optim.steps=2", "--resume-changed")
    assert ran.returncode == 0, ran.stderr
    assert hub.asked(f"/org/judge/resolve/{first}/model.safetensors")
    assert not hub.asked(second)
