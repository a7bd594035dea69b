"""Evaluation: what is measured, on what, and how surely."""

import pytest

from grpo.errors import RunError
from grpo.recipe import load_recipe
from grpo.training.evaluate import bootstrap_interval
from grpo.training.setup import prepare
from grpo.types import Completion


def test_bootstrap_intervals() -> None:
    assert bootstrap_interval([1.0] * 50, seed=0) == (1.0, 1.0)
    low, high = bootstrap_interval([0.0, 1.0] * 200, seed=0)
    # the normal approximation: 0.5 ± 1.96 · 0.5 / √400
    assert low == pytest.approx(0.451, abs=0.01)
    assert high == pytest.approx(0.549, abs=0.01)
    assert bootstrap_interval([0.0, 1.0] * 200, seed=0) == (low, high)


def test_evaluation_by_hand(recipe) -> None:
    """Two questions, of which a scripted model gets the first right in 3 of 4 samples and greedily."""
    text = recipe.read_text().replace("digits.py:reward", "right.py:reward")
    recipe.write_text(text + "eval: {split: train, prompts: 2, samples: 4}\n")
    (recipe.parent / "right.py").write_text(
        "def reward(completions, **columns):\n    return [1.0 if c == 'yes' else 0.5 for c in completions]\n"
    )
    evaluate = prepare(load_recipe(recipe)).trainer.evaluate
    asked = []

    def generate(requests, sampling, _key, logprobs):
        asked.append((len(requests), requests[0].n, sampling.temperature, logprobs))
        first = ["yes", "no", "yes", "yes"][: requests[0].n]
        return [[Completion((1,), None, text, "stop") for text in texts] for texts in (first, ["no"] * requests[0].n)]

    evaluate.engine.generator.generate = generate
    metrics = evaluate(7)
    assert asked == [(2, 1, 0.0, False), (2, 4, 1.0, False)]
    assert (metrics.step, metrics.n) == (7, 2)
    assert metrics.values == {"greedy": 0.5, "avg@4": 0.375, "pass@4": 0.5}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_evaluation_samples_at_the_recipes_temperature(recipe, temperature: float) -> None:
    recipe.write_text(recipe.read_text() + "eval: {split: train, prompts: 1, samples: 2}\n")
    trainer = prepare(load_recipe(recipe, [f"rollout.temperature={temperature}"])).trainer
    used = []
    generate = trainer.engine.generator.generate
    trainer.engine.generator.generate = lambda r, s, *rest: used.append(s.temperature) or generate(r, s, *rest)
    trainer.evaluate(0)
    assert used == [0.0, temperature]


def test_what_nothing_scored_is_not_wrong_in_an_evaluation(recipe) -> None:
    recipe.write_text(recipe.read_text() + "eval: {split: train, prompts: 4, samples: 2}\n")
    trainer = prepare(load_recipe(recipe)).trainer
    trainer.scorer.rewards = {"digits": lambda completions, **_: [1.0, None, None, None] * (len(completions) // 4)}
    trainer.evaluate.grader = "digits"
    metrics = trainer.evaluate(0)
    assert metrics.n == 1
    assert metrics.values["greedy"] == 1.0
    trainer.scorer.rewards = {"digits": lambda completions, **_: [None] * len(completions)}
    with pytest.raises(RunError, match="'digits', scored no completion"):
        trainer.evaluate(0)
