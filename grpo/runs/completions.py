"""Writer and reader of a run's stored completions: `completions/step-000012.parquet`, a row for each completion.

`fields` is the schema.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from grpo.backend.random import derive_seed
from grpo.backend.secrets import masked
from grpo.config.log import CompletionsConfig
from grpo.data.messages import text_of
from grpo.environments.written import conversation, written
from grpo.errors import UserError
from grpo.runs.spans import characters
from grpo.types import BEHAVIOUR, FAILURES, Failure, Group, Prompt, Rollout, Task, Trajectory

PROMPT = "prompt"
"""Key in the `columns` of a row: the prompt as rewards got it, text or messages."""

UNNAMED = ""
"""The source of a task from an older file, which does not name sources."""


def store_completions(
    folder: Path,
    step: int,
    groups: Sequence[Group],
    setting: CompletionsConfig | None,
    seed: int,
    learnt: int,
    decode: Callable[[int], str] | None = None,
) -> Path | None:
    """Write a step's completions, some of them, or none, as `log.completions` says. Returns the file.

    `groups` are all sampled groups. The first `learnt` of them were trained on; the advantages of the others are stored
    as null. `decode` returns the text of one token; with it, the file stores which part of the text each token is.
    The file is written under a temporary name, synced, and renamed.
    """
    if setting is None or (step - 1) % setting.every:
        return None
    kept = range(len(groups))
    if setting.groups is not None and setting.groups < len(groups):
        draws = random.Random(derive_seed(seed, "completions", step))
        kept = sorted(draws.sample(kept, setting.groups))  # type: ignore[assignment]
    piece = None if decode is None else cache(decode)
    rows = [
        _row(step, g, i, groups[g].task, rollout, learnt=g < learnt, piece=piece)
        for g in kept
        for i, rollout in enumerate(groups[g].rollouts)
    ]
    return _write(folder / f"step-{step:06d}.parquet", rows)


def store_failed(path: Path, step: int, groups: Sequence[Group]) -> Path:
    """Write all completions of the scoring call that ended a run to `path`, each with its failure. Returns `path`."""
    rows = [
        _row(step, g, i, group.task, rollout, learnt=False)
        for g, group in enumerate(groups)
        for i, rollout in enumerate(group.rollouts)
    ]
    return _write(path, rows)


def stored_steps(folder: Path) -> list[Path]:
    """The files of a run's `completions` folder, oldest step first."""
    return sorted(folder.glob("step-*.parquet"))


def read_completions(path: Path) -> tuple[int, list[Group]]:
    """The step of a stored file, and its groups, advantages included (0 for null).

    Token ids of prompts are not stored, so the tasks have none. Raises UserError if `path` is not a file of stored
    completions.
    """
    with _stored(path):
        rows: list[dict[str, Any]] = _table(path).to_pylist()
        by_group: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            by_group.setdefault(row["group"], []).append(row)
        return rows[0]["step"] if rows else 0, [_group(members) for members in by_group.values()]


def read_groups(path: Path, numbers: Iterable[int]) -> Iterator[tuple[int, Group, list[list[int] | None]]]:
    """Yield the groups of a stored file that have these numbers, as `read_completions` returns them, one at a time.

    Each item is the step, the group, and for each completion the number of characters of each token (None: unknown).
    """
    with _stored(path):
        table = _table(path)
        for number in numbers:
            rows: list[dict[str, Any]] = table.filter([one.as_py() == number for one in table["group"]]).to_pylist()
            yield rows[0]["step"], _group(rows), [row.get("characters") for row in rows]


def read_columns(path: Path, names: Sequence[str]) -> list[tuple[Any, ...]]:
    """Columns of a stored file, a tuple for each completion; None for a column that an older file lacks.

    Raises UserError if `path` is not a file of stored completions.
    """
    with _stored(path):
        with _parquet().ParquetFile(path) as file:
            known = set(file.schema_arrow.names)
            table = file.read([name for name in names if name in known])
        columns = [table[name].to_pylist() if name in known else [None] * table.num_rows for name in names]
        return list(zip(*columns, strict=True))


def _table(path: Path) -> Any:
    return _parquet().read_table(path)


def _parquet() -> Any:
    import pyarrow.parquet

    return pyarrow.parquet


@contextmanager
def _stored(path: Path) -> Iterator[None]:
    """Turn errors of a file that cannot be read into a UserError that names the file."""
    import pyarrow as pa

    try:
        yield
    except (OSError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a file of completions that grpo stored: {error}") from error


def fields(rows: Sequence[dict[str, Any]]) -> Any:
    """The pyarrow schema of a step's file: the fixed columns, then the columns of each reward by its name.

    group            index of the group in the step
    index            index of the completion in the group
    source, task     the source of the task and the index of its row (`Task.identity`)
    prompt           what the model got, including what an environment added
    completion       text of the completion
    token_ids        tokens of the completion, stop token included
    logprobs         logprob of each token
    characters       number of characters of `completion` that each token adds; null: unknown
    trained          which tokens the policy sampled and learns from; null: all of them
    begins           indices of tokens at which the conversation continued in a new row after the prompt; null: none
    policy_step      number of steps that the sampling policy had made
    lag              number of steps that the learning policy had made since then
    replayed         whether an earlier step sampled the group and `rollout.reuse` reused it
    reward           weighted sum of the rewards, before `penalty`
    advantage        null for groups that were sampled but not trained on
    turn_advantages  advantages per turn, if turns have their own
    conversation     JSON, the fields of `Conversation`; null for a single answer
    columns          JSON: the dataset's row, and the prompt as rewards got it
    reward/<name>    score of a reward; null if it gave none
    failure/<name>   why the reward failed ("timeout: ...", "error: ..."); null if it did not fail
    extra/<name>     JSON, what the reward logged with `log_extra`
    """
    import pyarrow as pa

    fixed = [
        ("step", pa.int64()),
        ("group", pa.int32()),
        ("index", pa.int32()),
        ("source", pa.string()),
        ("task", pa.int64()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("characters", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.bool_())),
        ("begins", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("policy_step", pa.int32()),
        ("lag", pa.int32()),
        ("replayed", pa.bool_()),
        ("reward", pa.float64()),
        ("penalty", pa.float64()),
        ("advantage", pa.float64()),
        ("turn_advantages", pa.list_(pa.float64())),
        ("conversation", pa.string()),
        ("columns", pa.string()),
    ]
    known = {name for name, _ in fixed}
    own = dict.fromkeys(name for row in rows for name in row if name not in known)
    return pa.schema([*fixed, *((name, pa.float64() if name.startswith("reward/") else pa.string()) for name in own)])


def _write(final: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{final.name}.partial")
    try:
        with aside.open("wb") as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=fields(rows)), file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        aside.rename(final)
    finally:
        aside.unlink(missing_ok=True)
    return final


def _row(
    step: int,
    group: int,
    index: int,
    task: Task,
    rollout: Rollout,
    learnt: bool,
    piece: Callable[[int], str] | None = None,
) -> dict[str, Any]:
    trajectory = rollout.trajectory
    spans = None if piece is None else characters(trajectory.token_ids, trajectory.text, piece)
    return {
        "step": step,
        "group": group,
        "index": index,
        "source": task.source,
        "task": task.index,
        "prompt": _as_text(_prompt(task, trajectory)),
        "completion": _valid(trajectory.text),
        "token_ids": trajectory.token_ids,
        "characters": spans,
        "trained": None if all(trajectory.trained) else trajectory.trained,
        "begins": trajectory.begins or None,
        "logprobs": trajectory.behaviour,
        "finish_reason": trajectory.finish_reason,
        "policy_step": trajectory.policy_step,
        "lag": rollout.lag,
        "replayed": rollout.replayed,
        "reward": rollout.reward,
        "penalty": rollout.penalty,
        "advantage": rollout.advantage if learnt else None,
        "turn_advantages": rollout.turn_advantages if learnt else None,
        "conversation": written(trajectory.conversation),
        "columns": json.dumps({**task.columns, PROMPT: task.prompt}, default=str),
        **{f"reward/{_valid(name)}": score for name, score in rollout.scores.items()},
        **{f"failure/{_valid(name)}": _failed(rollout, name) for name in rollout.scores},
        **{f"extra/{_valid(name)}": masked(json.dumps(value, default=str)) for name, value in rollout.extras.items()},
    }


def _prompt(task: Task, trajectory: Trajectory) -> Prompt:
    """The prompt as the model got it."""
    talk = trajectory.conversation
    return task.prompt if talk is None else list(talk.prompt)


def _failed(rollout: Rollout, name: str) -> str | None:
    """How a reward failed on a completion; None if it did not fail."""
    return _valid(str(rollout.failures[name])) if name in rollout.failures else None


def _group(rows: Sequence[dict[str, Any]]) -> Group:
    return Group(_task(rows[0]), tuple(_rollout(row) for row in rows))


def _task(row: dict[str, Any]) -> Task:
    """The task of a stored row. Older files have no index: it is then derived from the task's columns."""
    columns = json.loads(row["columns"])
    source, index = row.get("source", UNNAMED), row.get("task")
    return Task(derive_seed(0, row["columns"]) if index is None else index, columns[PROMPT], (), columns, source)


def _rollout(row: dict[str, Any]) -> Rollout:
    """The rollout of a stored row.

    It counts as failed only if it has no `reward`: the failure of a reward with weight 0 leaves the weighted sum
    intact. Older files have no `lag`, or a `lag` above 0 only for replayed groups.
    """
    failures = {name: _failure(text) for name, text in _named(row, "failure/").items() if text is not None}
    return Rollout(
        _trajectory(row),
        scores=_named(row, "reward/"),
        failures=failures,
        failed=bool(failures) and row["reward"] is None,
        extras={name: json.loads(text) for name, text in _named(row, "extra/").items() if text is not None},
        reward=row["reward"],
        penalty=row["penalty"],
        advantage=row["advantage"] or 0.0,
        turn_advantages=None if (turns := row.get("turn_advantages")) is None else tuple(turns),
        lag=(lag := row.get("lag") or 0),
        replayed=bool(row.get("replayed", lag > 0)),
    )


def _trajectory(row: dict[str, Any]) -> Trajectory:
    """The trajectory of a stored row. Older files lack `trained` (all), `begins`, `policy_step` and `conversation`."""
    token_ids, trained, logprobs = tuple(row["token_ids"]), row.get("trained"), row["logprobs"]
    return Trajectory(
        token_ids,
        (True,) * len(token_ids) if trained is None else tuple(trained),
        {} if logprobs is None else {BEHAVIOUR: tuple(logprobs)},
        row["completion"],
        row["finish_reason"],
        row.get("policy_step"),
        conversation(row.get("conversation")),
        tuple(row.get("begins") or ()),
    )


def _failure(text: str) -> Failure:
    kind, _, error = text.partition(": ")
    return Failure(kind, error) if kind in FAILURES else Failure("error", text)


def _named(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def _as_text(prompt: Prompt) -> str:
    """A prompt as readable text: messages as `role: content`, with an empty line between them."""
    if isinstance(prompt, str):
        return _valid(prompt)
    return _valid("\n\n".join(f"{message['role']}: {text_of(message)}" for message in prompt))


def _valid(text: str) -> str:
    """The text without lone surrogates, which UTF-8 cannot encode."""
    return text.encode(errors="replace").decode()
