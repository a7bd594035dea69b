"""A run that has trained nothing, or made the model worse, says so after its last step, and by its exit code."""

import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import mlx.core as mx
import pytest
from runs.driver import run

from grpo.alarms.past import PastSteps
from grpo.config import CurriculumConfig, Recipe
from grpo.evaluation.evaluator import interval
from grpo.recipes import with_settings
from grpo.runs.checkpoint import load_checkpoint, newest_whole
from grpo.runs.health import lowest_mean, made_worse, trained_on_nothing
from grpo.runs.state import Best, RunState
from grpo.telemetry.recorded import read_run
from grpo.training.state import TrainerState
from grpo.types import EvalMetrics, Group, Rollout, Task, Trajectory

CONSTANT = "def reward(completions, **_):\n    return [1.0 for _ in completions]\n"


WEIGHTS = {"exact": 1.0}
CUT = "loss.mask_truncated_completions=true"


def config() -> Recipe:
    return Recipe.model_validate(
        {"model": {"name": "m"}, "data": {"source": "d"}, "rewards": ({"use": "exact"},), "optim": {"steps": 9}}
    )


@pytest.mark.parametrize(
    ("step", "updates", "silent", "rewarded", "said"),
    [
        (0, 0, 0, False, None),
        (3, 1, 2, True, None),
        (3, 0, 3, True, "nothing was trained in 3 steps: the rewards did not differ within any group"),
        (1, 0, 1, True, "nothing was trained in 1 step: the rewards did not"),
        (3, 0, 2, True, "nothing was trained in 3 steps: every update was skipped because it was not finite"),
        (3, 0, 3, False, "nothing was trained in 3 steps: no completion got a reward: exact returned None for each"),
    ],
)
def test_a_run_trained_on_nothing_if_no_update_was_applied(step, updates, silent, rewarded, said) -> None:
    arrays = {"optimizer": {"step": mx.array(updates, mx.uint64)}}
    state = RunState("id", TrainerState(arrays, {"steps_without_signal": silent}), step=step, rewarded=rewarded)
    found = trained_on_nothing(state, config().loss, WEIGHTS)
    assert found is None if said is None else found.startswith(said)


def test_what_was_truncated_is_raised_before_more_is_sampled() -> None:
    arrays = {"optimizer": {"step": mx.array(0, mx.uint64)}}
    past = PastSteps(told=("truncation",))
    state = RunState("id", TrainerState(arrays, {"steps_without_signal": 3}), step=3, rewarded=True, past=past)
    said = str(trained_on_nothing(state, config().loss, WEIGHTS))
    assert "most completions were truncated at rollout.max_completion_length. Raise the limit" in said
    assert "temperature" not in said


def test_a_reward_that_has_failed_is_told_from_one_that_does_not_apply() -> None:
    arrays = {"optimizer": {"step": mx.array(0, mx.uint64)}}
    for failures, said in ((0, "exact returned None"), (1, "exact failed or returned None")):
        scorer = {"records": {"exact": {"failures": failures}}}
        counts = {"steps_without_signal": 3, "scorer": scorer}
        state = RunState("id", TrainerState(arrays, counts), step=3)
        assert f"no completion got a reward: {said}" in str(trained_on_nothing(state, config().loss, WEIGHTS))


def test_of_environments_it_is_said_that_no_conversation_was_rewarded() -> None:
    state = RunState("id", TrainerState({"optimizer": {"step": mx.array(0)}}, {"steps_without_signal": 3}), step=3)
    said = str(trained_on_nothing(state, config().loss, {"Game": 1.0}, ["Game"]))
    assert "no completion got a reward: Game rewarded no conversation" in said
    assert "returned None" not in said


def test_a_run_that_trained_on_nothing_ends_so(recipe, run_cli) -> None:
    Path("digits.py").write_text(CONSTANT)
    ran = run_cli("train", recipe, "optim.num_iterations=2")
    assert ran.code == 1
    assert "grpo: nothing was trained in 2 steps: the rewards did not differ within any group" in ran.err
    assert "finished, untrained, after step 2" in ran.out
    assert "try it" not in ran.out
    assert "adapter  " not in ran.out
    assert read_run(Path("runs/toy")).state == "untrained"
    again = run_cli("train", recipe, "optim.num_iterations=2", "--resume")  # nothing is left to do, or has changed
    assert (again.code, read_run(Path("runs/toy")).state) == (1, "untrained")


def test_a_reward_that_never_applies_gets_advice_of_its_own(recipe, run_cli) -> None:
    """In training: it scores what is held out."""
    Path("digits.py").write_text(
        "def reward(completions, prompts, **_):\n"
        "    return [1.0 if prompt == 'apart' else None for prompt in prompts]\n"
    )
    Path("test.jsonl").write_text('{"question": "apart", "answer": "1"}\n')
    recipe.write_text(recipe.read_text() + "eval: {source: test.jsonl, split: train, samples: 1}\n")
    ran = run_cli("train", recipe)
    said = "nothing was trained in 2 steps: no completion got a reward: digits returned None for each"
    assert (ran.code, said in ran.err, "differ" in ran.err) == (1, True, False), ran.err
    checkpoint, _ = newest_whole(Path("runs/toy/checkpoints"))
    assert load_checkpoint(checkpoint)[0].rewarded is False
    Path("digits.py").write_text(CONSTANT)
    assert (
        "the rewards did not differ within any group"
        in run_cli("train", recipe, "--resume-changed", "optim.steps=3").err
    )


def test_so_does_one_whose_completions_were_all_left_out(recipe, run_cli) -> None:
    """Their rewards differ; none of them ended by itself."""
    Path("digits.py").write_text("def reward(completions, **_):\n    return list(range(len(completions)))\n")
    ran = run_cli("train", recipe, "optim.steps=1", "rollout.max_completion_length=1", CUT)
    assert (ran.code, "or loss.mask_truncated_completions masked the completions" in ran.err) == (1, True), ran.err


def test_so_does_one_whose_updates_were_all_skipped(recipe, run_cli) -> None:
    Path("odd.py").write_text("def odd(logprobs, batch, cfg):\n    return logprobs / 0\n")
    ran = run_cli("train", recipe, "loss.use=odd.py:odd")
    assert (ran.code, "every update was skipped because it was not finite" in ran.err) == (1, True), ran.err
    assert list(Path("runs/toy/not_finite").iterdir())


def test_the_first_step_warns_once(recipe, caplog) -> None:
    Path("digits.py").write_text(CONSTANT)
    run(recipe)
    warned = [message for message in caplog.messages if message.startswith("step 1: ")]
    assert ["no group has different rewards" in line for line in warned].count(True) == 1
    caplog.clear()
    run(recipe, "optim.steps=3", changed=True)
    assert not [message for message in caplog.messages if message.startswith("step ")]


def evaluation(
    step: int, values: list[float], name: str = "avg@4", failed: int = 0, grader: str = "exact"
) -> EvalMetrics:
    return EvalMetrics(step, len(values), grader, {name: fmean(values)}, {name: interval(values, 0)}, failed)


def evaluated(name: str = "avg@4", **settings) -> Recipe:
    eval_, named = {"split": "test", "samples": 4}, {"metric_for_best_model": name}
    return Recipe.model_validate(
        {**config().model_dump(exclude_unset=True), "eval": eval_, "checkpoint": named, **settings}
    )


def verdict(before: EvalMetrics | None, after: EvalMetrics | None, cfg: Recipe, best: Best | None = None) -> str | None:
    return made_worse(RunState("id", TrainerState({}, {}), step=9, before=before, after=after, best=best), cfg)


NOISY = (0.40, 0.46, 0.43, 0.41, 0.44)


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        (
            (*NOISY, 0.0, 0.0, 0.0, 0.0, 0.0),
            "fell from 0.428 ± 0.030 (95 %) in the first 5 steps to 0.000 ± 0.000 (95 %) in the last 5",
        ),
        ((*NOISY, *NOISY), None),
        ((*NOISY, *(value - 0.05 for value in NOISY)), None),  # the intervals overlap
        ((*NOISY, *(value - 0.07 for value in NOISY)), "fell from 0.428 ± 0.030"),
        ((*NOISY, *(value + 0.3 for value in NOISY)), None),
        ((*NOISY, 0.0, 0.0, 0.0, 0.0), None),  # too few steps
        ((*NOISY, *NOISY, *[0.0] * 39, 0.4), "to 0.040 ± "),
    ],
)
def test_a_reward_that_fell_is_told_of_a_run_without_evaluations(rewards, said) -> None:
    found = made_worse(RunState("id", TrainerState({}, {}), step=len(rewards), rewards=rewards), config())
    assert found is None if said is None else said in found and "Try a lower optim.learning_rate than 1e-05" in found


def test_a_model_that_breaks_at_once_is_measured_by_its_first_step() -> None:
    rewards = (0.43, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    state = RunState("id", TrainerState({}, {}), step=10, rewards=rewards)
    assert made_worse(state, config()) is None
    said = made_worse(replace(state, start=0.1), config())
    assert "fell from 0.430 (at least 0.100) in the first step to 0.000 ± 0.000 (95 %) in the last 5" in said
    assert made_worse(replace(state, start=0.0), config()) is None


def test_the_first_steps_lower_end_by_hand() -> None:
    """Group means 0 and 1 in turn: sd √(8/7 / 4), so 3.5 × 0.5345 / √8 below 0.5."""

    def group(reward: float | None) -> Group:
        rollout = Rollout(Trajectory.sampled((1,), None, "a", "stop"), reward=reward)
        return Group(Task(0, "q", (1,), {}), (rollout, rollout))

    groups = [group(float(place % 2)) for place in range(8)]
    assert lowest_mean([*groups, group(None)]) == pytest.approx(0.5 - 3.5 * (8 / 28) ** 0.5 / 8**0.5)
    assert lowest_mean(groups[:4]) is None


def test_where_a_lower_reward_says_nothing() -> None:
    """Rows that come in their own order may get harder, and a curriculum draws what is solved less and less; with
    evaluations, these are what counts."""
    state = RunState("id", TrainerState({}, {}), step=10, rewards=(*NOISY, 0.0, 0.0, 0.0, 0.0, 0.0))
    ordered = with_settings(config(), {"data.shuffle": False})
    pooled = with_settings(config(), {"data.curriculum": CurriculumConfig()})
    own = with_settings(config(), {"data.sampler": "mine.py:Mine"})
    said = [made_worse(state, cfg) is None for cfg in (config(), ordered, pooled, own, evaluated())]
    assert said == [False, True, True, True, True]


def test_noise_alone_is_hardly_ever_a_fall() -> None:
    rng = random.Random(0)
    for steps, most in ((10, 12), (60, 6)):
        states = (
            RunState("id", TrainerState({}, {}), rewards=tuple(rng.gauss(0.5, 0.1) for _ in range(steps)))
            for _ in range(2000)
        )
        assert sum(made_worse(state, config()) is not None for state in states) <= most


def test_a_run_without_evaluations_says_that_its_reward_fell(recipe, run_cli) -> None:
    """The reward falls after step 5; the rewards of before a resume count, too."""
    Path("digits.py").write_text(
        "def reward(completions, trainer_state, **_):\n"
        "    score = 2.0 if trainer_state.global_step < 5 else 1.0\n"
        "    return [score * (place % 2) for place in range(len(completions))]\n"
    )
    assert run_cli("train", recipe, "optim.steps=6").code == 0
    ran = run_cli("train", recipe, "optim.steps=10", "--resume-changed")
    assert (ran.code, read_run(Path("runs/toy")).state) == (0, "worse"), ran.err
    assert (
        "the mean reward fell from 1.000 ± 0.000 (95 %) in the first 5 steps to 0.500 ± 0.000 (95 %) in the last 5"
        in " ".join(ran.out.split())
    )


@pytest.mark.slow
def test_so_does_one_that_broke_at_once(recipe, run_cli) -> None:
    Path("digits.py").write_text(
        "def reward(completions, trainer_state, **_):\n"
        "    score = 2.0 if trainer_state.global_step < 2 else 1.0\n"
        "    return [score * (place % 2) for place in range(len(completions))]\n"
    )
    assert run_cli("train", recipe, "optim.steps=6", "rollout.prompts_per_step=5").code == 0
    ran = run_cli("train", recipe, "optim.steps=10", "rollout.prompts_per_step=5", "--resume-changed")
    assert "fell from 1.000 (at least 1.000) in the first step to 0.500" in " ".join(ran.out.split()), ran.err


def test_rewards_of_another_reward_are_not_compared(recipe, run_cli) -> None:
    fixed = "def reward(completions, **_):\n    return [{} * (place % 2) for place in range(len(completions))]\n"
    Path("digits.py").write_text(fixed.format(2.0))
    assert run_cli("train", recipe, "optim.steps=5").code == 0
    Path("digits.py").write_text(fixed.format(1.0))
    ran = run_cli("train", recipe, "optim.steps=10", "--resume-changed")
    assert (ran.code, read_run(Path("runs/toy")).state) == (0, "finished"), ran.err


def test_a_model_that_got_worse_is_told() -> None:
    cfg, before, after = evaluated(), evaluation(0, [0.5] * 32 + [0.25] * 32), evaluation(9, [0.0] * 64)
    said = verdict(before, after, cfg)
    assert said.startswith("this run made the model worse: eval/avg@4 from 37.5% (")
    assert (
        "to 0.0% (0.0% to 5.7%), 95 % intervals. Try a lower optim.learning_rate than 1e-05, or keep the model" in said
    )
    assert "checkpoint" not in said
    assert "checkpoint 3 was the best (grpo export RUN --checkpoint best)" in verdict(before, after, cfg, Best(3, 0.4))
    assert "checkpoint" not in verdict(before, after, cfg, Best(3, 0.3))
    assert "loss.beta" not in verdict(before, after, evaluated(loss={"beta": 0.1}))
    assert verdict(after, replace(before, step=9), cfg) is None
    for other in (
        evaluation(0, [0.0] * 64),  # of before the first step, too: nothing to compare
        evaluation(9, [0.0] * 64, grader="lenient"),
        evaluation(9, [0.0] * 64, name="pass@4"),
        evaluation(9, [0.0] * 64, failed=60),  # with them right it would be 23 %, and up to 29 %
        evaluation(9, [0.25] * 64),
        None,
    ):
        assert verdict(before, other, cfg) is None, other
    assert verdict(before, evaluation(9, [0.0] * 64, failed=40), cfg) is not None
    assert verdict(None, after, cfg) is None
    assert verdict(before, after, config()) is None  # with no eval section any more


def test_few_prompts_say_too_little() -> None:
    """The bootstrap's interval of equal values has no width; Wilson's has."""
    assert verdict(evaluation(0, [0.5] * 4), evaluation(9, [0.25] * 4), evaluated()) is None
    assert verdict(evaluation(0, [1.0] * 2), evaluation(9, [0.0] * 2), evaluated()) is None
    name = "rewards/exact"
    for n, told in ((19, False), (20, True)):
        pair = evaluation(0, [7.0] * n, name), evaluation(9, [6.5] * n, name)
        assert (verdict(*pair, evaluated(name)) is not None) is told
    assert "eval/rewards/exact from 7.000 (7.000 to 7.000) to 6.500" in verdict(*pair, evaluated(name))


@pytest.mark.parametrize(("n", "chance"), [(8, 0.5), (24, 0.1), (24, 0.9), (64, 0.3)])
def test_noise_alone_is_not_worse(n: int, chance: float) -> None:
    """Independent draws from one model: of 400 pairs at most a few may be told apart."""
    draws, cfg = random.Random(1), evaluated()
    samples = [[sum(draws.random() < chance for _ in range(4)) / 4 for _ in range(n)] for _ in range(40)]
    measured = [evaluation(place, values) for place, values in enumerate(samples)]
    pairs = [(one, replace(other, step=99)) for one in measured[:20] for other in measured[20:]]
    assert sum(verdict(*pair, cfg) is not None for pair in pairs) <= 2


def test_a_run_that_made_the_model_worse_says_so(recipe, run_cli) -> None:
    """The reward is right at first and wrong after the first step, as if the model had been destroyed."""
    Path("digits.py").write_text(
        "def reward(completions, trainer_state, **_):\n"
        "    ends = [i / len(completions) for i in range(len(completions))]\n"
        "    return [1.0 - (end / 2 + 1) * bool(trainer_state.global_step) for end in ends]\n"
    )
    recipe.write_text(recipe.read_text() + "eval: {split: train, samples: 1, prompts: 4}\n")
    ran = run_cli("train", recipe, "optim.steps=2", "rewards.0.isolation=inline")
    assert ran.code == 0, ran.err
    assert "this run made the model worse: eval/avg@1 from 100.0% (51.0% to 100.0%) to 0.0% (0.0% to 49.0%)" in ran.out
    assert read_run(Path("runs/toy")).state == "worse"
    listed = run_cli("runs").out
    assert "worse" in listed
    again = run_cli("train", recipe, "optim.steps=2", "rewards.0.isolation=inline", "--resume")
    assert ("this run made the model worse" in again.out, read_run(Path("runs/toy")).state) == (True, "worse")
