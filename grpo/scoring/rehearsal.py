"""Calls each reward once on made-up completions, so that a dry run finds the errors of the first step."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from grpo.backend.secrets import masked
from grpo.errors import UserError
from grpo.scoring.grader import ScoringRequest
from grpo.scoring.hosted import Hosted
from grpo.scoring.scorer import Scorer
from grpo.scoring.session import Grader
from grpo.types import Conversation, Group, Rollout, Task, Trajectory

TEXTS = ("<think>3 + 4 = 7</think> The answer is \\boxed{7}.", "I do not know.")
"""The made-up completions of each prompt."""
PROMPTS = 2
ROWS, FEW_ROWS = 8, 4
"""Rows on which a reward is tried again if all made-up completions got the same score, at most and at least: equal
scores on fewer rows say little."""
COLUMNS, LONGEST = 3, 500
"""Columns of a row that completions quote, and characters of such a value."""


def rehearse(scorer: Scorer, tasks: Sequence[Task], encode: Callable[[str], Sequence[int]]) -> list[str]:
    """Call each reward on the first prompts with made-up completions, in the form that a run uses. Nothing is counted.

    Rewards whose file says `PAID = True` are not called, nor are those that take `environments`, of which there are
    none yet. A reward with equal scores is called once more, on completions that quote the row's own columns, such as
    its answer. Returns notes: who was not called, who failed on some, and who gave equal scores again.
    Raises UserError for rewards that something is learnt from and that failed on all: the run would stop at once.
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
        scores, failures = _called(reward, request)
        if failures:
            said = _said(name, failures, request.columns["completions"])
            is_broken = len(failures) == request.count and name not in scorer.metrics_only
            (broken if is_broken else notes).append(said)
        elif len(set(scores)) == 1 and name not in scorer.metrics_only:
            rows = [task for task in tasks if scorer.applies(name, task.source)][:ROWS]
            notes += _constant(name, reward, scores, rows, scorer, encode)
    if broken:
        raise UserError("\n".join(broken))
    return notes


def _called(reward: Grader, request: ScoringRequest) -> tuple[list[float | None], dict[int, str]]:
    """The scores of all completions of a request, and the failures by place."""
    scores: list[float | None] = []
    failures: dict[int, str] = {}
    for (begin, _), answer in reward.score(request):
        scores += answer.values
        failures |= {begin + place: error for place, error in answer.failures.items()}
    return scores, failures


def _constant(
    name: str,
    reward: Grader,
    scores: Sequence[float | None],
    tasks: Sequence[Task],
    scorer: Scorer,
    encode: Callable[[str], Sequence[int]],
) -> list[str]:
    """A note if a reward that gave equal `scores` gives the same to completions that quote the columns of `tasks`."""
    if len(tasks) < FEW_ROWS or scores[0] is None:
        return []
    groups = []
    for task in tasks:
        said = [Trajectory.sampled(tuple(encode(text)), None, text, "stop") for text in _quoting(task)]
        groups += [_group(task, said, scorer)] if said else []
    again, failures = _called(reward, scorer.request(groups)) if groups else ([], {})
    if failures or {*scores, *again} != {scores[0]}:
        return []
    count = len(scores) + len(again)
    begin = "If" if scores[0] else "They may all be wrong answers. But if"
    return [
        f"reward {name!r} gave {scores[0]:g} to all {count} trial completions, on {len(tasks)} rows. {begin} it gives "
        "equal scores to the model's completions too, it teaches nothing: in a group with equal rewards every "
        "advantage is 0. Try it on answers that must differ (grpo rewards test, grpo rewards score)"
    ]


def _quoting(task: Task) -> list[str]:
    """Completions that give a column of the row as the answer: bare, and in the forms that rewards look for."""
    values = [str(value) for value in task.columns.values() if isinstance(value, str | int | float)]
    short = [value for value in values if len(value) <= LONGEST][-COLUMNS:]
    forms = ("{0}", "<think>\n3 + 4\n</think>\n<answer>\n{0}\n</answer>\nThe answer is \\boxed{{{0}}}.\n#### {0}")
    return [form.format(value) for value in short for form in forms]


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
