"""One scoring: the rewards get each group as soon as the group is whole, while other groups are still being sampled.

The result does not depend on when a group was whole. A reward in a worker process that takes a group or a completion
per call is called for each group as the group arrives, from the worker's thread. The same holds for a reward that takes
`environments`, which runs in their processes; the environments are released when the last such reward is done. A reward
that takes a whole step waits for all groups. So does a reward in this process: Python runs one thread at a time, so
decoding would wait for the reward anyway, and Ctrl-C reaches only the main thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from grpo.progress import Progress
from grpo.scoring.applying import ALL, Applying
from grpo.scoring.grader import Answers, Inline, Isolated, ScoringRequest
from grpo.scoring.hosted import Hosted
from grpo.scoring.process import DEATHS, untried
from grpo.scoring.records import Placed
from grpo.types import Group, Message, Prompt, Task, Trajectory

Grader = Inline | Isolated | Hosted
Rewards = Mapping[str, Grader]


class Scoring:
    """Scores the groups of `tasks` as they arrive.

    `add` takes a whole group, in any order of groups; `answers` waits for all remaining scores.
    """

    def __init__(
        self,
        rewards: Rewards,
        tasks: Sequence[Task],
        state: Mapping[str, Any],
        progress: Progress | None = None,
        applies: Applying = ALL,
    ) -> None:
        """`state` is the trainer state that rewards get; `progress` gets the number of completions that have all their
        scores; `applies` says which rewards score which tasks."""
        self._rewards, self._state, self._progress, self._applies = rewards, state, progress, applies
        self._columns = {name: columns_of([t for t in tasks if applies(name, t.source)]) for name in rewards}
        self._early = {
            name: reward
            for name, reward in rewards.items()
            if isinstance(reward, Isolated | Hosted) and reward.calls != "step"
        }
        self._running: dict[int, dict[str, Future[Answers]]] = {}
        self._fatal: dict[str, dict[int, list[bool]]] = {name: {} for name in rewards}
        for reward in rewards.values():
            if isinstance(reward, Isolated | Hosted):
                reward.begin()

    def add(self, place: int, group: Group) -> None:
        """Take the whole group of task number `place`, and call the rewards that need no other group."""
        requests = self._requests(self._early, [group])
        running = {name: self._early[name].submit(self._call(name, place), one) for name, one in requests.items()}
        self._running[place] = running
        borrowing = [running[name] for name in running if isinstance(self._early[name], Hosted)]
        _when_done(borrowing, lambda: _give_back(group))

    def answers(self, groups: Sequence[Group]) -> dict[str, Placed]:
        """All answers by reward, with the indices of their completions among the completions of all groups.

        `groups` are the groups of all tasks, in order; groups that have not been added are added now. Completions
        whose environment failed are not scored. Waits for the last answer.
        """
        for place, group in enumerate(groups):
            if place not in self._running:
                self.add(place, group)
        self._tell(groups, 0)
        done = self._of_all(groups)
        by_group: list[dict[str, Placed]] = []
        for place, group in enumerate(groups):
            answers = {name: future.result() for name, future in self._running[place].items()}
            by_group.append({name: _placed(found, [group], [0]) for name, found in answers.items()})
            self._tell(groups, place + 1)
        done |= {name: _in_order([answers.get(name, []) for answers in by_group], groups) for name in self._early}
        return {name: done[name] for name in self._rewards}

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel the calls that have not started. A call that is under way runs to its end."""
        for futures in self._running.values():
            for future in futures.values():
                future.cancel()

    def _of_all(self, groups: Sequence[Group]) -> dict[str, Placed]:
        """The answers of the rewards that wait for all groups."""
        others = {name: reward for name, reward in self._rewards.items() if name not in self._early}
        requests = self._requests(others, groups)
        asked = {name: reward for name, reward in others.items() if name in requests}
        running = {n: r.submit(r.score, requests[n]) for n, r in asked.items() if isinstance(r, Isolated)}
        inline = {name: r.score(requests[name]) for name, r in asked.items() if isinstance(r, Inline)}
        found = inline | {name: future.result() for name, future in running.items()}
        placed = {name: _placed(one, groups, self._applies.groups(name, groups)) for name, one in found.items()}
        return {name: placed.get(name, []) for name in others}

    def _call(self, name: str, place: int) -> Callable[[ScoringRequest], Answers]:
        """The function that a reward's thread runs for a group."""
        reward = self._early[name]

        def score(request: ScoringRequest) -> Answers:
            fatal = self._fatal[reward.name]  # only this thread uses it
            if _gave_up(fatal, place):
                return [(span, untried(span)) for span in request.spans(reward.calls)]
            answers = reward.score(request)
            if any(answer.fatal for _, answer in answers):
                fatal[place] = [answer.fatal for _, answer in answers]
            return answers

        return score

    def _requests(self, names: Iterable[str], groups: Sequence[Group]) -> dict[str, ScoringRequest]:
        """The request for each reward with the groups that it scores; a reward that scores none of them has no
        request. Rewards with the same groups and columns share one request."""
        made: dict[tuple[tuple[int, ...], tuple[str, ...]], ScoringRequest] = {}
        requests = {}
        for name in names:
            places, columns = tuple(self._applies.groups(name, groups)), tuple(self._columns[name])
            if not places:
                continue
            if (places, columns) not in made:
                made[places, columns] = request_of([groups[place] for place in places], columns, self._state)
            requests[name] = made[places, columns]
        return requests

    def _tell(self, groups: Sequence[Group], scored: int) -> None:
        if self._progress is not None:
            sizes = [len(group.rollouts) for group in groups]
            self._progress("reward", sum(sizes[:scored]), sum(sizes))


def request_of(groups: Sequence[Group], columns: Collection[str], state: Mapping[str, Any]) -> ScoringRequest:
    """The request to score `groups`, with these columns of the dataset.

    As in TRL, `completion_ids` are all tokens after the prompt. For a conversation, `completions` are all messages
    after the prompt, and `prompts` are the messages of the prompt, including those that the environment's `reset`
    added. Completions whose environment failed are left out.
    """
    whole = [[(group.task, r.trajectory) for r in group.rollouts if not _broke(r.trajectory)] for group in groups]
    rows = [row for of_group in whole for row in of_group]
    given: dict[str, Any] = {name: [task.columns.get(name) for task, _ in rows] for name in columns}
    given["prompts"] = [prompt_of(task, trajectory) for task, trajectory in rows]
    given["completions"] = [as_prompted(task.prompt, trajectory) for task, trajectory in rows]
    given["completion_ids"] = [list(trajectory.token_ids) for _, trajectory in rows]
    given.pop("prompt", None)  # as in TRL: rewards get it as `prompts`
    conversations = [trajectory.conversation for _, trajectory in rows]
    return ScoringRequest(given, list(map(len, whole)), state, conversations)


def columns_of(tasks: Sequence[Task]) -> list[str]:
    """The names of all columns of the tasks, without duplicates."""
    return list(dict.fromkeys(name for task in tasks for name in task.columns))


def prompt_of(task: Task, trajectory: Trajectory) -> Prompt:
    """The prompt that rewards get; for a conversation, its initial messages."""
    return task.prompt if trajectory.conversation is None else list(trajectory.conversation.prompt)


def as_prompted(prompt: Prompt, trajectory: Trajectory) -> str | list[Message]:
    """The completion in the prompt's form: a text, or a list of one message; for a conversation, all its messages."""
    if trajectory.conversation is not None:
        return list(trajectory.conversation.messages)
    return trajectory.text if isinstance(prompt, str) else [{"role": "assistant", "content": trajectory.text}]


def _gave_up(fatal: Mapping[int, Sequence[bool]], place: int) -> bool:
    """Whether `DEATHS` consecutive calls before this group ended their process, so that later calls are skipped.

    A group that has not been scored yet counts as survived, so that a call is skipped here only if `_in_order` would
    discard its answer.
    """
    deaths = 0
    for before in range(place) if fatal else ():
        for died in fatal.get(before, (False,)):
            deaths = deaths + 1 if died else 0
            if deaths == DEATHS:
                return True
    return False


def _broke(trajectory: Trajectory) -> bool:
    return trajectory.conversation is not None and trajectory.conversation.failure is not None


def _placed(answers: Answers, groups: Sequence[Group], requested: Collection[int]) -> Placed:
    """The answers with indices among all completions of `groups`.

    The answers' spans count only the completions in the request: those of the groups `requested` whose environment
    did not fail.
    """
    rollouts = [(number, rollout) for number, group in enumerate(groups) for rollout in group.rollouts]
    places = [at for at, (number, r) in enumerate(rollouts) if number in requested and not _broke(r.trajectory)]
    return [(tuple(places[begin:end]), answer) for (begin, end), answer in answers]


def _when_done(futures: Sequence[Future[Answers]], then: Callable[[], object]) -> None:
    """Call `then` once, when all futures are done or cancelled; immediately if there are none."""
    left, lock = len(futures), threading.Lock()

    def done(_: object) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            then()

    if not futures:
        then()
    for future in futures:
        future.add_done_callback(done)


def _give_back(group: Group) -> None:
    """Release the environments of a group for other conversations."""
    for rollout in group.rollouts:
        conversation = rollout.trajectory.conversation
        if conversation is not None and conversation.home is not None:
            conversation.home.release()


def _in_order(answers: Sequence[Placed], groups: Sequence[Group]) -> Placed:
    """The groups' answers joined, as if the calls had been made in the order of the groups.

    After `DEATHS` consecutive calls that ended their process, later answers count as not called, even if they exist.
    Otherwise the scores would depend on which group was whole first.
    """
    joined: Placed = []
    first = deaths = 0
    for of_group, group in zip(answers, groups, strict=True):
        for inside, answer in of_group:
            places = tuple(first + place for place in inside)
            joined.append((places, untried((0, len(places))) if deaths == DEATHS else answer))
            if deaths < DEATHS:
                deaths = deaths + 1 if answer.fatal else 0
        first += len(group.rollouts)
    return joined
