"""The curriculum as a source: what it draws, learns and keeps."""

from __future__ import annotations

import json

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
    def make(rows=ROWS, rates=None, seed=0, limit=1024, **settings) -> Curriculum:
        data = DataConfig(source="rows", prompt="question", max_prompt_length=limit)
        stream = TaskStream(rows, PromptRenderer(data, toy[1]), seed)
        return Curriculum(stream, CurriculumConfig(**settings), Solved(("right",)), seed, rates)

    return make


def tried(source: Curriculum, n: int, *scores: float | None) -> Group:
    """A group of the row `n`, with these scores."""
    return Group(source._stream.task(n), tuple(map(rollout, scores)))


def indices(source: Curriculum, n: int) -> list[int]:
    return [task.index for task in source.take(n)]


def counts(source: Curriculum) -> dict[str, float]:
    return {name.removeprefix("curriculum/"): value for name, value in source.metrics().items() if "drawn" not in name}


def test_it_is_a_source_whose_draws_come_from_the_seed(curriculum) -> None:
    source = checked_source(curriculum())
    drawn = indices(source, 40)
    assert drawn == indices(curriculum(), 40) != indices(curriculum(seed=1), 40)
    assert set(drawn) == set(range(6))
    assert len(set(drawn[:6])) < 6  # with replacement


def test_tasks_move_between_pools_as_they_are_solved(curriculum) -> None:
    source = curriculum()
    source.observe([tried(source, 0, 0, 0, 0, 1), tried(source, 1, 0, 1), tried(source, 2, 1, 1)])
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


@pytest.mark.parametrize("state", [{"cursor": 7, "dropped": 2}, {"draws": 9, "tasks": 5, "solve_rates": [""]}])
def test_after_another_source_or_other_rows_it_begins(curriculum, state) -> None:
    source, fresh = curriculum(), curriculum()
    source.load_state(state)
    assert source.state() == fresh.state()


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


def test_a_failure_is_no_zero_and_a_conversation_without_a_reward_is() -> None:
    solved = Solved(("world", "market"), own=True)
    failed = Failure("error", "broke")
    talk = Conversation("world", (), (), failure=failed)
    broken = Rollout(Trajectory((1,), (True,), {}, "", "failed", conversation=talk), {"world": None})
    rollouts = [
        Rollout(WHOLE, {"world": None, "market": 1.0}),
        Rollout(WHOLE, {"world": None, "market": None}),
        Rollout(WHOLE, {"world": None}, {"world": failed}),
        broken,
    ]
    assert [solved.share(one) for one in rollouts] == [1.0, 0.0, None, None]
    assert solved.rate(rollouts) == 0.5
    assert solved.rate(rollouts[2:]) is None
