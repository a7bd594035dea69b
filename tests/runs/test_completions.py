"""What a run sampled is stored, and comes back as it was."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs.driver import run, timeless

from grpo.config.log import CompletionsConfig
from grpo.errors import UserError
from grpo.runs.completions import UNNAMED, read_completions, store_completions, stored_steps
from grpo.types import Failure, Group, Rollout, Task, Trajectory

GOOD = Rollout(
    Trajectory.sampled((5, 6, 2), (-0.5, -0.25, -1.0), "four", "stop"),
    scores={"exact": 1.0, "slow": None},
    failures={"slow": Failure("timeout", "no answer in 1 s")},
    extras={"parsed": {"value": 4}},
    reward=1.0,
    penalty=0.125,
    advantage=0.75,
)
BAD = replace(
    GOOD, trajectory=Trajectory.sampled((7,), None, "fi\udc80ve", "length"), scores={"exact": None, "slow": 0.5}
)
CHAT = [{"role": "system", "content": "Count."}, {"role": "user", "content": "2+2?"}]
GROUPS = [
    Group(Task(3, "2+2?", (1,), {"answer": "4", "prompt": "2+2?"}), (GOOD, BAD)),
    Group(Task(9, CHAT, (1,), {"answer": 4}, "extra"), (BAD, replace(GOOD, extras={}, failures={}, reward=None))),
]
ALL = CompletionsConfig()


def store(
    folder: Path, step: int, groups=GROUPS, setting: CompletionsConfig | None = ALL, learnt: int = 2
) -> Path | None:
    return store_completions(folder, step, groups, setting, 0, learnt)


def test_the_schema(tmp_path: Path) -> None:
    path = store(tmp_path / "completions", 12)
    assert path == tmp_path / "completions/step-000012.parquet"
    table = pq.read_table(path)
    double, text = pa.float64(), pa.string()
    assert dict(zip(table.schema.names, table.schema.types, strict=True)) == {
        "step": pa.int64(),
        "group": pa.int32(),
        "index": pa.int32(),
        "source": text,
        "task": pa.int64(),
        "prompt": text,
        "completion": text,
        "token_ids": pa.list_(pa.int32()),
        "characters": pa.list_(pa.int32()),
        "trained": pa.list_(pa.bool_()),
        "begins": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "finish_reason": text,
        "policy_step": pa.int32(),
        "lag": pa.int32(),
        "replayed": pa.bool_(),
        "reward": double,
        "penalty": double,
        "advantage": double,
        "turn_advantages": pa.list_(double),
        "conversation": text,
        "columns": text,
        "reward/exact": double,
        "reward/slow": double,
        "failure/exact": text,
        "failure/slow": text,
        "extra/parsed": text,
    }
    rows = table.to_pylist()
    assert [(row["step"], row["group"], row["index"]) for row in rows] == [
        (12, 0, 0),
        (12, 0, 1),
        (12, 1, 0),
        (12, 1, 1),
    ]
    assert rows[0]["failure/slow"] == "timeout: no answer in 1 s"
    assert (rows[0]["failure/exact"], rows[3]["failure/slow"], rows[3]["reward"]) == (None, None, None)
    assert rows[2]["prompt"] == "system: Count.\n\nuser: 2+2?"
    assert json.loads(rows[2]["columns"]) == {"answer": 4, "prompt": CHAT}
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"
    assert list(path.parent.iterdir()) == [path]


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    step, groups = read_completions(store(tmp_path, 12))
    assert step == 12
    assert groups[0].rollouts[0] == GOOD
    assert groups[0].rollouts[1].trajectory == Trajectory.sampled((7,), None, "fi?ve", "length")
    assert groups[1].task == Task(9, CHAT, (), {"answer": 4, "prompt": CHAT}, "extra")
    assert groups[0].task.identity == ("data", 3)
    assert groups[1].rollouts[1] == GROUPS[1].rollouts[1]


def test_a_failure_counts_where_it_left_no_reward(tmp_path: Path) -> None:
    """The failure of a reward of weight 0 does not."""
    failed, nothing = replace(GOOD, failed=True, reward=None), replace(GOOD, failures={}, reward=None)
    _, (group,) = read_completions(store(tmp_path, 1, [Group(GROUPS[0].task, (GOOD, failed, nothing))]))
    assert [rollout.failed for rollout in group.rollouts] == [False, True, False]


def test_text_that_utf8_cannot_hold_ends_no_run(tmp_path: Path) -> None:
    """Lone surrogates in what a reward logs by `log_extra`: in the name, and in the value."""
    odd = replace(
        GOOD, extras={"a\udc80": 1, "b": "x\udc80", "c": {"\udc80": ["\ud800"]}}, scores={"s\udc80": 1.0}, failures={}
    )
    path = store(tmp_path, 1, [Group(Task(0, "?", (), {"answer\udc80": "\udc80"}), (odd,))])
    _, (group,) = read_completions(path)
    assert group.rollouts[0].extras == {"a?": 1, "b": "x\udc80", "c": {"\udc80": ["\ud800"]}}
    assert group.rollouts[0].scores == {"s?": 1.0}


def test_groups_that_were_not_learnt_from_have_no_advantage(tmp_path: Path) -> None:
    path = store(tmp_path, 1, learnt=1)
    assert [row["advantage"] for row in pq.read_table(path).to_pylist()] == [0.75, 0.75, None, None]


def test_which_steps_and_how_many(tmp_path: Path) -> None:
    every = CompletionsConfig(every=3)
    assert [step for step in range(1, 9) if store(tmp_path, step, GROUPS, every)] == [1, 4, 7]
    assert [path.name for path in stored_steps(tmp_path)] == [f"step-00000{n}.parquet" for n in (1, 4, 7)]
    assert store(tmp_path, 1, GROUPS, None) is None
    groups = [replace(GROUPS[0], task=replace(GROUPS[0].task, index=n)) for n in range(8)]
    one = CompletionsConfig(groups=3)
    kept = [[group.task.index for group in read_completions(store(tmp_path, 5, groups, one))[1]] for _ in "ab"]
    assert kept[0] == kept[1]
    assert len(set(kept[0])) == 3
    assert kept[0] != [group.task.index for group in read_completions(store(tmp_path, 6, groups, one))[1]]


def test_what_is_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "step-000001.parquet"
    path.write_text("no parquet")
    with pytest.raises(UserError, match="not a file of completions that grpo stored"):
        read_completions(path)


def test_a_run_stores_its_steps(recipe) -> None:
    run(recipe, "rollout.dynamic_sampling=1")
    metrics = timeless(Path("runs/toy/metrics.jsonl"))
    for record, path in zip(metrics, stored_steps(Path("runs/toy/completions")), strict=True):
        step, groups = read_completions(path)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        assert (step, len(groups)) == (record["step"], record["num_prompts"])
        assert sum(len(rollout.trajectory.token_ids) for rollout in rollouts) == record["num_tokens"]
        assert sum(rollout.reward for rollout in rollouts) / len(rollouts) == pytest.approx(record["reward"])
        assert sum(abs(rollout.advantage) for rollout in rollouts) > 0


def test_a_file_that_does_not_say_its_tasks_tells_them_apart_by_their_rows(tmp_path: Path) -> None:
    """Files were so before a task was known by its source and index; the prompt alone is not enough."""
    task = GROUPS[0].task
    asked = [replace(task, columns={"answer": answer}) for answer in ("4", "5", "4")]
    path = store(tmp_path, 12, [Group(task, (GOOD,)) for task in asked])
    pq.write_table(pq.read_table(path).drop_columns(["source", "task"]), path)
    first, other, again = (group.task.identity for group in read_completions(path)[1])
    assert first == again != other
    assert first[0] == UNNAMED
