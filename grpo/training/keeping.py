"""A compact form of a scored group, as arrays and JSON, for memory and for checkpoints (exact to the bit).

Python lists of numbers take about 70 bytes per token; this form takes 9, or 13 with sampling filters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from grpo.backend.secrets import masked
from grpo.environments.written import conversation, written
from grpo.training.state import Arrays
from grpo.types import Failure, Group, Rollout, Task, Trajectory

ABOUT, IDS, TRAINED, VALUES = "about", "ids", "trained", "values"


@dataclass(frozen=True, slots=True)
class OlderGroup:
    """A scored group, and how often it was replayed.

    policy_step  number of steps that the sampling policy had made
    replays      number of times that the group was replayed
    about        JSON: texts, scores and lengths
    ids          int32: the prompt's tokens, then those of every completion, without gaps
    trained      uint8: the masks of all completions
    values       float32: the columns of the first completion, then those of the second, and so on

    Raw scores are kept, so that rewards and advantages can be recomputed. Logged values are dropped, because metrics
    do not cover replayed groups. Values of the dataset's row that JSON cannot represent are stored as text.
    """

    policy_step: int
    replays: int
    about: str
    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.uint8]
    values: npt.NDArray[np.float32]

    @classmethod
    def of(cls, group: Group) -> OlderGroup:
        """The compact form of a group. All its completions must come from the same policy."""
        trajectories = [rollout.trajectory for rollout in group.rollouts]
        (policy_step,) = {trajectory.policy_step for trajectory in trajectories}
        assert policy_step is not None, "groups sampled in training have a policy step"
        ids = [group.task.prompt_ids, *(trajectory.token_ids for trajectory in trajectories)]
        about = {"task": _about_task(group.task), "rollouts": [_about(rollout) for rollout in group.rollouts]}
        return cls(
            policy_step,
            0,
            json.dumps(about, default=str),
            _joined(ids, np.int32),
            _joined([trajectory.trained for trajectory in trajectories], np.uint8),
            _joined([values for one in trajectories for values in one.columns.values()], np.float32),
        )

    def group(self) -> Group:
        """The group in its usual form."""
        about = json.loads(self.about)
        ids, trained, values = _Reader(self.ids), _Reader(self.trained), _Reader(self.values)
        task = dict(about["task"])
        prompt_ids = tuple(ids.take(task.pop("length")))
        rollouts = tuple(_rollout(one, self.policy_step, ids, trained, values) for one in about["rollouts"])
        return Group(Task(prompt_ids=prompt_ids, **task), rollouts)


def pack(kept: Sequence[OlderGroup]) -> dict[str, mx.array]:
    """The groups as four arrays for a checkpoint; no arrays if there are no groups.

    Floats are stored as int32 with the same bits, because values at untrained tokens may be NaN, which the check for
    NaN in checkpoints would reject.
    """
    if not kept:
        return {}
    about = json.dumps(
        [
            {
                "policy_step": one.policy_step,
                "replays": one.replays,
                "about": one.about,
                "sizes": [one.ids.size, one.trained.size, one.values.size],
            }
            for one in kept
        ]
    )
    return {
        ABOUT: mx.array(np.frombuffer(about.encode("ascii"), np.uint8)),
        IDS: mx.array(np.concatenate([one.ids for one in kept])),
        TRAINED: mx.array(np.concatenate([one.trained for one in kept])),
        VALUES: mx.array(np.concatenate([one.values for one in kept]).view(np.int32)),
    }


def unpack(arrays: Arrays) -> tuple[OlderGroup, ...]:
    """The inverse of `pack`."""
    if not arrays:
        return ()
    about = json.loads(np.array(arrays[ABOUT]).tobytes().decode("ascii"))
    ids, trained = _Reader(np.array(arrays[IDS])), _Reader(np.array(arrays[TRAINED]))
    values = _Reader(np.array(arrays[VALUES]).view(np.float32))
    return tuple(
        OlderGroup(one["policy_step"], one["replays"], one["about"], *_cut(one["sizes"], ids, trained, values))
        for one in about
    )


class _Reader:
    """Reads an array from front to back, part by part."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array, self._place = array, 0

    def part(self, length: int) -> npt.NDArray[Any]:
        """The next `length` numbers."""
        self._place += length
        return self._array[self._place - length : self._place]

    def take(self, length: int) -> list[Any]:
        """The next `length` numbers, as Python numbers."""
        found: list[Any] = self.part(length).tolist()
        return found


def _cut(sizes: Sequence[int], *readers: _Reader) -> list[npt.NDArray[Any]]:
    return [reader.part(size).copy() for size, reader in zip(sizes, readers, strict=True)]


def _joined(parts: Sequence[Sequence[float]], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *(np.array(part, dtype) for part in parts)])


def _about_task(task: Task) -> dict[str, Any]:
    return {
        "index": task.index,
        "prompt": task.prompt,
        "columns": dict(task.columns),
        "source": task.source,
        "length": len(task.prompt_ids),
    }


def _about(rollout: Rollout) -> dict[str, Any]:
    trajectory = rollout.trajectory
    return {
        "length": len(trajectory.token_ids),
        "columns": list(trajectory.columns),
        "text": trajectory.text,
        "finish_reason": trajectory.finish_reason,
        "begins": trajectory.begins,
        "conversation": written(trajectory.conversation),
        "scores": dict(rollout.scores),
        "failures": {name: _about_failure(failure) for name, failure in rollout.failures.items()},
        "extras": masked(json.dumps(dict(rollout.extras), default=str)),
        "failed": rollout.failed,
    }


def _about_failure(failure: Failure) -> dict[str, str]:
    return {"kind": failure.kind, "error": failure.error}


def _rollout(about: Mapping[str, Any], policy_step: int, ids: _Reader, trained: _Reader, values: _Reader) -> Rollout:
    length = about["length"]
    trajectory = Trajectory(
        tuple(ids.take(length)),
        tuple(map(bool, trained.take(length))),
        {name: tuple(values.take(length)) for name in about["columns"]},
        about["text"],
        about["finish_reason"],
        policy_step,
        conversation(about["conversation"]),
        tuple(about["begins"]),
    )
    return Rollout(
        trajectory,
        about["scores"],
        {name: Failure(**failure) for name, failure in about["failures"].items()},
        json.loads(about["extras"]),
        failed=about["failed"],
    )
