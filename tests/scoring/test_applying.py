"""Rewards that score the tasks of some sources alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from grpo.config import RewardConfig
from grpo.errors import UserError
from grpo.scoring.applying import Applying
from grpo.scoring.scorer import BrokenRewardError, Scorer
from grpo.types import Group, Rollout, Task, Trajectory

CODE = """
def of_math(prompts, completions, completion_ids, answer):
    return [float(text == right) for text, right in zip(completions, answer)]

def of_code(prompts, completions, completion_ids, tests):
    return [float(len(text)) for text in completions]

def of_all(completions, **columns):
    return [float("answer" in columns and "tests" in columns)] * len(completions)

def ends(completions, **columns):
    import os
    os._exit(1)
"""
ONLY = Applying({"math": ["of_math", "of_all", "ends"], "code": ["of_code", "of_all"]})


def group(source: str, *texts: str) -> Group:
    columns = {"math": {"answer": "4"}, "code": {"tests": "assert"}}.get(source, {})
    rollouts = tuple(Rollout(Trajectory.sampled((1,), None, text, "stop")) for text in texts)
    return Group(Task(0, "?", (), columns, source), rollouts)


GROUPS = [group("code", "ab", "c"), group("math", "4", "5"), group("code", "abc", ""), group("math", "4", "4")]


@pytest.fixture(params=["step", "group", "completion", "inline"])
def scorer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scorer]:
    (tmp_path / "mine.py").write_text(CODE)
    how = {"isolation": "inline"} if request.param == "inline" else {"calls": request.param}
    names = ("of_math", "of_code", "of_all")
    configs = [RewardConfig(use=f"{tmp_path}/mine.py:{name}", **how) for name in names]
    with closing(Scorer.of(configs, applies=ONLY)) as made:
        yield made


def test_a_reward_is_called_for_its_sources_alone_with_their_columns(scorer: Scorer) -> None:
    """A column that another source has is an unexpected argument of `of_math`; a reward of both gets both."""
    scored = scorer.score(GROUPS)
    found = [[tuple(rollout.scores.values()) for rollout in group.rollouts] for group in scored]
    assert found == [
        [(None, 2.0, 1.0), (None, 1.0, 1.0)],
        [(1.0, None, 1.0), (0.0, None, 1.0)],
        [(None, 3.0, 1.0), (None, 0.0, 1.0)],
        [(1.0, None, 1.0), (1.0, None, 1.0)],
    ]
    assert not any(rollout.failures for group in scored for rollout in group.rollouts)


def test_the_order_in_which_groups_become_whole_changes_nothing(scorer: Scorer) -> None:
    with scorer.open([group.task for group in GROUPS]) as scoring:
        for place in (3, 0, 2, 1):
            scoring.add(place, GROUPS[place])
        early = scorer.score(GROUPS, scoring)
    assert [g.rollouts for g in early] == [g.rollouts for g in scorer.score(GROUPS)]


def test_a_step_without_a_reward_s_tasks_does_not_call_it(scorer: Scorer) -> None:
    scored = scorer.score(GROUPS[:1])
    assert [tuple(rollout.scores.values()) for rollout in scored[0].rollouts] == [(None, 2.0, 0.0), (None, 1.0, 0.0)]
    assert not scorer.records["of_math"].seconds


def test_tasks_of_a_source_that_names_no_rewards_are_scored_by_all(scorer: Scorer) -> None:
    """Held-out tasks, say: what does not fit them fails."""
    with pytest.raises(BrokenRewardError, match="'of_math' failed on 1 of the last 1") as broken:
        scorer.score([group("eval", "a")])
    assert set(broken.value.groups[0].rollouts[0].failures) == {"of_math", "of_code"}


def test_a_reward_that_ends_its_process_does_not_count_groups_that_are_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    config = RewardConfig(use=f"{tmp_path}/mine.py:ends", calls="group", weight=0.0)
    with closing(Scorer.of([config], applies=ONLY)) as scorer:
        scored = scorer.score(GROUPS)
        assert [len(group.rollouts[0].failures) for group in scored] == [0, 1, 0, 1]
        assert scorer.failures == {"ends": 4}


def test_the_first_reward_that_scores_a_source_grades_it(scorer: Scorer) -> None:
    assert scorer.graders("math") == ["of_math"]
    assert scorer.graders("code") == ["of_code"]
    assert scorer.graders("eval") == ["of_math"]


def test_columns_are_checked_for_the_rewards_of_their_source(scorer: Scorer) -> None:
    scorer.check(["tests"], "code")
    with pytest.raises(UserError, match=r"reward 'of_code'.*'tests'.*These are the columns of the source 'code'"):
        scorer.check(["answer"], "code")
    with pytest.raises(UserError, match=r"write columns: \{tests: THAT_NAME\} in the source 'code'\. These are"):
        scorer.check(["answer"], "code")


def test_a_name_that_no_reward_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"'math': the recipe has no reward 'of_mat'\. .*Did you mean 'of_math'"):
        Applying({"math": ["of_mat"]}).check(["of_math", "of_code"])
