"""A scoring that is given its groups one by one: whatever their order, the same comes of it, and no call is lost."""

import random
import threading
from contextlib import closing
from itertools import permutations

import pytest

from grpo.config import RewardConfig
from grpo.scoring.contract import Answer
from grpo.scoring.process import DEATHS
from grpo.scoring.scorer import BrokenRewardError, Scorer
from grpo.scoring.session import _gave_up, _in_order
from grpo.types import Group, Rollout, Task, Trajectory

REWARD = '''
import os, time
def score(completions, log_extra=None, log_metric=None, **columns):
    """A text of digits is its score; other words are orders."""
    if "die" in completions:
        os._exit(3)
    if "hang" in completions:
        time.sleep(60)
    if log_metric:
        log_metric("letters", sum(map(len, completions)))
        log_extra("first", [text[:1] for text in completions])
    return [{"none": None, "nan": float("nan")}.get(text, float(len(text))) for text in completions]
def other(completions, log_extra, **columns):
    log_extra("first", [text[-1:] for text in completions])
    return [0.5] * len(completions)
def columns(completions, **columns):
    return [float("extra" in columns) for _ in completions]
def noted(completions, **columns):
    with open("calls", "a") as file:
        print(*completions, file=file)
    return [1.0] * len(completions)
'''


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes scorers of functions in REWARD, by name and settings, and closes them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARD)
    made = []

    def scorer(*functions: str, **settings) -> Scorer:
        configs = [
            RewardConfig(**{"use": f"mine.py:{name}", "calls": "group", "timeout": 20.0, "weight": 0.0, **settings})
            for name in functions
        ]
        made.append(Scorer.of(configs))
        made[-1].begin(1)
        return made[-1]

    yield scorer
    for one in made:
        one.close()


def groups_of(*groups: str) -> list[Group]:
    """A group of each string's words."""
    return [
        Group(
            Task(i, "?", (7,), {"answer": "1"}),
            tuple(Rollout(Trajectory.sampled((1, 2), None, word, "stop")) for word in words.split()),
        )
        for i, words in enumerate(groups)
    ]


def scored(scorer: Scorer, groups: list[Group], order) -> tuple:
    """What comes of it if groups are whole in this order: of the groups, and of what is counted."""
    with scorer.open([group.task for group in groups]) as scoring:
        for place in order:
            scoring.add(place, groups[place])
        found = scorer.score(groups, scoring)
    records = {name: record.state() for name, record in scorer.records.items()}
    clocked = {name: value for name, value in scorer.metrics().items() if not name.startswith("time/")}
    return found, records, clocked


@pytest.mark.parametrize("calls", ["completion", "group", "step"])
def test_whatever_the_order_the_same_comes_of_it(make, calls: str) -> None:
    groups = groups_of("a bb", "ccc none", "nan e", "ffffff g")
    expected = scored(make("score", "other", calls=calls), groups, ())  # all at once, when all are there
    assert scored(make("score", "other", calls=calls), groups, [3, 1, 2]) == expected
    found, _, metrics = expected
    assert [r.scores["score"] for group in found for r in group.rollouts] == [1, 2, 3, None, None, 1, 6, 1]
    assert metrics["rewards/score/failures"] == 1
    assert [r.extras for group in found for r in group.rollouts][:2] == [
        {"first": "a", "other/first": "a"},
        {"first": "b", "other/first": "b"},
    ]


def test_after_three_deaths_in_a_row_the_rest_counts_as_not_tried_in_every_order(make) -> None:
    groups = groups_of("a", "die", "die", "die", "good")
    expected = scored(make("score"), groups, ())
    said = [str(group.rollouts[0].failures.get("score", "")) for group in expected[0]]
    assert said[0] == ""
    assert all("its process ended in this call" in one for one in said[1:4])
    assert "not called: each of the 3 calls before this one" in said[4]
    assert scored(make("score"), groups, [4, 1, 3, 0, 2]) == expected


def test_a_survivor_between_deaths_is_not_passed_over(make) -> None:
    groups = groups_of("die", "die", "good", "die", "fine")
    found, _, _ = scored(make("score"), groups, [3, 1, 0, 4, 2])
    assert [group.rollouts[0].scores["score"] for group in found] == [None, None, 4.0, None, 4.0]


def test_what_need_not_be_tried_is_not_tried() -> None:
    """By hand: three fatal calls in a row among the groups before, of which all must be known."""
    assert DEATHS == 3
    assert _gave_up({0: [True], 1: [True], 2: [True]}, 3)
    assert not _gave_up({0: [True], 1: [True], 2: [True]}, 2)
    assert not _gave_up({0: [True], 2: [True], 3: [True]}, 4)  # group 1 may survive
    assert _gave_up({1: [False, True], 2: [True, True]}, 4)
    assert not _gave_up({1: [True, True, False], 2: [True]}, 3)
    assert not _gave_up({}, 10**9)


@pytest.mark.parametrize("seed", range(20))
def test_not_to_try_never_changes_what_comes_of_it(seed: int) -> None:
    """Calls die by chance. In any order, a skipped group would have counted as not called anyway."""
    chance = random.Random(seed)
    groups = groups_of(*["a b"] * 6)
    fates = [[chance.random() < 0.6 for _ in range(2)] for _ in groups]
    answers = [
        [
            ((i, i + 1), Answer([None if died else 1.0], {0: "died"} if died else {}, fatal=died))
            for i, died in enumerate(f)
        ]
        for f in fates
    ]
    expected = _in_order(answers, groups)
    order = chance.sample(range(6), 6)
    known: dict[int, list[bool]] = {}
    for place in order:
        if _gave_up(known, place):
            first = sum(len(fates[before]) for before in range(place))
            assert all("not called" in answer.failures.get(0, "") for _, answer in expected[first : first + 2])
        elif any(fates[place]):
            known[place] = fates[place]


def test_every_group_is_called_for_once_and_in_the_order_in_which_they_are_whole(make, tmp_path) -> None:
    scorer = make("noted")
    groups = groups_of("a b", "c d", "e f")
    scored(scorer, groups, [2, 0])
    assert (tmp_path / "calls").read_text().splitlines() == ["e f", "a b", "c d"]


def test_a_reward_of_whole_steps_is_called_once_for_all_groups(make, tmp_path) -> None:
    scored(make("noted", calls="step"), groups_of("a b", "c d"), [1, 0])
    assert (tmp_path / "calls").read_text().splitlines() == ["a b c d"]


def test_a_group_is_scored_while_others_are_not_whole(make) -> None:
    scorer = make("score")
    groups = groups_of("a bb", "ccc")
    with scorer.open([group.task for group in groups]) as scoring:
        scoring.add(1, groups[1])
        (future,) = scoring._running[1].values()
        ((span, answer),) = future.result(20)
        assert (span, answer.values) == ((0, 1), [3.0])


def test_a_column_that_only_another_task_has_is_none(make) -> None:
    """As if all had been scored at once: what a function is called with does not depend on who is whole."""
    with closing(make("columns")) as scorer:
        one, other = groups_of("a", "b")
        tasks = [Task(0, "?", (7,), {"answer": "1", "extra": "2"}), other.task]
        one = Group(tasks[0], one.rollouts)
        found, _, _ = scored(scorer, [one, other], [1, 0])
    assert [group.rollouts[0].scores["columns"] for group in found] == [1.0, 1.0]


def test_a_column_belongs_to_the_reward_that_comes_first_in_the_recipe(make) -> None:
    """Whichever is called first."""
    step = RewardConfig(use="mine.py:score", calls="step", weight=0.0)
    group = RewardConfig(use="mine.py:other", calls="group", weight=0.0)
    for rewards, extras in (
        ((step, group), {"first": "a", "other/first": "b"}),
        ((group, step), {"first": "b", "score/first": "a"}),
    ):
        with closing(Scorer.of(rewards)) as scorer:
            found, _, _ = scored(scorer, groups_of("ab cd"), [0])
        assert found[0].rollouts[0].extras == extras


def test_a_broken_reward_tells_of_all_groups(make) -> None:
    groups = groups_of("nan nan", "nan a")
    for order in permutations(range(2)):
        with pytest.raises(BrokenRewardError, match="failed on 3 of the last 4 completions") as error:
            scored(make("score", weight=1.0), groups, order)
        assert [bool(r.failures) for group in error.value.groups for r in group.rollouts] == [True, True, True, False]


def test_what_nobody_waits_for_any_more_is_not_called_and_the_next_scoring_is_served(make, tmp_path) -> None:
    """As after an interrupt: the call under way ends by itself, and the reward goes on with other groups."""
    scorer, release, scorings = make("noted"), threading.Event(), []

    def interrupted() -> None:
        scorer.rewards["noted"].submit(lambda _: release.wait(), None)  # its thread has something to do
        with scorer.open([group.task for group in groups_of("a", "b")]) as opened:
            scorings.append(opened)
            for place, group in enumerate(groups_of("a", "b")):
                opened.add(place, group)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    release.set()
    assert all(future.cancelled() for futures in scorings[0]._running.values() for future in futures.values())
    found, _, _ = scored(scorer, groups_of("c"), [0])
    assert found[0].rollouts[0].scores == {"noted": 1.0}
    assert (tmp_path / "calls").read_text().split() == ["c"]


def test_a_call_s_time_counts_from_when_it_is_made(make) -> None:
    """Groups that had to wait for one that hung until its time was up have all of theirs."""
    found, _, _ = scored(make("score", timeout=1.0), groups_of("hang", "a", "bb"), range(3))
    assert [group.rollouts[0].scores["score"] for group in found] == [None, 1.0, 2.0]
    assert str(found[0].rollouts[0].failures["score"]).startswith("timeout: no answer in 1 s in this call")


def test_progress_counts_completions_that_have_all_their_scores(make) -> None:
    scorer, told = make("score"), []
    scorer.progress = lambda *now: told.append(now)
    scored(scorer, groups_of("a bb", "ccc"), [0])
    assert told == [("reward", 0, 3), ("reward", 2, 3), ("reward", 3, 3)]
