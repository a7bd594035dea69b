"""Calls each reward once on made-up completions, so that a dry run finds the errors of the first step."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from grpo.backend.secrets import masked
from grpo.errors import UserError
from grpo.scoring.hosted import Hosted
from grpo.scoring.scorer import Scorer
from grpo.types import Conversation, Group, Rollout, Task, Trajectory

TEXTS = ("<think>3 + 4 = 7</think> The answer is \\boxed{7}.", "I do not know.")
"""The made-up completions of each prompt."""
PROMPTS = 2


def rehearse(scorer: Scorer, tasks: Sequence[Task], encode: Callable[[str], Sequence[int]]) -> list[str]:
    """Call each reward on the first prompts with made-up completions, in the form that a run uses. Nothing is counted.

    Skips rewards whose file says `PAID = True`, and rewards that take `environments`, because none exist yet. Returns
    notes about skipped rewards and about rewards that failed on some completions.
    Raises UserError for rewards with a weight that failed on every completion: the run would stop immediately.
    """
    answers = [Trajectory.sampled(tuple(encode(text)), None, text, "stop") for text in TEXTS]
    notes: list[str] = []
    broken: list[str] = []
    for name, reward in scorer.rewards.items():
        if reward.paid:
            notes.append(f"reward {name!r} was not called: its file says that calls cost money")
            continue
        if isinstance(reward, Hosted):
            notes.append(f"reward {name!r} was not called: it takes `environments`, and none exist before the run")
            continue
        applying = [task for task in tasks if scorer.applies(name, task.source)][:PROMPTS]
        if not applying:  # the reward applies only to held-out tasks
            continue
        request = scorer.request([_group(task, answers, scorer) for task in applying])
        failures = {
            begin + place: error
            for (begin, _), answer in reward.score(request)
            for place, error in answer.failures.items()
        }
        if failures:
            said = _said(name, failures, request.columns["completions"])
            is_broken = len(failures) == request.count and name not in scorer.metrics_only
            (broken if is_broken else notes).append(said)
    if broken:
        raise UserError("\n".join(broken))
    return notes


def _group(task: Task, answers: Sequence[Trajectory], scorer: Scorer) -> Group:
    """The answers to a task as a group; with environments, as conversations of a single turn."""
    if not scorer.environments:
        return Group(task, tuple(map(Rollout, answers)))
    before = ({"role": "user", "content": task.prompt},) if isinstance(task.prompt, str) else tuple(task.prompt)
    said = [({"role": "assistant", "content": answer.text},) for answer in answers]
    environment = next(iter(scorer.environments))
    talks = [Conversation(environment, before, messages) for messages in said]
    return Group(task, tuple(Rollout(replace(a, conversation=t)) for a, t in zip(answers, talks, strict=True)))


def _said(name: str, failures: Mapping[int, str], completions: Sequence[object]) -> str:
    """A message on the first failure: the exception, and where it was raised."""
    place = min(failures)
    what, *frames = masked(failures[place]).splitlines()
    where = re.findall(r'^  File "(.*)", line (\d+)', "\n".join(frames), re.MULTILINE)
    at = f" ({where[-1][0]}:{where[-1][1]})" if where else ""
    tried = f"{len(failures)} of {len(completions)} trial completions"
    return f"reward {name!r} failed on {tried}, the first of them {completions[place]!r:.80}: {what}{at}"
