"""Groups whose trajectories have untrained tokens in the middle, made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np

from grpo.model.policy import Policy
from grpo.types import BEHAVIOUR, Group, Rollout, Task, Totals, Trajectory

MASKS = [  # of the completions of two prompts: s sampled and trained, t a tool's
    ["ssttss", "tsts", "sss"],
    ["sstttttt", "tstss", "stss"],
]
REWARDS = [[1.0, 0.0, 0.2], [0.0, 1.0, 3.0]]
LONGEST = 8
GARBAGE = [math.nan, 1e9]


def teacher_forced(policy: Policy, prompt: tuple[int, ...], ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Logprobs and entropies of a row's tokens by the model's own forward pass."""
    logits = policy.model(mx.array([[*prompt, *ids]]))[0, len(prompt) - 1 : -1].astype(mx.float32)
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True), dtype=np.float64)
    return logprobs[range(len(ids)), list(ids)], -(np.exp(logprobs) * logprobs).sum(axis=1)


def made(policy: Policy, filler: float = 7.0, noise: float = 0.1) -> list[Group]:
    """Two groups of three whose `behaviour` is `noise` off the policy's, and `filler` on untrained tokens."""
    draw, groups = np.random.default_rng(0), []
    for g, (masks, rewards) in enumerate(zip(MASKS, REWARDS, strict=True)):
        prompt = tuple(range(10 * g + 5, 10 * g + 8 + g))
        rollouts = []
        for i, (mask, reward) in enumerate(zip(masks, rewards, strict=True)):
            ids = tuple(100 + 7 * g + 3 * i + t for t in range(len(mask)))
            off = teacher_forced(policy, prompt, ids)[0] + draw.normal(0, noise, len(ids))
            trained = tuple(kind == "s" for kind in mask)
            behaviour = tuple(float(x) if kept else filler for x, kept in zip(off, trained, strict=True))
            trajectory = Trajectory(ids, trained, {BEHAVIOUR: behaviour}, "", "stop")
            rollouts.append(Rollout(trajectory, {"r": reward}, reward=reward))
        groups.append(Group(Task(g, "?", prompt, {}), tuple(rollouts)))
    return groups


def rows(groups: list[Group]) -> list[tuple[Task, Rollout]]:
    return [(group.task, rollout) for group in groups for rollout in group.rollouts]


TRAINED = [[mask.count("s") for mask in masks] for masks in MASKS]
TOTALS = Totals(6, 4 + 2 + 3 + 2 + 3 + 3)


def cut(groups: list[Group]) -> list[Group]:
    """The same with the first completion of each group cut off at its limit."""
    first = [
        replace(g.rollouts[0], trajectory=replace(g.rollouts[0].trajectory, finish_reason="length")) for g in groups
    ]
    return [replace(g, rollouts=(one, *g.rollouts[1:])) for g, one in zip(groups, first, strict=True)]


def everywhere(groups: list[Group], column: str, filler: float) -> list[Group]:
    """The same with a column that holds `filler` on untrained tokens, and what `behaviour` holds on others."""

    def filled(rollout: Rollout) -> Rollout:
        t = rollout.trajectory
        values = tuple(x if kept else filler for x, kept in zip(t.columns[BEHAVIOUR], t.trained, strict=True))
        return replace(rollout, trajectory=replace(t, columns={**t.columns, column: values}))

    return [replace(group, rollouts=tuple(map(filled, group.rollouts))) for group in groups]
