"""A reward that takes `environments`: it runs in the environments' processes, one call per group."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from grpo.config import EnvironmentConfig, RewardConfig
from grpo.environments.seats import Host, HostedReward
from grpo.errors import UserError
from grpo.plugins import Function, Located
from grpo.scoring.contract import Answer
from grpo.scoring.grader import Answers, ScoringRequest
from grpo.scoring.process import answer_of
from grpo.types import FAILURES

AT_ONCE = 32
"""Maximum number of simultaneous calls of a reward: the environments live in several processes."""


class NoEnvironmentsError(UserError):
    """A reward takes `environments`, and the recipe has none."""


class Hosted:
    """A reward function that runs in the hosts of the environments."""

    takes_environments = True

    def __init__(self, reward: HostedReward, hosts: Sequence[Host], calls: str | None = None) -> None:
        """Load the function into every host. `calls`: `group`, `completion`, or None for the file's `CALLS`, where a
        step counts as `group`. Raises UserError if a host cannot load the function."""
        self.name = reward.located.name
        self._hosts = {host.description.name: host for host in hosts}
        loaded = [host.load_reward(reward) for host in hosts]
        self.calls, self.paid = calls or _by_group(loaded[0].calls), any(one.paid for one in loaded)
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix=f"reward {self.name}")

    def wait_ready(self) -> None:
        """Nothing to wait for: the hosts have loaded the function."""

    def begin(self) -> None:
        """Nothing to begin: the hosts show what the function prints."""

    def problem(self, columns: Collection[str]) -> str | None:
        """Why the function cannot be called with these columns of the dataset; None if it can."""
        problems = (host.reward_problem(self.name, columns) for host in self._hosts.values())
        return next(filter(None, problems), None)

    def submit(self, score: Callable[[ScoringRequest], Answers], request: ScoringRequest) -> Future[Answers]:
        """The future of `score(request)`, which runs in a thread."""
        return self._threads.submit(score, request)

    def score(self, request: ScoringRequest) -> Answers:
        """One answer per call. The completions of one call belong to one group, and so to one environment."""
        return [(span, self._call(request, *span)) for span in request.spans(self.calls)]

    def close(self) -> None:
        """Close without waiting: calls under way end with their hosts, which their owner closes."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _call(self, request: ScoringRequest, begin: int, end: int) -> Answer:
        conversations = [one for one in request.conversations[begin:end] if one is not None and one.home is not None]
        if len(conversations) < end - begin:
            return Answer.failed(end - begin, "some of its completions have no environment")
        host = self._hosts[conversations[0].environment]
        try:
            columns = pickle.dumps({name: values[begin:end] for name, values in request.columns.items()})
        except Exception as error:  # a value of the dataset cannot be pickled
            said = f"the dataset's columns cannot be sent to the reward's process: {type(error).__name__}: {error}"
            return Answer.failed(end - begin, said)
        reply = host.score(self.name, [one.home for one in conversations], columns, request.state).result()
        return _answer(reply, end - begin)


def hosted(
    name: str,
    config: RewardConfig,
    located: Located,
    hosts: Sequence[tuple[Host, EnvironmentConfig]],
    system: str | None = None,
    function: Function | None = None,
) -> Hosted:
    """The grader of a recipe's reward in the environments' hosts. Raises UserError if the reward cannot run there."""
    what = f"reward {name!r} takes `environments`"
    if not hosts:
        raise NoEnvironmentsError(
            f"{what}, but the recipe has none: add `environment:` or `environments:`, and the reward gets the "
            "environments of the completions' conversations"
        )
    if any(config.is_agent for _, config in hosts):
        raise UserError(
            f"{what}, but an agent has no environment object: it calls the model itself. Let the reward read "
            "`completions`"
        )
    if any(config.use is None for _, config in hosts):
        raise UserError(
            f"{what}, but the recipe has only tools. Name an environment (environment.use), or let the reward read the "
            "tool calls and their results in `completions`"
        )
    if config.isolation == "inline" and function is None:
        raise UserError(f"{what}, so it runs in their processes, and isolation: inline has no effect: remove it")
    if unread := config.changed & {"env", "memory_gb"}:
        setting = min(unread)
        raise UserError(
            f"{what}, so it runs in their processes, and its own {setting} has no effect: write environment.{setting}"
        )
    if config.calls == "step":
        raise UserError(
            f"{what}, so it cannot have calls: step. The environments of a step live in several processes, and a call "
            "gets the environments of one process. Write calls: group, or calls: completion"
        )
    reward = HostedReward(located.absolute(), config.kwargs, config.timeout, config.completions, system, function)
    return Hosted(reward, [host for host, _ in hosts], config.calls)


def _by_group(calls: str) -> str:
    """`calls` of a function's file, with `group` instead of `step`: the environments of a step have several hosts."""
    return "group" if calls == "step" else calls


def _answer(reply: Mapping[str, Any], count: int) -> Answer:
    """A host's reply as an answer. User code may have written anything into the reply, so every part is checked."""
    try:
        answer = answer_of(reply, (0, count))
        kind = reply.get("kind", "error")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        return Answer.failed(count, f"its process sent an invalid reply ({type(error).__name__}: {error})")
    return Answer(
        answer.values,
        answer.failures,
        answer.extras,
        answer.metrics,
        answer.seconds,
        kind if kind in FAILURES else "error",
    )
