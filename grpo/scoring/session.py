"""One scoring: each group is given to the rewards as soon as it is whole, while others are still sampled.

What comes of it does not depend on when a group was whole. A reward in a process of its own that takes a group or a
completion at a time is called for each group as it comes, from a thread of its own. A reward that takes a whole step
has to wait for all groups. So does a reward in this process: Python runs one thread at a time, so decoding would wait
for it in any case, and what interrupts a run reaches the main thread alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from grpo.scoring.grader import Answers, Inline, Isolated, ScoringRequest
from grpo.scoring.process import DEATHS, untried
from grpo.types import Group, Message, Progress, Prompt, Task, Trajectory

Rewards = Mapping[str, Inline | Isolated]


class Scoring:
    """The groups of `tasks` on their way through the rewards.

    `add` takes a group that is whole, and groups may come in any order; `answers` waits for all that is left.
    """

    def __init__(
        self, rewards: Rewards, tasks: Sequence[Task], state: Mapping[str, Any], progress: Progress | None = None
    ) -> None:
        """`state` is what rewards are told of the trainer; `progress` is told how many completions have all scores."""
        self._rewards, self._state, self._progress = rewards, state, progress
        self._columns = columns_of(tasks)
        self._early = {n: r for n, r in rewards.items() if isinstance(r, Isolated) and r.calls != "step"}
        self._running: dict[int, dict[str, Future[Answers]]] = {}
        self._fatal: dict[str, dict[int, list[bool]]] = {name: {} for name in rewards}
        for reward in rewards.values():
            if isinstance(reward, Isolated):
                reward.begin()

    def add(self, place: int, group: Group) -> None:
        """The group of task number `place` is whole: call the rewards that need not wait for others."""
        request = self._request([group])
        self._running[place] = {name: r.submit(self._call(r, place), request) for name, r in self._early.items()}

    def answers(self, groups: Sequence[Group]) -> dict[str, Answers]:
        """Every answer, by reward: its spans are places among the completions of all groups.

        `groups` are those of all tasks, in their order; what was not added before is now. Waits for the last answer.
        """
        for place, group in enumerate(groups):
            if place not in self._running:
                self.add(place, group)
        self._tell(groups, 0)
        done = self._of_all(groups)
        by_group: list[dict[str, Answers]] = []
        for place in range(len(groups)):
            by_group.append({name: future.result() for name, future in self._running[place].items()})
            self._tell(groups, place + 1)
        done |= {name: _in_order([answers[name] for answers in by_group], groups) for name in self._early}
        return {name: done[name] for name in self._rewards}

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever has not been asked for by now, nobody wants any more. A call that is under way ends by itself."""
        for futures in self._running.values():
            for future in futures.values():
                future.cancel()

    def _of_all(self, groups: Sequence[Group]) -> dict[str, Answers]:
        """The answers of the rewards that have to wait for all groups."""
        others = {name: reward for name, reward in self._rewards.items() if name not in self._early}
        if not others:
            return {}
        request = self._request(groups)
        running = {name: r.submit(r.score, request) for name, r in others.items() if isinstance(r, Isolated)}
        inline = {name: reward.score(request) for name, reward in others.items() if isinstance(reward, Inline)}
        return inline | {name: future.result() for name, future in running.items()}

    def _call(self, reward: Isolated, place: int) -> Callable[[ScoringRequest], Answers]:
        """What the reward's thread does for a group."""

        def score(request: ScoringRequest) -> Answers:
            fatal = self._fatal[reward.name]  # touched by this one thread alone
            if _gave_up(fatal, place):
                return [(span, untried(span)) for span in request.spans(reward.calls)]
            answers = reward.score(request)
            if any(answer.fatal for _, answer in answers):
                fatal[place] = [answer.fatal for _, answer in answers]
            return answers

        return score

    def _request(self, groups: Sequence[Group]) -> ScoringRequest:
        return request_of(groups, self._columns, self._state)

    def _tell(self, groups: Sequence[Group], scored: int) -> None:
        if self._progress is not None:
            sizes = [len(group.rollouts) for group in groups]
            self._progress("reward", sum(sizes[:scored]), sum(sizes))


def request_of(groups: Sequence[Group], columns: Collection[str], state: Mapping[str, Any]) -> ScoringRequest:
    """What a reward function is given of `groups`, with these columns of the dataset."""
    rows = [(group.task, rollout.trajectory) for group in groups for rollout in group.rollouts]
    given: dict[str, Any] = {name: [task.columns.get(name) for task, _ in rows] for name in columns}
    given["prompts"] = [task.prompt for task, _ in rows]
    given["completions"] = [as_prompted(task.prompt, trajectory) for task, trajectory in rows]
    given["completion_ids"] = [list(trajectory.token_ids) for _, trajectory in rows]
    given.pop("prompt", None)  # as in TRL: it is there as `prompts`
    return ScoringRequest(given, [len(group.rollouts) for group in groups], state)


def columns_of(tasks: Sequence[Task]) -> list[str]:
    """The names of all columns that a task has."""
    return list(dict.fromkeys(name for task in tasks for name in task.columns))


def as_prompted(prompt: Prompt, trajectory: Trajectory) -> str | list[Message]:
    """Text for a text prompt, a list of one message for a prompt of messages."""
    return trajectory.text if isinstance(prompt, str) else [{"role": "assistant", "content": trajectory.text}]


def _gave_up(fatal: Mapping[int, Sequence[bool]], place: int) -> bool:
    """Whether so many calls in a row before this group have ended their process that the rest need not be tried.

    A group that has not been scored yet counts as survived: what is not tried here is never tried by `_in_order`.
    """
    deaths = 0
    for before in range(place) if fatal else ():
        for died in fatal.get(before, (False,)):
            deaths = deaths + 1 if died else 0
            if deaths == DEATHS:
                return True
    return False


def _in_order(answers: Sequence[Answers], groups: Sequence[Group]) -> Answers:
    """The groups' answers joined, as if the calls had been made in the order of the groups.

    After `DEATHS` calls in a row that ended their process the rest counts as not tried, even if it was: a group that
    was whole earlier than its neighbors must not fare better for it.
    """
    joined: Answers = []
    first = deaths = 0
    for of_group, group in zip(answers, groups, strict=True):
        for (begin, end), answer in of_group:
            span = (first + begin, first + end)
            joined.append((span, untried(span) if deaths == DEATHS else answer))
            if deaths < DEATHS:
                deaths = deaths + 1 if answer.fatal else 0
        first += len(group.rollouts)
    return joined
