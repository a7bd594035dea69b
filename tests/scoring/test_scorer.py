"""Reward functions: what they receive, and that a failure is never a zero."""

import math

import pytest

from grpo.config import RewardConfig
from grpo.errors import RunError, UserError
from grpo.scoring.scorer import Scorer
from grpo.types import Completion, Group, Rollout, Task


def group(asked, texts: list[str], **columns) -> Group:
    completions = [Completion((1, 2), (-0.5, -0.5), text, "stop") for text in texts]
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

    def mine(**everything):
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
    scorer = Scorer({"mine": lambda **_: [math.nan, math.inf, "7", 1.0]})
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
        (lambda **_: 1.0, "not float"),
        (lambda **_: "1234", "not str"),
        (lambda completions: completions, "unexpected keyword argument"),
        (lambda **_: 1 / 0, "ZeroDivisionError"),
        (lambda **_: [math.nan] * 4, "not a finite number: nan"),
    ],
)
def test_a_function_that_always_fails_stops_the_run_with_its_traceback(answer, said: str) -> None:
    scorer = Scorer({"mine": answer})
    with pytest.raises(RunError) as error:
        scorer.score(GROUPS)
    assert "reward 'mine' failed on every completion of a step" in str(error.value)
    assert said in str(error.value)
    assert scorer.failures == {"mine": 4}


def test_two_rewards_of_one_name() -> None:
    with pytest.raises(UserError, match="two of them are called 'gsm8k_answer'"):
        Scorer.of([RewardConfig(use="gsm8k_answer")] * 2)
