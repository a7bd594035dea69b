"""The completions in the page: a selection within a limit of bytes, spread over a run's steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from grpo.data.messages import text_of
from grpo.environments.shown import told
from grpo.runs.completions import read_columns, read_groups, stored_steps
from grpo.runs.folder import COMPLETIONS, FAILED
from grpo.telemetry.page.text import PageJson, counts, number, shortened, size_of, spans_of, surprises
from grpo.telemetry.recorded import RecordedRun
from grpo.types import Rollout, Task, Trajectory

MOST_BYTES = 2_400_000
"""Maximum number of bytes of completions in a page, over all runs."""
STEPS = 24
"""Maximum number of steps whose completions are shown, spread evenly from the first to the last."""
FOLLOWED, TIMES = 8, 6
"""Number of prompts that are shown at several steps (the most frequently sampled ones), and number of these steps."""
GROUPS_AT_LEAST = 24
"""Minimum number of groups with room in the page: a large group shows only its best and worst completions."""
LONGEST_TEXT, LONGEST_PROMPT, LONGEST_VALUE = 20_000, 8_000, 300
"""Maximum number of characters of a completion, of a prompt's message, and of a data column."""
FULL_MESSAGES = 4
"""Number of a prompt's messages that may each have `LONGEST_PROMPT` characters; more messages share this room."""

StoredGroup = tuple[Path, int]
"""A stored step's file, and the number of a group in it."""


def browsed(run: RecordedRun, sharing: int = 1) -> PageJson | None:
    """A selection of a run's completions, within its share of the page's bytes; None if no completions are stored. It
    includes the completions of a step that a broken reward ended.

    stored    number of stored steps
    total     number of stored completions; replayed groups count only at the step that sampled them
    prompts   [[[role, text], …], …] as the model saw them; the role of a plain prompt is empty
    tasks     [{"source", "index", "columns": {name: text}}, …]
    rows      the completions, by step:
        step, group, index   position of the completion
        prompt, task         indices into `prompts` and `tasks`
        reward, advantage, penalty, scores, failures, extras   of `Rollout`; the last three by name, absent if empty
        tokens               number of trained tokens
        finish               finish reason
        text                 everything after the prompt, only beginning and end if it is long; absent for a long
                             conversation
        turns                of a conversation, [{"who", "text", "calls", "reward", "advantage"}, …]
        characters           number of characters of each token in `text`, see `text.counts`; absent if unknown
        trained              see `text.spans_of`; absent if all tokens are trained
        columns              {name: digits, one per token}: `surprise` is -log p at sampling time, in nats, see
                             `text.surprises`
        turn_advantages      advantage of each turn of the policy; absent if turns have no advantages of their own
    """
    failed = run.folder / FAILED
    paths = [*stored_steps(run.folder / COMPLETIONS), *([failed] if failed.exists() else [])]
    if not paths:
        return None
    stored = {path: _known(path, path.stat().st_mtime_ns) for path in paths}
    shelf = _Shelf(MOST_BYTES // sharing)
    groups = {path: known for path, (_, known) in stored.items() if known}
    half = shelf.room // 2
    for path, numbers in _followed(groups).items():
        shelf.add(path, numbers, shelf.room - half)
    steps = _spread(list(groups), STEPS)
    for place, path in enumerate(steps):
        shelf.add(path, list(groups[path]), shelf.room // (len(steps) - place))
    return {
        "stored": len(paths),
        "total": sum(completions for completions, _ in stored.values()),
        "prompts": shelf.prompts,
        "tasks": shelf.tasks,
        "rows": sorted(shelf.rows, key=lambda row: (row["step"], row["group"], row["index"])),
    }


KnownGroups = dict[int, tuple[str, Any]]
"""The task of each group that a step sampled, without replayed groups."""


@lru_cache(maxsize=4096)
def _known(path: Path, written: int) -> tuple[int, KnownGroups]:
    """The number of completions in a stored file, and its groups. Reads only a few columns, which is much faster than
    reading the whole file. Groups that the step replayed are left out: they are in an earlier step's file.

    A live page asks repeatedly; the cache key `written` (modification time in ns) avoids reading a file twice.
    """
    del written
    columns = read_columns(path, ("group", "source", "task", "lag", "replayed"))
    own = [row[:3] for *row, lag, replayed in columns if not (lag if replayed is None else replayed)]
    return len(own), {
        group: (source or "", (path.name, group) if task is None else task) for group, source, task in own
    }


def _followed(groups: Mapping[Path, KnownGroups]) -> dict[Path, list[int]]:
    """The groups of the most frequently sampled prompts, at `TIMES` steps per prompt, by file."""
    seen: dict[tuple[str, Any], list[StoredGroup]] = {}
    for path, known in groups.items():
        for group, task in known.items():
            seen.setdefault(task, []).append((path, group))
    often = sorted((places for places in seen.values() if len(places) > 1), key=lambda places: -len(places))
    found: dict[Path, list[int]] = {}
    for path, group in sorted(place for places in often[:FOLLOWED] for place in _spread(places, TIMES)):
        found.setdefault(path, []).append(group)
    return found


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` items, spread evenly from the first to the last."""
    return [items[place] for place in sorted({round(i * (len(items) - 1) / max(1, most - 1)) for i in range(most)})]


@dataclass
class _Shelf:
    """The selected completions; `room` is the number of bytes left."""

    room: int
    prompts: list[list[list[str]]] = field(default_factory=list)
    tasks: list[PageJson] = field(default_factory=list)
    rows: list[PageJson] = field(default_factory=list)
    places: dict[Any, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.most = self.room // GROUPS_AT_LEAST
        """Maximum number of bytes for one group."""

    def add(self, path: Path, numbers: Sequence[int], most: int) -> None:
        """Add the groups `numbers` of a file that are not selected yet, within `most` bytes; a large group adds only
        its best and worst completions."""
        missing, least = [place for place in numbers if (path, place) not in self.places], self.room - most
        for place, (step, group, spans) in zip(missing, read_groups(path, missing), strict=False):
            left, begun = self.most, len(self.rows)
            where = {"step": step, "group": place, "prompt": 0, "task": 0}
            for rank, index in enumerate(_outermost(group.rollouts)):
                rollout = group.rollouts[index]
                named = {"prompts": _prompt(group.task, rollout.trajectory), "tasks": _task(group.task)}
                row = {**where, "index": index, **_scored(rollout), **_said(rollout, spans[index])}
                size, shared = size_of(row), sum(self._new_size(*one) for one in named.items())
                if self.room - size - shared < least or (rank > 1 and size > left):
                    break
                row["prompt"], row["task"] = (self._placed(*one) for one in named.items())
                self.rows.append(row)
                self.room -= size
                left -= size
            if len(self.rows) == begun:
                return
            self.places[path, place] = begun

    def _new_size(self, name: str, value: Any) -> int:
        """The number of bytes that adding a value to a list takes; 0 if the list has the value."""
        return 0 if (name, repr(value)) in self.places else size_of(value)

    def _placed(self, name: str, value: Any) -> int:
        """The index of a value in a list; the value is added if the list does not have it."""
        known, key = getattr(self, name), (name, repr(value))
        if key not in self.places:
            self.places[key] = len(known)
            known.append(value)
            self.room -= size_of(value)
        return self.places[key]


def _outermost(rollouts: Sequence[Rollout]) -> list[int]:
    """Indices of the best completion, the worst, the second best, …; a completion without a reward counts as worst."""
    rewards = [float("-inf") if rollout.reward is None else rollout.reward for rollout in rollouts]
    rated = sorted(range(len(rollouts)), key=lambda i: (-rewards[i], i))
    return [rated[(i // 2) if i % 2 == 0 else -1 - i // 2] for i in range(len(rated))]


def _prompt(task: Task, trajectory: Trajectory) -> list[list[str]]:
    talk = trajectory.conversation
    prompt = task.prompt if talk is None or not talk.prompt else list(talk.prompt)
    if isinstance(prompt, str):
        return [["", shortened(prompt, LONGEST_PROMPT)]]
    longest = min(LONGEST_PROMPT, FULL_MESSAGES * LONGEST_PROMPT // max(1, len(prompt)))
    return [[str(message["role"]), shortened(text_of(message), longest)] for message in prompt]


def _task(task: Task) -> PageJson:
    columns = {str(name): str(value) for name, value in task.columns.items() if name != "prompt"}
    short = {name: shortened(value, LONGEST_VALUE) for name, value in columns.items()}
    return {"source": task.source, "index": task.index, "columns": short}


def _scored(rollout: Rollout) -> PageJson:
    named = {
        "scores": {name: number(score) for name, score in rollout.scores.items()},
        "failures": {name: shortened(str(failure), 2 * LONGEST_VALUE) for name, failure in rollout.failures.items()},
        "extras": {name: shortened(str(value), LONGEST_VALUE) for name, value in rollout.extras.items()},
    }
    return {
        "reward": number(rollout.reward),
        "advantage": number(rollout.advantage),
        **({"penalty": number(rollout.penalty)} if rollout.penalty else {}),
        "tokens": rollout.trajectory.trained_tokens,
        "finish": rollout.trajectory.finish_reason,
        **{name: value for name, value in named.items() if value},
    }


def _said(rollout: Rollout, spans: list[int] | None) -> PageJson:
    """The text of a completion or of its turns, and its per-token columns."""
    trajectory = rollout.trajectory
    whole = len(trajectory.text) <= LONGEST_TEXT
    said: PageJson = {} if trajectory.conversation is None else {"turns": _turns(rollout)}
    if trajectory.conversation is None or whole:
        said["text"] = shortened(trajectory.text, LONGEST_TEXT)
    if spans is not None and whole and not trajectory.begins:
        said["characters"] = counts(spans)
        if not all(trajectory.trained):
            said["trained"] = spans_of(trajectory.trained)
        if trajectory.behaviour is not None:
            said["columns"] = {"surprise": surprises(trajectory.behaviour, trajectory.trained)}
        if rollout.turn_advantages is not None:
            said["turn_advantages"] = [number(value) for value in rollout.turn_advantages]
    return said


def _turns(rollout: Rollout) -> list[PageJson]:
    turns = []
    for said in told(rollout):
        turn: PageJson = {"who": said.who, "text": shortened(said.text, LONGEST_TEXT)}
        turn |= {"calls": list(said.calls)} if said.calls else {}
        turn |= {} if said.reward is None else {"reward": number(said.reward)}
        turn |= {} if said.advantage is None else {"advantage": number(said.advantage)}
        turns.append(turn)
    return turns
