"""A reward that takes `environments`: it is called in the processes where these live, a group at a time."""

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
"""Groups that a reward may be called for at the same time: their environments live in several processes."""


class NoEnvironmentsError(UserError):
    """A reward takes `environments`, and there are none."""


class Hosted:
    """A reward function in the hosts of the environments that it takes."""

    takes_environments = True

    def __init__(self, reward: HostedReward, hosts: Sequence[Host], calls: str | None = None) -> None:
        """Loads it into every host. `calls`: `group` or `completion`; None: what its file says, or else `group`.

        Raises UserError where a host cannot load it, and for a function that wants all completions of a step.
        """
        self.name = reward.located.name
        self._hosts = {host.description.name: host for host in hosts}
        loaded = [host.load_reward(reward) for host in hosts]
        self.calls, self.paid = calls or _by_group(loaded[0].calls), any(one.paid for one in loaded)
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix=f"reward {self.name}")

    def wait_ready(self) -> None:
        """Nothing to wait for: it is loaded."""

    def begin(self) -> None:
        """Nothing to begin: what it prints is its hosts' business."""

    def problem(self, columns: Collection[str]) -> str | None:
        """Why it could not be called with these columns of the dataset; None if it can be."""
        problems = (host.reward_problem(self.name, columns) for host in self._hosts.values())
        return next(filter(None, problems), None)

    def submit(self, score: Callable[[ScoringRequest], Answers], request: ScoringRequest) -> Future[Answers]:
        """What `score` makes of a request, in a thread."""
        return self._threads.submit(score, request)

    def score(self, request: ScoringRequest) -> Answers:
        """An answer for each call. The completions of one call are of one group, so of one environment."""
        return [(span, self._call(request, *span)) for span in request.spans(self.calls)]

    def close(self) -> None:
        """Wait for nothing: the hosts, which are others' to close, end what is under way."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _call(self, request: ScoringRequest, begin: int, end: int) -> Answer:
        conversations = [one for one in request.conversations[begin:end] if one is not None and one.home is not None]
        if len(conversations) < end - begin:
            return Answer.failed(end - begin, "there is no environment for some of its completions")
        host = self._hosts[conversations[0].environment]
        try:
            columns = pickle.dumps({name: values[begin:end] for name, values in request.columns.items()})
        except Exception as error:  # a value of the dataset's that refuses
            said = f"the dataset's columns cannot be sent to its process: {type(error).__name__}: {error}"
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
    """The reward of a recipe's line, where the environments live. Raises UserError where it cannot run there."""
    what = f"reward {name!r} takes `environments`"
    if not hosts:
        raise NoEnvironmentsError(
            f"{what}, and there are none here: a recipe with `environment:` or `environments:` gives it those of the "
            "completions' conversations"
        )
    if any(config.is_agent for _, config in hosts):
        raise UserError(f"{what}, and an agent shows none: it asks the model itself. Let the reward read `completions`")
    if any(config.use is None for _, config in hosts):
        raise UserError(
            f"{what}, and beside tools alone there are none. Name an environment (environment.use), or let the reward "
            "do without: it reads the calls and their results in `completions`"
        )
    if config.isolation == "inline" and function is None:
        raise UserError(f"{what}, so it runs in their processes, and isolation: inline would do nothing: leave it out")
    if unread := config.changed & {"env", "memory_gb"}:
        setting = min(unread)
        raise UserError(
            f"{what}, so it runs in their processes, and its own {setting} would do nothing: "
            f"write environment.{setting}"
        )
    if config.calls == "step":
        raise UserError(
            f"{what}, so it cannot have calls: step: the environments of a step live in several processes, and a call "
            "gets those of one. Write calls: group, or calls: completion"
        )
    reward = HostedReward(located.absolute(), config.kwargs, config.timeout, config.completions, system, function)
    return Hosted(reward, [host for host, _ in hosts], config.calls)


def _by_group(calls: str) -> str:
    """What a call gets, where a file says nothing of it or wants a whole step's: a group."""
    return "group" if calls == "step" else calls


def _answer(reply: Mapping[str, Any], count: int) -> Answer:
    """A host's reply, read as one that anything may have been written into."""
    try:
        answer = answer_of(reply, (0, count))
        kind = reply.get("kind", "error")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        return Answer.failed(
            count, f"its process sent an invalid message in this call ({type(error).__name__}: {error})"
        )
    return Answer(
        answer.values,
        answer.failures,
        answer.extras,
        answer.metrics,
        answer.seconds,
        kind if kind in FAILURES else "error",
    )
