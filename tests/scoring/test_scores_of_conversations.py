"""Conversations are scored: by their environment's own reward, and by functions that see what was said."""

from __future__ import annotations

import pickle

import pytest
from scoring.hosts import FakeHost, group, scorer_of, talk

from grpo.config import RewardConfig
from grpo.errors import UserError
from grpo.objective.groups import with_rewards
from grpo.scoring.rehearsal import rehearse
from grpo.scoring.scorer import BrokenRewardError, Scorer
from grpo.scoring.text import said
from grpo.types import Failure, Task

CALL = {"role": "assistant", "content": "Let me look.", "tool_calls": [{"function": {"name": "look"}}]}
TALK = [
    CALL,
    {"role": "tool", "name": "look", "content": "the answer is 7"},
    {"role": "assistant", "content": "", "tool_calls": []},
    {"role": "user", "content": [{"type": "text", "text": "well?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "7."}]},
]


def reward_of(function, **config) -> tuple[list[RewardConfig], dict]:
    use = f"__main__:{function.__name__}"
    return [RewardConfig(use=use, isolation="inline", **config)], {use: function}


def test_the_environments_own_reward_is_a_score_under_its_name() -> None:
    configs, functions = reward_of(lambda completions, **_: [0.5] * len(completions), name="half")
    scorer = scorer_of(FakeHost("Game"), FakeHost("Quiz"), rewards=configs, functions=functions, weight=3.0)
    assert scorer.weights == {"half": 1.0, "Game": 3.0, "Quiz": 3.0}
    mine = group(talk(turn_rewards=[1.0, None, 0.5], outcome=2.0), talk(outcome=None), talk(outcome=-1.0))
    other = group(talk(environment="Quiz", turn_rewards=[0.25]), place=1)
    first, second = with_rewards(scorer.score([mine, other]), scorer.weights)
    rows = [*first.rollouts, *second.rollouts]
    assert [list(r.scores) for r in rows] == [["half", "Game", "Quiz"]] * 4
    assert [r.scores["Game"] for r in rows] == [3.5, None, -1.0, None]
    assert [r.scores["Quiz"] for r in rows] == [None, None, None, 0.25]
    assert [r.reward for r in rows] == [0.5 + 3 * 3.5, 0.5, 0.5 - 3, 0.5 + 0.75]


def test_a_recipe_without_reward_functions() -> None:
    scorer = scorer_of(FakeHost())
    (scored,) = with_rewards(scorer.score([group(talk(outcome=1.0), talk(outcome=0.0))]), scorer.weights)
    assert [r.reward for r in scored.rollouts] == [1.0, 0.0]
    assert rehearse(scorer, [Task(0, "?", (), {})], lambda text: [1]) == []


@pytest.mark.parametrize("names", [("Game", "Game"), ("mine", "other")])
def test_two_of_one_name_are_refused(names: tuple[str, str]) -> None:
    configs, functions = reward_of(lambda completions, **_: [0.0] * len(completions), name="mine")
    with pytest.raises(UserError, match=r"have the name '(Game|mine)'.* give the environment another name"):
        scorer_of(*map(FakeHost, names), rewards=configs, functions=functions)


@pytest.mark.parametrize("kind", ["error", "timeout", "crash", "memory"])
def test_a_conversation_whose_environment_failed_leaves_its_group(kind) -> None:
    """It is shown to no function, is never a zero, and is counted by its kind."""
    seen: list[int] = []

    def count(completions, completion_ids, other, **_):
        seen.append(len(completions))
        assert len(completion_ids) == len(other) == len(completions)
        return [float(i) for i in range(len(completions))]

    configs, functions = reward_of(count, name="count", calls="step")
    scorer = scorer_of(FakeHost(), rewards=configs, functions=functions)
    rows = [group(talk(failed=kind), talk("a", outcome=1.0), talk("b"), other=1), group(talk("c"), place=1, other=2)]
    first, second = with_rewards(scorer.score(rows), scorer.weights)
    broken, *rest = [*first.rollouts, *second.rollouts]
    assert seen == [3]
    assert (broken.failed, broken.reward, broken.scores) == (True, None, {"count": None, "Game": None})
    assert broken.failures == {"Game": Failure(kind, "it is gone")}
    assert [(r.failed, r.scores["count"]) for r in rest] == [(False, 0.0), (False, 1.0), (False, 2.0)]
    assert scorer.failures == {"count": 0, "Game": 1}
    assert scorer.failures_by_kind == {"error": 0, "timeout": 0, "crash": 0, "memory": 0} | {kind: 1}


def test_a_group_of_which_all_failed_is_no_call() -> None:
    called = []
    configs, functions = reward_of(lambda completions, **_: called.append(1) or [0.0], name="one", calls="group")
    scorer = scorer_of(FakeHost(), rewards=configs, functions=functions, max_failure_rate=1)
    scored = scorer.score([group(talk(failed="crash"), talk(failed="crash"))])
    assert called == []
    assert [r.failed for r in scored[0].rollouts] == [True, True]


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_an_environment_that_fails_too_often_stops_the_run(weight: float) -> None:
    """With a weight of 0 too: whatever scores them, broken conversations are not training."""
    configs, functions = reward_of(lambda completions, **_: [0.0] * len(completions), name="fine")
    scorer = scorer_of(FakeHost("tools"), rewards=configs, functions=functions, weight=weight)
    half = group(talk(environment="tools"), talk(environment="tools", failed="timeout"))
    for _ in range(4):
        scorer.score([half])
    most = group(*(talk(environment="tools", failed="timeout") for _ in range(2)))
    with pytest.raises(BrokenRewardError, match=r"environment 'tools' failed in 4 of the last 6 conversations"):
        scorer.score([most])


def test_a_failed_conversation_is_no_completion_though_nothing_is_learnt_from_its_reward() -> None:
    rows = group(talk(failed="crash"), talk())
    assert [r.failed for r in scorer_of(FakeHost(), weight=0).score([rows])[0].rollouts] == [True, False]
    assert [r.failed for r in Scorer({"zero": lambda **_: [0.0]}).score([rows])[0].rollouts] == [True, False]


def test_what_an_environment_has_counted_goes_on_after_a_resume() -> None:
    scorer = scorer_of(FakeHost())
    scorer.score([group(talk(failed="crash"), talk(), talk(), talk(failed="timeout"))])
    again = scorer_of(FakeHost())
    again.load_state(pickle.loads(pickle.dumps(scorer.state())))
    assert again.failures_by_kind == {"error": 0, "timeout": 1, "crash": 1, "memory": 0}
    with pytest.raises(BrokenRewardError, match="3 of the last 5 conversations"):
        again.score([group(talk(failed="memory"))])


def test_a_reward_that_is_no_number_is_a_failure() -> None:
    scorer = scorer_of(FakeHost(), max_failure_rate=1)
    (scored,) = scorer.score([group(talk(outcome=float("nan")), talk(outcome=1.0))])
    assert [r.failed for r in scored.rollouts] == [True, False]
    assert "not a usable number" in scored.rollouts[0].failures["Game"].error


def test_functions_see_what_trl_shows_them() -> None:
    seen = {}

    def spy(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns)
        return [0.0]

    configs, functions = reward_of(spy)
    scorer_of(FakeHost(), rewards=configs, functions=functions).score([group(talk(TALK, turns=3), answer="7")])
    assert seen["prompts"] == [[{"role": "user", "content": "asked"}]]
    assert seen["completions"] == [TALK]
    assert seen["completion_ids"] == [list(range(8))]  # of tools, too
    assert seen["columns"]["answer"] == ["7"]


@pytest.mark.parametrize("declares", [True, False])
def test_a_function_for_texts_reads_what_the_model_said(declares: bool) -> None:
    """And not what a tool said: a right answer there is nobody's."""
    seen = []

    def declared(prompts, completions: list[str], **_):
        seen.extend([*prompts, *completions])
        return [0.0]

    def plain(prompts, completions, **_):
        return declared(prompts, completions)

    configs, functions = reward_of(declared if declares else plain, **({} if declares else {"completions": "text"}))
    scorer_of(FakeHost(), rewards=configs, functions=functions).score([group(talk(TALK))])
    assert seen[-1] == "Let me look.\nIt is 7."
    if not declares:
        assert seen == ["asked", "Let me look.\nIt is 7."]


def test_bundled_rewards_grade_what_the_model_said() -> None:
    tool = {"role": "tool", "name": "look", "content": "\\boxed{7}"}
    scorer = scorer_of(FakeHost(), rewards=[RewardConfig(use="math_answer", isolation="inline")])
    rows = group(talk([CALL, tool]), talk([CALL, tool, {"role": "assistant", "content": "\\boxed{7}"}]), answer="7")
    (scored,) = scorer.score([rows])
    assert [r.scores["math_answer"] for r in scored.rollouts] == [0.0, 1.0]


def test_texts_of_completions() -> None:
    assert said("as it is") == "as it is"
    assert said([{"role": "assistant", "content": "one"}]) == "one"
    assert said([CALL, {"role": "tool", "content": "no"}]) == "Let me look."
    assert said([{"role": "assistant", "content": None}]) == ""
    assert said([{"content": "whoever"}]) == "whoever"


def test_the_rehearsal_shows_conversations() -> None:
    def texts_only(completions, **_):
        return [float(len(text.split())) for text in completions]

    configs, functions = reward_of(texts_only)
    scorer = scorer_of(FakeHost(), rewards=configs, functions=functions)
    with pytest.raises(UserError, match="failed on 4 of 4 trial completions"):
        rehearse(scorer, [Task(0, "?", (), {}), Task(1, "?", (), {})], lambda text: [1])


def test_single_answers_are_as_they_were() -> None:
    scorer = Scorer({"mine": lambda completions, **_: [1.0] * len(completions)})
    assert (scorer.weights, scorer.failures_by_kind, scorer.lends_environments) == ({"mine": 1.0}, {}, False)


def test_where_steps_give_rewards_a_conversation_without_any_has_the_sum_0() -> None:
    """A game that rewards a win alone: whoever was cut off before must not leave the baseline that the winner sets."""
    scorer = scorer_of(FakeHost("Game"), FakeHost("Quiz"))
    rows = [talk(turn_rewards=[None, 1.0]), talk(turn_rewards=[None, None], ended="length"), talk(turn_rewards=[])]
    games = group(*rows, talk(turn_rewards=[None], failed="crash"))
    lost = group(talk(turn_rewards=[None]), place=1)
    other = group(talk(turn_rewards=[None], environment="Quiz"), place=2)
    (before,) = scorer.score([lost])
    assert before.rollouts[0].scores["Game"] is None  # no step has ever given a reward
    first, second, third = with_rewards(scorer.score([games, lost, other]), scorer.weights)
    assert [r.reward for r in first.rollouts] == [1.0, 0.0, None, None]
    assert [r.scores for r in (*second.rollouts, *third.rollouts)] == [
        {"Game": 0.0, "Quiz": None},
        {"Game": None, "Quiz": None},
    ]
    again = scorer_of(FakeHost("Game"), FakeHost("Quiz"))
    again.load_state(scorer.state())
    assert again.score([lost])[0].rollouts[0].scores["Game"] == 0.0
