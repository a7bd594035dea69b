"""`builtin:guess` by its agent is trained as by its environment: the recipes are the same, and so are the runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_scripts import script

from grpo.config import Recipe
from grpo.plugins import bundled
from grpo.recipes import load_recipe

RECIPES = bundled("recipes") / "learning"


def test_its_recipe_is_that_of_the_environment_but_for_who_plays() -> None:
    agent = load_recipe(RECIPES / "guess-agent.yaml")
    environment = load_recipe(RECIPES / "guess.yaml")
    assert agent.environment.agent == str(RECIPES / "guess_agent.py:run")
    assert without_who_plays(agent) == without_who_plays(environment)


def test_the_benchmark_compares_them() -> None:
    with script("lessons") as lessons:
        comparison = lessons.COMPARISONS["agents"]
        recipe = RECIPES.parent / f"{comparison.recipe}.yaml"
        arms = comparison.arms(comparison, 0, Path())
        made = {arm.name: load_recipe(recipe, [*comparison.settings, *arm.settings]) for arm in arms}
    assert made["environment"].environment == load_recipe(RECIPES / "guess.yaml").environment
    assert made["agent"].environment == load_recipe(RECIPES / "guess-agent.yaml").environment
    assert without_who_plays(made["environment"]) == without_who_plays(made["agent"])


def without_who_plays(cfg: Recipe) -> dict[str, Any]:
    return cfg.model_dump(exclude={"environment", "output_dir"})


@pytest.mark.slow
def test_its_run_is_that_of_the_environment(run_cli: Any, cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """To the bit, in all that does not depend on what decoded beside what, and evaluations too."""
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    pytest.importorskip("openai")
    monkeypatch.setenv("GRPO_CACHE", str(cache))
    told = {}
    for name in ("guess", "guess-agent"):
        measured = ["eval.every=4", "eval.samples=2", "eval.prompts=16"]
        into = f"output_dir={tmp_path / name}"
        ran = run_cli("train", RECIPES / f"{name}.yaml", "optim.steps=4", *measured, into)
        assert ran.code == 0, ran.err
        told[name] = [lines(tmp_path / name / f"{file}.jsonl") for file in ("metrics", "eval")]
    (steps, evaluations), (by_agent, evaluated) = told["guess"], told["guess-agent"]
    assert [one["avg@2"] for one in evaluated] == [one["avg@2"] for one in evaluations]
    assert [one["greedy"] for one in evaluated] == [one["greedy"] for one in evaluations]
    same = ("reward", "reward_std", "loss", "grad_norm", "entropy", "completions/mean_length", "clip_ratio/region_mean")
    for ours, theirs in zip(steps, by_agent, strict=True):
        assert {name: theirs[name] for name in same} == {name: ours[name] for name in same}
        assert theirs["rewards/guess_agent/failures"] == 0


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
