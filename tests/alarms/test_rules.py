"""Each alarm at its threshold, and not below it; and once."""

from __future__ import annotations

import json
import math

import pytest
from alarms.signs import terms, watched

from grpo.alarms.past import PastSteps, length_correlation, length_sums
from grpo.alarms.watch import OF_EVALUATIONS, OF_STEPS, after_measuring, after_step
from grpo.config import AlarmsConfig, LossConfig, RolloutConfig
from grpo.types import EvalMetrics, Failure, Group, Rollout, StepMetrics, Task, Trajectory

CUT = "completions/clipped_ratio"


def kinds(steps, known=None) -> list[tuple[str, int]]:
    return [(alarm.kind, alarm.step) for alarm in watched(steps, known)[0]]


def test_truncation_is_of_the_first_step_or_of_five_together() -> None:
    assert kinds([{CUT: 0.51}]) == [("truncation", 1)]
    assert kinds([{CUT: 0.5}] * 9) == []
    (alarm,), _ = watched([{CUT: 0.5}, {CUT: 0.75}])
    assert alarm.what.startswith("62% of the completions in the last 2 steps were truncated")
    assert kinds([{CUT: cut} for cut in (0.0, 0.0, 0.0, 1.0, 1.0, 0.5)]) == []  # the last five: exactly a half
    (alarm,), _ = watched([{CUT: cut} for cut in (0.0, 0.0, 0.0, 1.0, 1.0, 0.75)])
    assert str(alarm).startswith(
        "step 6: 55% of the completions in the last 5 steps were truncated at rollout.max_completion_length (256"
    )


def silent(step: int, count: int, solved: float = 0.0) -> StepMetrics:
    values = {"steps_without_signal": float(count), "solved_all": solved, "reward": solved, "frac_reward_zero_std": 1.0}
    return StepMetrics(step, values if count else values | {"frac_reward_zero_std": 0.5})


def test_no_signal_for_ten_steps_in_a_row() -> None:
    assert kinds([silent(n, n - 1) for n in range(1, 11)]) == []  # nine
    alarms, _ = watched([silent(n, n - 1) for n in range(1, 13)])
    assert [(alarm.kind, alarm.step) for alarm in alarms] == [("no_signal", 11)]
    assert "10 steps in a row had no signal: no group has different rewards (the mean reward is 0)" in (alarms[0].what)
    gaps = [silent(n, n // 2) for n in range(1, 60)]  # every other step
    assert kinds(gaps) == []


def test_ten_silent_steps_after_a_signal_must_follow_one_another() -> None:
    counts = [0, *range(1, 10), 9, *range(10, 19)]  # nine, one with a signal, nine
    assert kinds([silent(n, count) for n, count in enumerate(counts, 1)]) == []
    assert kinds([silent(n, count) for n, count in enumerate([*counts, 19], 1)]) == [("no_signal", 21)]


def test_silent_steps_from_before_the_history_do_not_count() -> None:
    """After a resume with another reward, or of a checkpoint without a history, the count begins above 0."""
    later = [StepMetrics(n, silent(n, 30 + (n > 45)).values) for n in range(31, 60)]
    alarms, past = [], PastSteps()
    for record in later:
        record, past = after_step(record, past, terms())
        alarms += record.alarms
    assert "no_signal" not in [alarm.kind for alarm in alarms]
    past = PastSteps()
    for n in range(31, 42):  # eleven records show ten silent steps
        record, past = after_step(silent(n, n), past, terms())
    assert "no_signal" in [alarm.kind for alarm in record.alarms]


def test_the_longest_wait_for_a_signal_fits_into_the_history() -> None:
    longest = terms(AlarmsConfig(without_signal=24))
    steps = [silent(n, max(0, n - 40)) for n in range(1, 70)]
    assert ("no_signal", 64) in kinds(steps, longest)
    with pytest.raises(ValueError, match="less than or equal to 24"):
        AlarmsConfig(without_signal=25)


def test_where_rewards_differ_the_gradient_is_named() -> None:
    masked = terms(loss=LossConfig(mask_truncated_completions=True))
    values = {"frac_reward_zero_std": 0.0, "reward": 0.5}
    steps = [StepMetrics(n, values | {"steps_without_signal": float(n)}) for n in range(1, 11)]
    for known, said in ((masked, "loss.mask_truncated_completions"), (terms(), "section loss")):
        (alarm,), _ = watched(steps, known)
        assert "rewards differ, but the gradient was exactly 0" in alarm.what
        assert said in alarm.advice


def test_rewards_that_are_too_large_for_their_squares_end_nothing() -> None:
    task = Task(0, "", (), {})
    rollouts = [
        Rollout(Trajectory((1,) * n, (True,) * n, {}, "", "stop"), reward=reward)
        for n, reward in ((1, 0.0), (2, 1e200), (3, 1.0))
    ]
    sums = length_sums([Group(task, tuple(rollouts))])
    assert sums["length/squared_rewards"] == math.inf
    assert length_correlation([sums]) is None


def test_a_run_that_came_to_solve_its_prompts_is_left_alone() -> None:
    counts = [0, 0, *range(1, 15)]
    assert kinds([silent(n, count, solved=0.95) for n, count in enumerate(counts, 1)]) == []
    assert kinds([silent(n, count, solved=0.85) for n, count in enumerate(counts, 1)]) == [("no_signal", 12)]
    constant = kinds([silent(n, n, solved=1.0) for n in range(1, 12)])  # from the beginning: the reward is constant
    assert constant == [("equal_rewards", 1), ("no_signal", 10)]


def entropies(late: float, equal: float = 0.75, solved: float = 0.25) -> list[dict[str, float]]:
    told = {"frac_reward_zero_std": equal, "solved_all": solved, "steps_without_signal": 0.0}
    return [{"entropy": 0.4, **told}] * 5 + [{"entropy": late, **told}] * 10


def test_entropy_collapses_where_answers_are_equal_and_not_right() -> None:
    (alarm,), _ = watched(entropies(0.03))
    assert (alarm.kind, alarm.step) == ("entropy", 15)
    assert "to 0.03 nats per token, 8% of its value in the first steps, while for 50% of the prompts" in alarm.what
    assert "Raise loss.epsilon_high or loss.entropy_coef" in alarm.advice
    for fine in (
        entropies(0.041),
        entropies(0.03)[:-1],
        entropies(0.03, equal=0.5, solved=0.2),  # there is something to learn from
        entropies(0.03, solved=0.4),  # what is equal is mostly right
    ):
        assert kinds(fine) == []


def test_kl_and_the_gradient_explode() -> None:
    assert kinds([{"kl": 2.0}, {"kl": 2.01}]) == [("kl", 2)]
    assert kinds([{"kl": math.nan}]) == []  # that is not far, but not finite
    norms = [1.0, 3.0] * 4  # their median is 2
    assert kinds([{"grad_norm": norm} for norm in (*norms, 101.0, 0.1, 99.0)]) == []
    assert kinds([{"grad_norm": norm} for norm in (*norms, 101.0, 0.1, 102.0)]) == [("gradient", 11)]
    assert kinds([{"grad_norm": norm} for norm in (*norms, 1e9)]) == []  # one step may be odd
    assert kinds([{"grad_norm": norm} for norm in (*norms[1:], 1e9, 1e9, 1e9)]) == []  # seven are too few
    assert kinds([{"grad_norm": norm} for norm in (*norms, 101.0, 0.0, 0.1, 102.0)]) == [("gradient", 12)]  # no signal
    (alarm,), _ = watched([{"skipped_updates": 2.0}], terms(penalised=True))
    assert alarm.what == "2 updates were skipped because the loss or the gradient was not finite"
    assert "loss.beta" not in alarm.advice
    assert "lower optim.learning_rate than 1e-05, or keep the policy near its start with loss.beta" in (
        watched([{"skipped_updates": 1.0}])[0][0].advice
    )


def group(pairs: list[tuple[float | None, int]]) -> Group:
    made = [Rollout(Trajectory.sampled((1,) * n, None, "", "stop"), reward=reward) for reward, n in pairs]
    return Group(Task(0, "", (), {}), tuple(made))


def correlation(*groups: Group) -> float | None:
    return length_correlation([length_sums(groups)])


def test_the_correlation_of_reward_and_length_by_hand() -> None:
    """Within groups: rewards -1, 0, 1 and lengths -2, -1, 3 less their means: 5 / √(2 × 14)."""
    one, equal = group([(1.0, 1), (2.0, 2), (3.0, 6), (None, 99)]), group([(50.0, 7), (50.0, 7)])
    assert correlation(one) == pytest.approx(5 / math.sqrt(28))
    assert correlation(one, equal) == pytest.approx(5 / math.sqrt(28))
    both = [length_sums([one]), {}, length_sums([group([(1.0, 3), (2.0, 2), (3.0, 1)])])]
    assert length_correlation(both) == pytest.approx((5 - 2) / math.sqrt((2 + 2) * (14 + 2)))
    assert correlation(group([(1.0, 1), (2.0, 2)])) is None  # two lengths
    assert correlation(group([(1.0, 1), (1.0, 2), (1.0, 3)])) is None
    assert correlation(group([(None, 1)])) is None


def test_a_reward_that_follows_length_alone() -> None:
    values = {"completions/mean_length": 20.0, "frac_reward_zero_std": 0.5}
    short = group([(-1.0, 10), (-2.0, 20), (-3.0, 30)])
    mixed = group([(-1.0, 10), (-4.0, 20), (-3.0, 30)])  # the correlation is -0.65
    (alarm,), _ = watched([StepMetrics(n, values, (short,)) for n in range(1, 12)])
    assert (alarm.kind, alarm.step) == ("length", 10)
    assert "reward and length was -1.00 over the last 10 steps (shorter is better; the mean length went" in alarm.what
    assert kinds([StepMetrics(n, values, (short if n % 2 else mixed,)) for n in range(1, 30)]) == []
    rare = values | {"frac_reward_zero_std": 0.51}
    assert kinds([StepMetrics(n, rare, (short,)) for n in range(1, 12)]) == []


def test_sampler_and_trainer_apart() -> None:
    gap, unfiltered = (f"sampling/{name}sampling_logp_difference/mean" for name in ("", "un"))
    unfiltered = "sampling/unfiltered_logp_difference/mean"
    assert kinds([{gap: 2.9e-3}, {gap: 3.1e-3}, {gap: 9e-3}]) == [("sampler", 2)]
    assert kinds([{gap: 0.5, unfiltered: 1e-6}]) == []  # filters do not count
    (alarm,), _ = watched([{gap: math.nan}])
    assert alarm.what == "the sampler's logprobs of some tokens are NaN"
    (alarm,), _ = watched([{gap: 3.1e-3}])
    assert alarm.what.endswith("3.1 times what rounding in float32 explains (0.001)")


def test_importance_ratios_that_leave_few_tokens() -> None:
    size = "sampling/effective_sample_size"
    assert kinds([{size: 0.29}] * 4 + [{size: 0.34}] * 9) == []
    (alarm,), _ = watched([{size: 0.2}] * 5, terms(rollout=RolloutConfig(top_k=5, top_p=0.5)))
    assert (alarm.kind, alarm.step) == ("ratios", 5)
    assert "effective_sample_size was 0.20 over" in alarm.what
    assert alarm.advice.startswith("A weaker rollout.top_k, rollout.top_p makes them more even.")


def test_a_reward_that_fails() -> None:
    rates = {"rewards/exact/error_rate": 0.02, "rewards/exact/timeout_rate": 0.04, "rewards/form/error_rate": 0.05}
    failed = Rollout(Trajectory.sampled((1,), None, "", "stop"), failures={"exact": Failure("error", "Key: 7\n  File")})
    (alarm,), _ = watched([StepMetrics(1, rates, (Group(Task(0, "", (), {}), (failed,)),))])
    assert alarm.what == (
        "'exact' failed on 6% (2% error, 4% timeout) of the completions of this step; the first error: Key: 7"
    )
    assert kinds([{"rewards/exact/crash_rate": 0.06}] + [{"rewards/exact/crash_rate": 0.0}] * 3) == [
        ("failed_rewards", 1)
    ]
    assert kinds([{"rewards/exact/timeout_rate": 0.5 * (n == 9)} for n in range(20)]) == []  # 5 % of ten steps
    assert kinds([{"rewards/exact/timeout_rate": 0.6 * (n == 9)} for n in range(20)]) == [("failed_rewards", 10)]
    assert kinds([{"rewards/a/b/memory_rate": 0.1}]) == [("failed_rewards", 1)]


def measured(step: int, value: float, n: int = 100, failed: int = 0, half: float = 0.05) -> EvalMetrics:
    return EvalMetrics(step, n, "exact", {"avg@4": value}, {"avg@4": (value - half, value + half)}, failed)


def overfitted(rewards: tuple[float, float], *evaluations: EvalMetrics, known=None) -> list[tuple[str, int]]:
    """The alarms of ten steps of a first mean reward, an evaluation, ten steps of a second, and others."""
    known, told = known or terms(), []
    first, *others = evaluations
    past = PastSteps()
    for number, mean in enumerate([rewards[0]] * 10 + [rewards[1]] * 10, 1):
        values = {"reward": mean + 0.01 * (number % 2), "frac_reward_zero_std": 0.0}
        record, past = after_step(StepMetrics(number, values), past, known)
        assert not record.alarms
        for one in [first] * (number == first.step) + [one for one in others if one.step == number]:
            made, past = after_measuring(one, past, known)
            told += [(alarm.kind, alarm.step) for alarm in made.alarms]
    return told


def test_a_reward_that_rises_while_the_evaluation_falls() -> None:
    fell = measured(10, 0.8), measured(20, 0.5)
    assert overfitted((0.3, 0.9), *fell) == [("overfitting", 20)]
    assert overfitted((0.3, 0.9), measured(10, 0.5), measured(20, 0.8)) == []
    assert overfitted((0.9, 0.3), *fell) == []  # both fell: that is said after the last step
    assert overfitted((0.3, 0.302), *fell) == []  # noise
    assert overfitted((0.3, 0.9), measured(10, 0.8), measured(20, 0.65)) == []  # the intervals overlap
    assert overfitted((0.3, 0.9), measured(10, 0.8), measured(20, 0.5, failed=48)) == []  # of 400 gradings
    assert overfitted((0.3, 0.9), measured(10, 0.8), measured(20, 0.5, failed=44)) == [("overfitting", 20)]
    assert overfitted((0.3, 0.9), measured(10, 0.8), measured(15, 0.5), measured(20, 0.4)) == [("overfitting", 15)]
    other = terms(metric="pass@4")
    assert overfitted((0.3, 0.9), *fell, known=other) == []


def test_the_reward_is_compared_with_that_around_the_best_evaluation() -> None:
    """It began at 0.9, was 0.3 when the evaluation was best, and rose to 0.6."""
    known, past = terms(), PastSteps()
    for number, mean in enumerate([0.9] * 10 + [0.3] * 10 + [0.6] * 10, 1):
        values = {"reward": mean, "frac_reward_zero_std": 0.0}
        _, past = after_step(StepMetrics(number, values), past, known)
        if number in (20, 30):
            made, past = after_measuring(measured(number, 0.8 if number == 20 else 0.5), past, known)
    assert made.alarms[0].what.startswith(
        "the reward rose from 0.300 to 0.600 while eval/avg@4 fell from 0.800 (step 20)"
    )


def test_the_evaluation_before_the_first_step_counts() -> None:
    known, (_, past) = terms(), (None, PastSteps())
    _, past = after_measuring(measured(0, 0.8), past, known)
    for number in range(1, 21):
        values = {"reward": 0.02 * number, "frac_reward_zero_std": 0.0}
        _, past = after_step(StepMetrics(number, values), past, known)
    made, past = after_measuring(measured(20, 0.5), past, known)
    assert made.alarms[0].what == (
        "the reward rose from 0.060 to 0.310 while eval/avg@4 fell from 0.800 (step 0) to 0.500"
    )
    again, _ = after_measuring(measured(30, 0.3), past, known)
    assert again.alarms == ()


WRONG = {
    "truncated": {CUT: 1.0},
    "kl": {"kl": 1e6},
    "logp_difference": {"sampling/sampling_logp_difference/mean": 1.0},
    "effective_sample_size": {"sampling/effective_sample_size": 0.0},
    "failed_rewards": {"rewards/exact/error_rate": 1.0},
    "grad_norm": {"skipped_updates": 1.0},
}


@pytest.mark.parametrize("setting", WRONG)
def test_null_switches_one_alarm_off(setting: str) -> None:
    assert len(kinds([WRONG[setting]] * 12)) == 1
    assert kinds([WRONG[setting]] * 12, terms(AlarmsConfig(**{setting: None}))) == []


def test_null_switches_the_others_off() -> None:
    off = AlarmsConfig(without_signal=None, entropy=None, length_correlation=None, eval_drop=None, failed_calls=None)
    assert kinds([silent(n, count) for n, count in enumerate([0, *range(1, 15)], 1)], terms(off)) == []
    assert kinds(entropies(0.0), terms(off)) == []
    short, length = group([(-1.0, 10), (-2.0, 20), (-3.0, 30)]), {"completions/mean_length": 1.0}
    assert kinds([StepMetrics(n, length, (short,)) for n in range(1, 12)]) == [("length", 10)]
    assert kinds([StepMetrics(n, length, (short,)) for n in range(1, 12)], terms(off)) == []
    assert overfitted((0.3, 0.9), measured(10, 0.8), measured(20, 0.5), known=terms(off)) == []


def test_each_kind_is_told_once_and_what_was_told_is_kept() -> None:
    wrong = {name: value for values in WRONG.values() for name, value in values.items()}
    alarms, past = watched([wrong] * 9)
    assert len(alarms) == len(WRONG) == len({alarm.kind for alarm in alarms})
    kept = PastSteps.of(json.loads(json.dumps(past.plain())))
    assert kept == past
    assert watched([wrong] * 9, past=kept)[0] == []


def test_off_keeps_nothing() -> None:
    record, past = StepMetrics(1, {CUT: 1.0}), PastSteps()
    assert after_step(record, past, None) == (record, past)
    assert after_measuring(measured(1, 0.5), past, None) == (measured(1, 0.5), past)


def test_what_is_kept_stays_small() -> None:
    values = {f"rewards/r{n}/mean": 0.5 for n in range(50)} | {"reward": 1.0, "loss": math.nan, "entropy": math.nan}
    _, past = watched([values] * 200)
    assert (len(past.first), len(past.recent)) == (5, 25)
    assert set(past.recent[0]) == {"reward", "frac_reward_zero_std"}


def test_no_filter_is_named_that_is_not_on() -> None:
    (alarm,), _ = watched([{"sampling/effective_sample_size": 0.1}] * 5)
    assert alarm.advice.startswith("Look at sampling/importance_sampling_ratio/max")


def test_every_rule_has_a_kind_of_its_own() -> None:
    assert len({*OF_STEPS, *OF_EVALUATIONS}) == len(OF_STEPS) + len(OF_EVALUATIONS) == 13
