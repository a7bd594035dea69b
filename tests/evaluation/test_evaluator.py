"""Evaluation: what is measured, on what, and how surely."""

from dataclasses import replace
from itertools import combinations

import pytest

from grpo.errors import RunError, UserError
from grpo.evaluation.evaluator import bootstrap_interval, interval, pass_at, wilson_interval
from grpo.evaluation.votes import final_answer, majority
from grpo.generation.engine import Engine
from grpo.recipes import load_recipe
from grpo.runs.prepare import prepare
from grpo.scoring.scorer import Scorer
from grpo.types import Failure, Trajectory


class Scripted:
    """An environment that answers by heart: `said` are the texts for each task, of which a group takes the first."""

    def __init__(self, *said: list[str]) -> None:
        self.said = said

    async def rollout(self, task, sampler):
        return [Trajectory.sampled((1,), None, text, "stop") for text in self.said[task.index][: sampler.n]]


def test_bootstrap_intervals() -> None:
    assert bootstrap_interval([1.0] * 50, seed=0) == (1.0, 1.0)
    low, high = bootstrap_interval([0.0, 1.0] * 200, seed=0)
    # the normal approximation: 0.5 ± 1.96 · 0.5 / √400
    assert low == pytest.approx(0.451, abs=0.01)
    assert high == pytest.approx(0.549, abs=0.01)
    assert bootstrap_interval([0.0, 1.0] * 200, seed=0) == (low, high)


def test_wilson_intervals_of_0_and_1() -> None:
    """By hand: n / (n + z²) is the lower bound of n of n, and 3 of 10 has (.1078, .6032) (Wilson 1927)."""
    z2 = 1.959963984540054**2
    assert interval([1.0] * 20, seed=0) == pytest.approx((20 / (20 + z2), 1.0))
    assert interval([0.0] * 5, seed=0) == pytest.approx((0.0, z2 / (5 + z2)))
    assert wilson_interval(3, 10) == pytest.approx((0.10779, 0.60322), abs=1e-5)
    assert interval([0.0] * 7 + [1.0] * 3, seed=0) == wilson_interval(3, 10)
    values = [0.0, 0.5, 1.0]
    assert interval(values, seed=0) == bootstrap_interval(values, seed=0) != wilson_interval(1.5, 3)
    assert all(type(end) is float for end in interval([1.0], seed=0))


def test_a_failed_grading_is_not_a_right_answer(recipe) -> None:
    """Of four samples one is right and the grader failed on three; on another prompt it does not apply to two."""
    recipe.write_text(recipe.read_text() + "eval: {split: train, prompts: 2, samples: 4}\n")
    prepared = prepare(load_recipe(recipe))
    trainer, evaluate = prepared.trainer, prepared.evaluator
    said = [["4", "3", "4", "4"], ["7", "7", "1", "1"]]
    scores = [[None, None, 1.0, None], [None, None, 1.0, 0.0]]
    failed = [[True, True, False, True], [False, False, False, False]]

    def score(groups, _scoring):
        return [
            replace(
                group,
                rollouts=tuple(
                    replace(
                        rollout,
                        scores={"digits": scores[g][i]},
                        failures={"digits": Failure("timeout", "slow")} if failed[g][i] else {},
                    )
                    for i, rollout in enumerate(group.rollouts)
                ),
            )
            for g, group in enumerate(groups)
        ]

    trainer.engine.environment, trainer.scorer.score = Scripted(*said), score
    metrics = evaluate(0)
    assert metrics.failed_gradings == 4  # the greedy one's, too
    assert metrics.values == {
        "greedy": 0.0,  # of one prompt: the grader does not apply to the other
        "avg@4": (0.25 + 0.5) / 2,
        "pass@2": (0.5 + 1.0) / 2,
        "pass@4": 1.0,
        "maj@4": (1.0 + 1.0) / 2,  # "4" was found right once; of "1", "1" the first is right
        "rewards/digits": (1.0 + 0.5) / 2,
    }
    failed[1] = failed[0] = [True] * 4
    scores[1] = scores[0] = [None] * 4
    with pytest.raises(RunError, match=r"'digits', scored no completion: of \d+ completions it failed on \d+"):
        evaluate(0)
    failed[1] = failed[0] = [False] * 4
    with pytest.raises(
        RunError, match=r"of \d+ completions it returned None for \d+\. .* put a reward first that scores the held-out"
    ):
        evaluate(0)


def test_evaluation_by_hand(recipe) -> None:
    """Two questions, of which a scripted model gets the first right in 3 of 4 samples and greedily."""
    text = recipe.read_text().replace("digits.py:reward", "right.py:reward")
    recipe.write_text(text + "eval: {split: train, prompts: 2, samples: 4}\n")
    (recipe.parent / "right.py").write_text(
        "def reward(completions, **columns):\n    return [1.0 if c == 'yes' else 0.5 for c in completions]\n"
    )
    evaluate = prepare(load_recipe(recipe)).evaluator
    asked = []

    rollout = evaluate.engine.rollout

    def noted(tasks, n, temperature, draws, logprobs, phase, *whole):
        asked.append((len(tasks), n, temperature, logprobs, phase))
        return rollout(tasks, n, temperature, draws, logprobs, phase, *whole)

    evaluate.engine.rollout = noted
    evaluate.engine.environment = Scripted(["yes", "no", "yes", "yes"], ["no"] * 4)
    metrics = evaluate(7)
    assert asked == [(2, 1, 0.0, False, "evaluation"), (2, 4, 1.0, False, "evaluation")]
    assert (metrics.step, metrics.n) == (7, 2)
    assert metrics.values == {
        "greedy": 0.5,
        "avg@4": 0.375,
        "pass@2": 0.5,  # of four with three right, any two hold a right one
        "pass@4": 0.5,
        "maj@4": 0.5,
        "rewards/right": (0.875 + 0.5) / 2,
    }
    assert list(metrics.values) == evaluate.names


def test_strict_and_lenient_matches_are_measured_by_prompt(recipe) -> None:
    text = recipe.read_text().replace("digits.py:reward", "math_answer")
    recipe.write_text(text + "eval: {split: train, prompts: 3, samples: 2}\n")
    prepared = prepare(load_recipe(recipe))
    trainer, evaluate = prepared.trainer, prepared.evaluator
    said = [["It is 2.", r"\boxed{2}"], [r"\boxed{4}", r"\boxed{4}"], ["6", "7"]]

    trainer.engine.environment = Scripted(*said)
    try:
        metrics = evaluate(1)
    finally:
        trainer.scorer.close()
    assert metrics.values["math_answer/lenient"] == metrics.values["avg@2"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert metrics.values["math_answer/strict"] == pytest.approx((0.5 + 1 + 0) / 3)
    low, high = metrics.intervals["math_answer/strict"]
    assert 0 <= low < 0.5 < high <= 1


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_evaluation_samples_at_the_recipes_temperature(recipe, monkeypatch, temperature: float) -> None:
    recipe.write_text(recipe.read_text() + "eval: {split: train, prompts: 1, samples: 2}\n")
    evaluate = prepare(load_recipe(recipe, [f"rollout.temperature={temperature}"])).evaluator
    used = []
    submit = Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda self, s: used.append(s.sampling.temperature) or submit(self, s))
    evaluate(0)
    assert used == [0.0, temperature]


def test_what_nothing_scored_is_not_wrong_in_an_evaluation(recipe) -> None:
    recipe.write_text(recipe.read_text() + "eval: {split: train, prompts: 4, samples: 2}\n")
    prepared = prepare(load_recipe(recipe))
    evaluate = prepared.evaluator
    evaluate.scorer = Scorer({"digits": lambda completions, **_: [1.0, None, None, None] * (len(completions) // 4)})
    evaluate.grader = "digits"
    metrics = evaluate(0)
    assert metrics.n == 1
    assert metrics.values["greedy"] == 1.0
    evaluate.scorer = Scorer({"digits": lambda completions, **_: [None] * len(completions)})
    with pytest.raises(RunError, match="'digits', scored no completion"):
        evaluate(0)


def test_pass_at_k_is_the_mean_over_all_choices_of_k() -> None:
    right = [True, False, False, True, False]
    for k in range(1, 6):
        chosen = [any(choice) for choice in combinations(right, k)]
        assert pass_at(k, 5, 2) == pytest.approx(sum(chosen) / len(chosen))
    assert (pass_at(4, 2, 1), pass_at(1, 4, 0), pass_at(2, 4, 4)) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} and", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed{ 1,200.0 }", "1200"),
        (r"\boxed{7", "7"),
        ("3+4=7 #### $7.", "7"),
        ("It is 3, then -4.50", "-4.5"),
        ("Paris.", "paris"),
        ("", ""),
    ],
)
def test_the_same_answer_is_the_same_vote(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_the_majority_is_the_most_common_and_of_equals_the_first() -> None:
    assert majority(["1", "2", "2", "1", "2"]) == 1
    assert majority(["3", "1", "1", "3"]) == 0


def test_an_unknown_metric_for_the_best_is_a_mistake(recipe) -> None:
    recipe.write_text(recipe.read_text() + "eval: {split: train}\n")
    with pytest.raises(UserError, match=r"'pass@3' is not measured; choose one of greedy, avg@4, pass@2, pass@4"):
        prepare(load_recipe(recipe, ["checkpoint.metric_for_best_model=pass@3"]))


def test_a_model_and_an_adapter_without_a_recipe(recipe, run_cli, toy_folder) -> None:
    assert run_cli("train", recipe, "adapter.rank=3").code == 0
    options = ["--data", "train.jsonl", "--prompt", "{question}", "--reward", "digits.py:reward", "--samples", "2"]
    lone = run_cli("eval", toy_folder, *options, "--prompts", 3, "rollout.max_completion_length=8")
    assert lone.code == 0, lone.err
    assert "by digits, n=3" in lone.out
    beside = run_cli("eval", toy_folder, *options, "--adapter", "runs/toy/checkpoints/step-000002")
    assert beside.code == 0, beside.err
    for said in ("base", "after step 2", "pass@2", "maj@2", "rewards/digits", "n=4"):
        assert said in beside.out
    of_run = run_cli("eval", "runs/toy", *options, "rollout.max_completion_length=256")
    assert of_run.out == beside.out  # the same adapter, prompts and draws
    for args, said in (
        (["eval", toy_folder], "add --data"),
        (["eval", "runs/toy"], "there is no evaluation data"),
        (["eval", toy_folder, *options, "--adapter", "."], "not an adapter of mlx-lm or PEFT"),
        (["eval", toy_folder, *options, "--checkpoint", "best"], "--checkpoint requires a run"),
        (["eval", "runs/toy", *options, "--checkpoint", "7"], "existing checkpoints: 2"),
    ):
        refused = run_cli(*args)
        assert (refused.code, len(refused.err.splitlines())) == (2, 1)
        assert said in refused.err


def test_a_reward_that_a_run_has_already_grades_with_its_own_settings(recipe, run_cli) -> None:
    """The named one comes first and the others stay; a stranger of the same name takes its place."""
    (recipe.parent / "short.py").write_text("def reward(completions, by=1, **_):\n    return [by] * len(completions)\n")
    mine = 'rewards: [{use: "digits.py:reward"}, {use: short.py, kwargs: {by: 3}}]'
    recipe.write_text(recipe.read_text().replace('rewards: [{use: "digits.py:reward"}]', mine))
    assert run_cli("train", recipe).code == 0
    options = ["--data", "train.jsonl", "--samples", "2", "--prompts", "2"]
    for use in ("short.py", "short.py:reward", "short"):
        ran = run_cli("eval", "runs/toy", *options, "--reward", use)
        assert ran.code == 0, ran.err
        assert "by short, n=2" in ran.out
        assert "rewards/digits" in ran.out
        assert "3.000  (3.000 to 3.000)" in ran.out
    (recipe.parent / "other").mkdir()
    (recipe.parent / "other/short.py").write_text("def reward(completions, **_):\n    return [5] * len(completions)\n")
    other = run_cli("eval", "runs/toy", *options, "--reward", "other/short.py")
    assert other.code == 0, other.err
    assert "5.000  (5.000 to 5.000)" in other.out


@pytest.mark.quick_cases("kind0")
@pytest.mark.parametrize("kind", [["type=dora", "layers=[1,2]"], ["type=full", "layers=[0,1]"], ["type=full"]])
def test_an_adapter_of_any_kind_is_measured_without_its_recipe(recipe, run_cli, toy_folder, kind: list[str]) -> None:
    ran = run_cli("train", recipe, "optim.learning_rate=0.05", *(f"adapter.{one}" for one in kind))
    assert ran.code == 0, ran.err
    options = ["--data", "train.jsonl", "--prompt", "{question}", "--reward", "digits.py:reward", "--samples", "2"]
    of_run = run_cli("eval", "runs/toy", *options, "--prompts", 2)
    alone = run_cli(
        "eval",
        toy_folder,
        *options,
        "--prompts",
        2,
        "--adapter",
        "runs/toy/checkpoints/step-000002",
        "rollout.max_completion_length=8",
    )
    assert alone.code == 0, alone.err
    assert alone.out == of_run.out
