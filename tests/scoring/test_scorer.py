"""Reward functions: what they receive, and that a failure is never a zero."""

import math
from contextlib import closing

import pytest

from grpo.config import RewardConfig
from grpo.errors import RunError, UserError
from grpo.scoring.scorer import Scorer
from grpo.types import Group, Rollout, Task, Trajectory


def group(asked, texts: list[str], **columns) -> Group:
    completions = [Trajectory.sampled((1, 2), (-0.5, -0.5), text, "stop") for text in texts]
    return Group(Task(0, asked, (7, 8), columns), tuple(Rollout(completion) for completion in completions))


GROUPS = [
    group("one?", ["a", "bb"], answer="1", prompt="one?"),
    group("two?", ["ccc", "dddd"], answer="2", prompt="two?"),
]


def scores(function, groups=GROUPS) -> list[float | None]:
    scorer = Scorer({"mine": function})
    return [rollout.scores["mine"] for group in scorer.score(groups) for rollout in group.rollouts]


def test_what_a_function_receives() -> None:
    seen = {}

    def mine(trainer_state, log_extra, log_metric, **everything):
        seen.update(everything)
        return [0] * 4

    scores(mine)
    assert seen == {
        "prompts": ["one?", "one?", "two?", "two?"],
        "completions": ["a", "bb", "ccc", "dddd"],
        "completion_ids": [[1, 2]] * 4,
        "answer": ["1", "1", "2", "2"],
    }


def test_chat_prompts_get_chat_completions() -> None:
    messages = [{"role": "user", "content": "?"}]
    got = {}
    scores(lambda completions, **_: got.update(c=completions) or [1.0], [group(messages, ["a"])])
    assert got["c"] == [[{"role": "assistant", "content": "a"}]]


def test_values() -> None:
    assert scores(lambda completions, **_: [len(c) for c in completions]) == [1.0, 2.0, 3.0, 4.0]
    assert scores(lambda **_: [None, True, 0.5, 0]) == [None, 1.0, 0.5, 0.0]


def test_an_async_function() -> None:
    async def mine(completions, **_):
        return [1.0 for _ in completions]

    assert scores(mine) == [1.0] * 4


def test_what_is_not_a_finite_number_is_none_and_counted() -> None:
    scorer = Scorer({"mine": lambda **_: [math.nan, math.inf, "7", 1.0]}, max_failure_rates={"mine": 0.75})
    got = [rollout.scores["mine"] for group in scorer.score(GROUPS) for rollout in group.rollouts]
    assert got == [None, None, None, 1.0]
    assert scorer.failures == {"mine": 3}


def test_none_is_not_a_failure() -> None:
    scorer = Scorer({"mine": lambda **_: [None] * 4})
    scorer.score(GROUPS)
    assert scorer.failures == {"mine": 0}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda **_: [1.0] * 3, "3 scores for 4 completions"),
        (lambda **_: 1.0, "expected a list with a number or None per completion, got 1.0"),
        (lambda **_: "1234", "per completion, got '1234'"),
        (lambda completions: completions, "unexpected keyword argument"),
        (lambda **_: 1 / 0, "ZeroDivisionError"),
        (lambda **_: [math.nan] * 4, "not a usable number: nan"),
    ],
)
def test_a_function_that_always_fails_stops_the_run_with_its_traceback(answer, said: str) -> None:
    scorer = Scorer({"mine": answer})
    with pytest.raises(RunError) as error:
        scorer.score(GROUPS)
    assert "reward 'mine' failed on 4 of the last 4 completions (max_failure_rate: 0.5). First error" in str(
        error.value
    )
    assert said in str(error.value)
    assert scorer.failures == {"mine": 4}


@pytest.mark.parametrize(("answer", "told"), [(lambda **_: 1 / 0, True), (lambda **_: [math.nan] * 4, False)])
def test_one_error_that_cost_a_whole_call_is_said_to_have(answer, told: bool, caplog) -> None:
    """Which completion raised it nobody knows: the first one of the call is not blamed."""
    scorer = Scorer({"mine": answer}, max_failure_rates={"mine": 1.0})
    scorer.score(GROUPS)
    assert ("these completions were in one call" in caplog.text.lower()) == told
    assert ("calls: completion" in caplog.text) == told


def test_a_failure_now_and_then_is_counted_and_does_not_stop_a_run(caplog) -> None:
    answers = iter([[1.0] * 4, None, [1.0] * 4, [1.0] * 4, None, None])
    scorer = Scorer({"mine": lambda **_: next(answers) or 1 / 0})
    for failed in (0, 4, 4, 4, 8):
        scored = scorer.score(GROUPS)
        assert scorer.failures == {"mine": failed}
        assert all(rollout.failed == (rollout.scores["mine"] is None) for group in scored for rollout in group.rollouts)
    assert caplog.text.count("ZeroDivisionError") == 1  # said once
    with pytest.raises(RunError, match="ZeroDivisionError"):
        scorer.score(GROUPS)


def test_a_metric_may_fail_as_it_likes() -> None:
    scorer = Scorer({"mine": lambda **_: 1 / 0}, weights={"mine": 0.0})
    for _ in range(5):
        groups = scorer.score(GROUPS)
    assert scorer.failures == {"mine": 20}
    assert not any(rollout.failed for group in groups for rollout in group.rollouts)


def test_numbers_of_all_kinds() -> None:
    import numpy as np

    assert scores(lambda **_: np.array([1, 2, 3, 4], np.float32)) == [1.0, 2.0, 3.0, 4.0]
    assert scores(lambda **_: (x for x in (1, 2, 3, 4))) == [1.0, 2.0, 3.0, 4.0]
    odd = Scorer({"mine": lambda **_: [1.0, 1e30, 10**400, b"1"]}, max_failure_rates={"mine": 1.0})
    assert [r.scores["mine"] for group in odd.score(GROUPS) for r in group.rollouts] == [1.0, None, None, None]


def test_a_function_that_exits_has_failed() -> None:
    with pytest.raises(RunError, match="SystemExit"):
        scores(lambda **_: exit(0))


@pytest.mark.parametrize("function", [lambda completions, solution, **_: 1, lambda completions: 1])
def test_a_function_that_cannot_be_called_is_found_before_the_run(function) -> None:
    with pytest.raises(UserError, match="grpo calls it with answer, completion_ids, completions, prompts"):
        Scorer({"mine": function}).check(["answer", "prompt"])
    Scorer({"mine": lambda completions, answer, **_: 1}).check(["answer", "prompt"])


def test_two_files_with_a_reward_each(tmp_path) -> None:
    for name in ("brief", "right"):
        (tmp_path / f"{name}.py").write_text("def reward(completions, **_):\n    return [1.0] * len(completions)\n")
    configs = [RewardConfig(use=f"{tmp_path / name}.py:reward") for name in ("brief", "right")]
    assert list(Scorer.of(configs).rewards) == ["brief", "right"]


def test_two_rewards_of_one_name() -> None:
    with pytest.raises(UserError, match="two rewards have the name 'gsm8k_answer'"):
        Scorer.of([RewardConfig(use="gsm8k_answer")] * 2)


LOGS = """CALLS = "completion"
def twice(completions, log_metric, **_):
    for value in range(1, len(completions[0]) + 1):
        log_metric("length", value)
    return [0.0]
def once(completions, log_metric, **_):
    log_metric("length", 10.0)
    return [0.0]
"""


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_a_metric_is_the_mean_of_all_that_was_logged_under_its_name(tmp_path, isolation: str) -> None:
    """By several calls for a completion, for several completions, by two rewards."""
    (tmp_path / "logs.py").write_text(LOGS)
    configs = [RewardConfig(use=f"{tmp_path}/logs.py:{name}", isolation=isolation) for name in ("twice", "once")]
    with closing(Scorer.of(configs)) as scorer:
        scorer.begin(1)
        rollouts = [rollout for one in scorer.score(GROUPS) for rollout in one.rollouts]
        told = [1, 10, 1, 2, 10, 1, 2, 3, 10, 1, 2, 3, 4, 10]  # for "a", "bb", "ccc", "dddd"
        assert scorer.metrics()["length"] == pytest.approx(sum(told) / len(told))
    assert [rollout.logged["length"] for rollout in rollouts] == pytest.approx([11 / 2, 13 / 3, 16 / 4, 20 / 5])
