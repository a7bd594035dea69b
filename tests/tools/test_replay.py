"""Whether a step that was made again is the one that the run stored."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from grpo.config.log import CompletionsConfig
from grpo.runs.completions import store_completions
from grpo.tools.replay import _compared
from grpo.types import Group, Rollout, StepMetrics, Task, Trajectory

GROUP = Group(
    Task(3, "2+2?", (1,), {"answer": "4"}), (Rollout(Trajectory.sampled((5,), (-0.5,), "4", "stop"), reward=1.0),)
)
ELSEWHERE = replace(GROUP, task=replace(GROUP.task, index=4))
SAME, OTHER = "its completions are those that the run stored", "its completions are NOT those of the run"


@pytest.mark.parametrize(("made", "said"), [(GROUP, SAME), (ELSEWHERE, OTHER)])
def test_the_same_tokens_for_another_task_are_another_step(tmp_path: Path, made: Group, said: str) -> None:
    store_completions(tmp_path / "completions", 2, [GROUP], CompletionsConfig(), 0, 1)
    assert _compared(tmp_path, StepMetrics(2, {}, (made,))) == [said]


def test_a_file_that_does_not_say_its_tasks_is_compared_by_its_tokens(tmp_path: Path) -> None:
    path = store_completions(tmp_path / "completions", 2, [GROUP], CompletionsConfig(), 0, 1)
    pq.write_table(pq.read_table(path).drop_columns(["source", "task"]), path)
    assert _compared(tmp_path, StepMetrics(2, {}, (ELSEWHERE,))) == [SAME]
