"""The curriculum as a source: what it draws, learns and keeps."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from grpo.config import CurriculumConfig, DataConfig
from grpo.data.curriculum import Curriculum
from grpo.data.prompts import PromptRenderer
from grpo.data.solved import Solved
from grpo.data.source import checked_source
from grpo.data.stream import TaskStream
from grpo.errors import UserError
from grpo.types import Conversation, Failure, Group, Rollout, Trajectory

ROWS = [{"question": f"{n}+2?"} for n in range(6)]
WHOLE = Trajectory((1,), (True,), {}, "", "stop")


def rollout(score: float | None, name: str = "right", **fields) -> Rollout:
    return Rollout(WHOLE, {name: score, "other": 5.0}, **fields)


@pytest.fixture
def curriculum(toy):
    def make(rows=ROWS, rates=None, seed=0, limit=1024, best=1.0, **settings) -> Curriculum:
        data = DataConfig(source="rows", prompt="question", max_prompt_length=limit)
        stream = TaskStream(rows, PromptRenderer(data, toy[1]), seed)
        known = None if rates is None else np.array([rates.get(n, np.nan) for n in range(len(rows))])
        return Curriculum(stream, CurriculumConfig(**settings), Solved(("right",), best=best), seed, known)

    return make


def tried(source: Curriculum, n: int, *scores: float | None) -> Group:
    """A group of the row `n`, with these scores."""
    return Group(source._stream.task(n), tuple(map(rollout, scores)))


def indices(source: Curriculum, n: int) -> list[int]:
    return [task.index for task in source.take(n)]


def counts(source: Curriculum) -> dict[str, float]:
    told = {name.removeprefix("curriculum/"): value for name, value in source.metrics().items()}
    return {name: value for name, value in told.items() if "/" not in name}


def test_it_is_a_source_whose_draws_come_from_the_seed(curriculum) -> None:
    source = checked_source(curriculum())
    drawn = indices(source, 40)
    assert drawn == indices(curriculum(), 40) != indices(curriculum(seed=1), 40)
    assert set(drawn) == set(range(6))
    assert len(set(drawn[:6])) < 6  # with replacement


def test_tasks_move_between_pools_as_they_are_solved(curriculum) -> None:
    source = curriculum()
    source.observe([tried(source, 0, *[0] * 15, 1), tried(source, 1, 0, 1), tried(source, 2, 1, 1)])
    assert counts(source) == {"hard": 1, "normal": 1, "easy": 1, "unseen": 3, "dropped_prompts": 0}
    source.observe([tried(source, 0, 1, 1)])
    assert counts(source) == {"hard": 0, "normal": 1, "easy": 2, "unseen": 3, "dropped_prompts": 0}


def test_a_task_without_a_score_stays_and_one_sampled_twice_has_the_rate_of_both(curriculum) -> None:
    source = curriculum(rates={0: 0.5})
    source.observe([tried(source, 0, None, None), tried(source, 1, 0, 0), tried(source, 1, 1, 1)])
    assert counts(source) == {"hard": 0, "normal": 2, "easy": 0, "unseen": 4, "dropped_prompts": 0}


def test_tasks_of_other_sources_are_not_counted(curriculum) -> None:
    source = curriculum()
    group = tried(source, 0, 1)
    source.observe([Group(type(group.task)(0, "", (), {}, "another"), group.rollouts)])
    assert counts(source)["unseen"] == 6


def test_draws_of_a_step_are_told_by_pool(curriculum) -> None:
    """Two takes make a step, as with dynamic sampling; what was drawn before the last observation is forgotten."""
    source = curriculum(rates={n: 0.5 for n in range(6)})
    source.take(3)
    source.observe([tried(source, n, 1) for n in range(6)])
    shares = {name: value for name, value in source.metrics().items() if "drawn" in name}
    assert shares == {
        f"curriculum/drawn/{pool}": float(pool == "normal") for pool in ("hard", "normal", "easy", "unseen")
    }
    source.take(3)
    source.observe([tried(source, n, 0.5) for n in range(6)])
    source.take(1)
    source.take(1)
    assert source.metrics()["curriculum/drawn/normal"] == 1


def test_a_resumed_curriculum_goes_on_to_the_letter(curriculum) -> None:
    whole, first, second = curriculum(), curriculum(), curriculum()
    for source in (whole, first):
        for step in range(3):
            source.observe([tried(source, task.index, 0, step / 2) for task in source.take(2)])
    kept = first.state()
    text = json.dumps(kept)
    first.observe([tried(first, 0, 1)])
    assert json.dumps(kept) == text
    second.take(1)  # of a step that was broken off
    second.load_state(json.loads(text))
    assert second.state() == whole.state()
    assert indices(second, 20) == indices(whole, 20)
    assert second.metrics() == whole.metrics()
    assert second.metrics()["curriculum/drawn/unseen"] < 1


def test_after_another_source_it_begins(curriculum) -> None:
    source, fresh = curriculum(), curriculum()
    source.load_state({"cursor": 7, "dropped": 2})
    assert source.state() == fresh.state()


@pytest.mark.parametrize(
    ("other", "named"),
    [({"rows": ROWS[::-1]}, "rows"), ({"limit": 900}, "prompts"), ({"best": 2.0, "rows": ROWS[:5]}, "rows and best")],
)
def test_over_other_tasks_or_another_measure_it_begins_and_says_so(curriculum, caplog, other, named) -> None:
    former, source, fresh = curriculum(), curriculum(**other), curriculum(**other)
    former.observe([tried(former, 0, 1)])
    source.load_state(former.state())
    assert source.state() == fresh.state()
    assert f"starts from scratch, because the checkpoint's solve rates are of other {named}" in caplog.text


def test_other_weights_and_thresholds_take_the_rates_over(curriculum) -> None:
    former, source = curriculum(), curriculum(hard=0, hard_threshold=0.5, easy_threshold=0.5)
    former.observe([tried(former, 0, 0, 1), tried(former, 1, 1, 1)])
    source.load_state(former.state())
    assert counts(source) == {"hard": 1, "normal": 0, "easy": 1, "unseen": 4, "dropped_prompts": 0}
    assert 0 not in indices(source, 100)


def test_the_metrics_have_the_histogram(curriculum) -> None:
    told = curriculum(rates={0: 0.0, 1: 0.25, 2: 1.0, 3: 0.9}).metrics()
    rates = {name.rpartition("/")[2]: value for name, value in told.items() if "solve_rate" in name}
    assert {name: value for name, value in rates.items() if value} == {"00": 1, "20": 1, "90": 2}
    assert list(rates) == [f"{percent:02}" for percent in range(0, 100, 10)]


def test_a_checkpoint_s_rates_take_the_place_of_the_file_s(curriculum) -> None:
    known = {n: 1.0 for n in range(3)}
    whole, source = curriculum(rates=known), curriculum(rates=known)
    whole.observe([tried(whole, n, 0) for n in range(2)])
    source.load_state(json.loads(json.dumps(whole.state())))
    assert counts(source) == {"hard": 2, "normal": 0, "easy": 1, "unseen": 3, "dropped_prompts": 0}
    assert indices(source, 30) == indices(whole, 30)


def test_100_000_draws_follow_the_weights_of_single_tasks(curriculum) -> None:
    """χ² of the draws of a curriculum over 40 tasks in all pools: 39 degrees of freedom, 72.05 at a chance of 0.001."""
    rows = [{"question": f"{n}+2?"} for n in range(40)]
    rates = {n: n / 29 for n in range(30)}
    source = curriculum(rows, rates)
    weights = [0.1 if n / 29 <= 0.1 else 1 if n / 29 <= 0.9 else 0.2 for n in range(30)] + [1] * 10
    drawn = Counter(source._draw() for _ in range(100_000))
    expected = [100_000 * weight / sum(weights) for weight in weights]
    assert sum((drawn[n] - e) ** 2 / e for n, e in enumerate(expected)) < 72.05


def test_no_pool_is_ever_used_up(curriculum) -> None:
    """A hundred steps in which all that is sampled is solved: every task is easy, and all of them still come up."""
    source = curriculum()
    for _ in range(100):
        source.observe([tried(source, task.index, 1) for task in source.take(2)])
    assert counts(source)["easy"] == 6
    assert set(indices(source, 200)) == set(range(6))


def test_rows_with_one_prompt_are_tasks_with_rates_of_their_own(curriculum) -> None:
    source = curriculum([{"question": "2+2?"}] * 3)
    source.observe([tried(source, 0, 1), tried(source, 2, 0)])
    assert counts(source) == {"hard": 1, "normal": 0, "easy": 1, "unseen": 1, "dropped_prompts": 0}


def test_a_step_may_have_more_tasks_than_there_are(curriculum) -> None:
    assert indices(curriculum(ROWS[:1]), 5) == [0] * 5


def test_the_stream_begins_after_a_curriculum(curriculum) -> None:
    source = curriculum()
    stream = source._stream
    source.take(3)
    stream.take(2)
    stream.load_state(source.state())
    assert stream.state() == {"cursor": 0, "dropped": 0}


def test_prompts_that_are_null_or_too_long_are_left_out_once(curriculum, toy) -> None:
    rows = [{"question": text} for text in ("2+2?", None, "long " * 50)]
    source = curriculum(rows, limit=len(toy[1].encode("2+2?")) + 30)
    assert set(indices(source, 30)) == {0}
    assert counts(source) == {"hard": 0, "normal": 0, "easy": 0, "unseen": 1, "dropped_prompts": 2}
    with pytest.raises(UserError, match="every prompt is null or longer"):
        curriculum(rows, limit=1).take(1)


def test_nothing_left_to_draw_says_where_the_tasks_are(curriculum) -> None:
    source = curriculum(rates={n: 1.0 for n in range(5)} | {5: 0.0}, easy=0, hard=0)
    with pytest.raises(UserError, match=r"\(1 hard, 5 easy\) have the weight 0.*data.curriculum.hard=0.1"):
        source.take(1)


@pytest.mark.parametrize(
    ("score", "best", "share"), [(0.5, 1, 0.5), (1.5, 1, 1), (-1, 1, 0), (5, 10, 0.5), (None, 1, None)]
)
def test_a_share_is_of_the_best_score(score, best, share) -> None:
    assert Solved(("right",), best=best).share(rollout(score)) == share


def talk(world: str, score: float | None, **fields) -> Rollout:
    """A conversation with an environment, which gave it this score."""
    said = Conversation(world, (), (), failure=fields.pop("broke", None))
    return Rollout(Trajectory((1,), (True,), {}, "", "done", conversation=said), {world: score}, **fields)


def test_a_failure_is_no_zero_and_a_conversation_without_a_reward_is() -> None:
    solved, failed = Solved(("world", "market"), own=True), Failure("error", "broke")
    rollouts = [
        talk("market", 1.0),
        talk("market", None),
        talk("world", None, failures={"world": failed}),
        talk("world", None, broke=failed),
    ]
    assert [solved.share(one) for one in rollouts] == [1.0, 0.0, None, None]
    assert solved.rate(rollouts) == 0.5
    assert solved.rate(rollouts[2:]) is None


def test_a_conversation_of_an_environment_that_does_not_grade_says_nothing() -> None:
    solved = Solved(("world",), own=True)
    assert [solved.share(talk("world", None)), solved.share(talk("market", 1.0))] == [0.0, None]


def test_a_group_with_holes_has_the_rate_of_what_was_scored() -> None:
    assert Solved(("right",)).rate([rollout(1.0), rollout(None), rollout(0.5)]) == 0.75
