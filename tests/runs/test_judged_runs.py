"""Runs that the model itself judges: with LoRA, DoRA, whole weights and few bits; resumed to the bit; in the plan."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from runs.driver import run, same_end

from grpo.planning.elsewhere import Elsewhere
from grpo.planning.estimate import machine_of
from grpo.recipes import load_recipe
from grpo.runs.prepare import prepare

JUDGED = "rewards=[{use: judge, kwargs: {prompt: '{completion}?', labels: {'7': 1, '8': 0}}}]"
FAST = "optim.learning_rate=0.02"


def test_a_judged_run_resumes_to_the_bit_and_is_evaluated(recipe: Path) -> None:
    """The judge of the second step is the model of the start, also where it goes on from a checkpoint."""
    more = [JUDGED, FAST, "eval={split: train, every: 1, prompts: 2, samples: 2}", "checkpoint.every=1"]
    run(recipe, "output_dir=whole", *more, "optim.steps=2")
    run(recipe, "output_dir=parts", *more, "optim.steps=1")
    run(recipe, "output_dir=parts", *more, "optim.steps=2", changed=True)
    same_end(Path("whole"), Path("parts"))
    steps = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert all(step["reward_std"] > 0 and 0 < step["judge/label_mass"] < 1 for step in steps)
    assert all("rewards/judge" in json.loads(line) for line in Path("whole/eval.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("adapter", "bits"),
    [("{type: dora}", "4"), ("{type: full}", "null"), ("{rank: 4, sync_reference_every: 1}", "4")],
)
def test_the_judge_stays_what_it_was(recipe: Path, adapter: str, bits: str) -> None:
    """While the policy moves, and the reference after it."""
    more = ["loss.beta=0.1"] if "sync" in adapter else []
    prepared = prepare(load_recipe(recipe, [JUDGED, FAST, f"adapter={adapter}", f"model.quantize={bits}", *more]))
    trainer, tokens, last = prepared.trainer, mx.array([[5, 6, 7]]), mx.array([2])
    before = trainer.policy.next_logits(tokens, last)
    for n in (1, 2):
        assert trainer.step(n).values["updates_without_signal"] == 0
    assert mx.abs(trainer.policy.next_logits(tokens, last) - before).max() > 1e-3
    with trainer.policy.use("judge"):
        assert mx.allclose(trainer.policy.next_logits(tokens, last), before, atol=1e-5)
    prepared.opened.close()


def test_its_copy_and_its_pass_are_in_the_plan(recipe: Path, toy_folder: Path) -> None:
    alone, judged = (prepare(load_recipe(recipe, given)) for given in ([], [JUDGED]))
    trained = sum(array.nbytes for _, array in tree_flatten(alone.trainer.policy.model.trainable_parameters()))
    assert judged.plan.stays["other states"] == alone.plan.stays["other states"] + trained
    assert judged.plan.phases["reward models' pass"] > 0
    assert "reward models" not in judged.plan.stays  # it has no weights of its own
    cfgs = [load_recipe(recipe, given) for given in ([], [JUDGED])]
    config = json.loads((toy_folder / "config.json").read_text())
    there = [Elsewhere.of(cfg, config, machine_of(2**36, "cuda", cfg)) for cfg in cfgs]
    assert [one.states for one in there] == [1, 2]
    assert [len(one.graders.models) for one in there] == [0, 1]
    for prepared in (alone, judged):
        prepared.opened.close()


def test_two_judges_share_one_copy_and_a_dry_run_asks_them(recipe: Path, run_cli) -> None:
    second = (
        "{use: judge, name: style, weight: 0, kwargs: {prompt: 'Is {completion} {answer}?', labels: {'1': 1, '2': 0}}}"
    )
    both = JUDGED.removesuffix("]") + f", {second}]"
    prepared = prepare(load_recipe(recipe, [both]))
    assert prepared.trainer.policy.adapters.names == ["policy", "reference", "judge"]
    values = prepared.trainer.step(1).values
    assert values["rewards/judge/mean"] != values["rewards/style/mean"]
    prepared.opened.close()
    dry = run_cli("train", recipe, both, "--dry-run")
    assert dry.code == 0, dry.err
    wrong = run_cli("train", recipe, both.replace("{answer}", "{gold}"), "--dry-run")
    assert (wrong.code, "kwargs.prompt uses {gold}" in wrong.err) == (2, True), wrong.err
