"""One function against TRL's contract: its arguments, what it receives, and TRL's own rewards as they are."""

import asyncio
import re

import pytest

from grpo.config import RewardConfig
from grpo.errors import UserError
from grpo.scoring.arguments import is_factory
from grpo.scoring.contract import Reward
from grpo.scoring.scorer import Scorer
from grpo.types import Group, Rollout, Task, Trajectory

COLUMNS = {"prompts": ["?"] * 2, "completions": ["a", "bb"], "completion_ids": [[1], [1, 2]], "answer": ["x", "y"]}
STATE = {"global_step": 3, "max_steps": 10}


def scaled(completions, by: int = 1, **_):
    return [by * len(text) for text in completions]


def make(power: float, offset: float = 0.0):
    return lambda completions, **_: [len(text) ** power + offset for text in completions]


class Longest:
    def __init__(self, at_most: int) -> None:
        if at_most < 1:
            raise ValueError("at_most is at least 1")
        self.at_most = at_most

    def __call__(self, completion_ids, **_):
        return [min(self.at_most, len(ids)) for ids in completion_ids]


@pytest.mark.parametrize(
    ("function", "kwargs", "values"),
    [
        (scaled, {}, [1.0, 2.0]),
        (scaled, {"by": 3}, [3.0, 6.0]),
        (make, {"power": 2}, [1.0, 4.0]),
        (make, {"power": 2, "offset": 0.5}, [1.5, 4.5]),
        (Longest, {"at_most": 1}, [1.0, 1.0]),
        (lambda **everything: [float(len(everything["answer"]))] * 2, {}, [2.0, 2.0]),
    ],
)
def test_arguments_go_to_the_function_or_to_what_makes_it(function, kwargs, values) -> None:
    assert Reward(function, kwargs)(COLUMNS, STATE).values == values


@pytest.mark.parametrize(
    ("function", "kwargs", "said"),
    [
        (scaled, {"bye": 3}, "kwargs.bye: there is no such argument. Did you mean 'by'?"),
        (scaled, {"by": "three"}, 'kwargs.by: expected a valid integer, got "three"'),
        (scaled, {"completions": 3}, "kwargs.completions: there is no such argument. Its arguments: by."),
        (make, {}, "kwargs: missing a required argument: 'power'"),
        (make, {"power": [1]}, "kwargs.power: expected a valid number, got [1]"),
        (Longest, {"at_most": 0}, "at_most is at least 1"),
        (lambda: {}["key"], {}, "the factory raised KeyError: 'key'"),
        (lambda: 3, {}, "must return a reward function; this one returned 3"),
    ],
)
def test_arguments_that_do_not_fit_are_found_before_the_run(function, kwargs, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Reward(function, kwargs)


@pytest.mark.parametrize("isolation", ["process", "inline"])
def test_and_they_are_the_users_error(isolation: str) -> None:
    for kwargs, said in (
        ({"tokns": 5}, "reward 'length': kwargs.tokns: there is no such argument. Did you mean 'tokens'?"),
        ({"tokens": 5, "kind": "round"}, "reward 'length': kwargs.kind: expected 'target', 'cosine' or 'overlong'"),
        ({"tokens": 5, "cache": 3}, "reward 'length': kwargs.cache: kind: overlong needs a cache from 1"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            Scorer.of([RewardConfig(use="length", kwargs=kwargs, isolation=isolation)])


def test_what_makes_a_function_takes_no_completions() -> None:
    assert all(is_factory(function) for function in (make, Longest, lambda: 1))
    assert not any(is_factory(function) for function in (scaled, lambda prompts: 1, lambda **_: 1))


def test_an_argument_and_a_column_of_one_name() -> None:
    assert Reward(scaled, {"by": 2}).problem(["by"]) == "kwargs.by: the dataset has a column of the same name"
    assert Reward(scaled, {"by": 2}).problem(["answer"]) is None


def test_the_trainers_state_and_the_hooks() -> None:
    def mine(completions, trainer_state, log_extra, log_metric, **_):
        log_extra("length", [len(text) for text in completions])
        log_metric("mine/half", 0.5)
        log_metric("mine/half", 1.0)
        return [trainer_state.global_step / trainer_state.max_steps] * 2

    answer = Reward(mine, {})(COLUMNS, STATE)
    assert (answer.values, answer.extras, answer.metrics) == ([0.3, 0.3], {"length": [1, 2]}, {"mine/half": [0.5, 1.0]})
    plain = Reward(lambda prompts, completions, completion_ids, answer: [0, 1], {})
    assert plain(COLUMNS, STATE).values == [0.0, 1.0]  # who does not take them does not get them


def test_too_few_extras_are_a_failure() -> None:
    answer = Reward(lambda log_extra, **_: log_extra("x", [1]), {})(COLUMNS, STATE)
    assert "log_extra('x'): 1 values for 2 completions" in answer.failures[0]


def test_an_exception_in_the_place_of_a_score() -> None:
    answer = Reward(lambda **_: [1, ConnectionError("judge is away")], {})(COLUMNS, STATE)
    assert (answer.values, answer.failures) == ([1.0, None], {1: "ConnectionError: judge is away"})


class Unspeakable(Exception):
    def __repr__(self):
        raise ValueError("no words")

    __str__ = __repr__


class Foreign(BaseException):
    """Such as asyncio's CancelledError, or a test library's."""


def interrupted(**_):
    raise Foreign("not an Exception")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (interrupted, "Foreign: not an Exception"),
        (lambda **_: [Unspeakable()] * 2, "ValueError: no words"),
        (lambda **_: Unspeakable(), "ValueError: no words"),
        (lambda log_extra, **_: log_extra("x", [{(1, 2): 3}] * 2), "TypeError: keys must be str"),
    ],
)
def test_what_a_function_raises_or_gives_never_leaves_its_call(function, said: str) -> None:
    answer = Reward(function, {})(COLUMNS, STATE)
    assert answer.values == [None, None]
    assert all(said in error for error in answer.failures.values())


def test_ctrl_c_is_for_the_trainer() -> None:
    def stopped(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Reward(stopped, {})(COLUMNS, STATE)


def test_errors_are_cut() -> None:
    answer = Reward(lambda **_: [ValueError("x" * 1_000_000), 1.0], {})(COLUMNS, STATE)
    assert len(answer.failures[0]) == 2000


def test_async_calls_share_an_event_loop() -> None:
    """A client that is made in one call is used in the next, as with TRL."""
    kept = []

    async def mine(completions, **_):
        kept.append(asyncio.get_running_loop())
        return [1.0] * 2

    reward = Reward(mine, {})
    assert [reward(COLUMNS, STATE).values for _ in range(2)] == [[1.0, 1.0]] * 2
    assert kept[0] is kept[1]


def chat_groups(*texts: str, **columns) -> list[Group]:
    rollouts = tuple(Rollout(Trajectory.sampled((1,) * 90, (-0.5,) * 90, text, "stop")) for text in texts)
    return [Group(Task(0, [{"role": "user", "content": "?"}], (7,), columns), rollouts)]


@pytest.mark.parametrize("isolation", ["process", "inline"])
def test_trls_own_rewards_run_as_they_are(isolation: str) -> None:
    pytest.importorskip("trl.rewards")
    uses = {
        "accuracy_reward": ({}, [1.0, 0.0]),
        "think_format_reward": ({}, [1.0, 0.0]),
        "get_soft_overlong_punishment": ({"max_completion_len": 100, "soft_punish_cache": 20}, [-0.5, -0.5]),
        "get_repetition_penalty_reward": ({"ngram_size": 2, "max_penalty": -1.0}, [-88 / 89] * 2),
        "get_cosine_scaled_reward": ({"max_len": 180}, [0.75, -0.75]),
    }
    configs = [
        RewardConfig(use=f"trl.rewards:{name}", kwargs=kwargs, isolation=isolation)
        for name, (kwargs, _) in uses.items()
    ]
    scorer = Scorer.of(configs)
    scorer.check(["solution", "prompt"])
    texts = r"<think>so</think> \boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}"
    (scored,) = scorer.score(chat_groups(*texts, solution=r"\frac{1}{3}"))
    for name, (_, values) in uses.items():
        assert [rollout.scores[name] for rollout in scored.rollouts] == pytest.approx(values)
    assert all("1/3" in rollout.extras["gold_parsed"] for rollout in scored.rollouts)
    scorer.close()


def test_hooks_reach_the_step_and_the_rollouts() -> None:
    scorer = Scorer.of([RewardConfig(use="math_answer")])
    scorer.begin(4)
    (scored,) = scorer.score(chat_groups(r"\boxed{7}", "It is 7", "8", answer="7"))
    assert [rollout.scores["math_answer"] for rollout in scored.rollouts] == [1.0, 1.0, 0.0]
    metrics = scorer.metrics()
    assert metrics["math_answer/lenient"] == pytest.approx(2 / 3)
    assert metrics["math_answer/strict"] == pytest.approx(1 / 3)
    scorer.begin(5)
    assert "math_answer/strict" not in scorer.metrics()
    scorer.close()
