"""Applies the reward functions of a recipe to groups, in parallel.

A function that raises, hangs, dies, or returns something other than a finite number has failed on those completions:
their score is None, which keeps them out of their group's baseline, and the failure is counted. A failure never becomes
a zero. An environment's own reward is one more score, and a conversation whose environment failed is one more failure.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from grpo.backend.secrets import masked
from grpo.config import EnvironmentConfig, RewardConfig
from grpo.config.sources import TAKEN
from grpo.environments.seats import Host
from grpo.errors import RunError, UserError
from grpo.plugins import Function, Located, locate_reward
from grpo.progress import Progress
from grpo.scoring.applying import ALL, Applying
from grpo.scoring.contract import UNUSABLE, Answer
from grpo.scoring.grader import Inline, Isolated, ScoringRequest, make_grader
from grpo.scoring.hints import column_hint
from grpo.scoring.hosted import Hosted, hosted
from grpo.scoring.judge import Judge, Judged
from grpo.scoring.modeled import Modeled, RewardModel
from grpo.scoring.own import OwnTerms, own_answers, rewarding_steps, terms_of, with_sums_of_none, without_home
from grpo.scoring.records import ConversationRecord, Placed, RewardRecord, failures_by_kind
from grpo.scoring.session import Grader, Scoring, columns_of, request_of
from grpo.scoring.text import counted, last_said
from grpo.types import Failure, FailureKind, Group, Rollout, Task

log = logging.getLogger(__name__)


TOGETHER = (
    ". These completions were in one call, so one exception costs all of them their scores. With `calls: completion`, "
    "or a function that returns an exception instead of a score, only the failed completion loses its score"
)
"""Part of the warning about a call that failed on all its completions."""


class BrokenRewardError(RunError):
    """A function failed on too many completions; `groups` are the groups of the last scoring."""

    def __init__(self, said: str, groups: Sequence[Group]) -> None:
        super().__init__(said)
        self.groups = groups


class Scorer:
    """A recipe's rewards: its functions, then its environments' own rewards.

    `weights` has the weight of each reward by name, in the order of every completion's scores. `failures` counts, by
    name, the completions on which a function failed, and the conversations whose environment failed.
    """

    def __init__(
        self,
        rewards: Mapping[str, Grader | Function],
        weights: Mapping[str, float] | None = None,
        max_failure_rates: Mapping[str, float] | None = None,
        max_steps: int = 0,
        environments: Mapping[str, OwnTerms] | None = None,
        has_tools: bool = False,
        applies: Applying = ALL,
    ) -> None:
        """Plain functions in `rewards` run inline. A reward without an entry in `weights` has weight 1; failures of a
        reward with weight 0 never stop the run, because training does not use it. `environments` are the environments
        with a reward of their own, by name; `has_tools` says whether the model can call tools; `applies` says which
        rewards score which tasks."""
        self.rewards: dict[str, Grader] = {
            name: reward if isinstance(reward, Inline | Isolated | Hosted) else Inline(name, reward, {})
            for name, reward in rewards.items()
        }
        self.environments, self.has_tools, self.applies = dict(environments or {}), has_tools, applies
        given = weights or {}
        self.weights = {name: float(given.get(name, 1.0)) for name in rewards}
        self.weights |= {name: terms.weight for name, terms in self.environments.items()}
        self.metrics_only = {name for name, weight in self.weights.items() if weight == 0}
        default = RewardConfig.model_fields["max_failure_rate"].default
        self.records = {name: RewardRecord((max_failure_rates or {}).get(name, default)) for name in rewards}
        self.records |= {name: ConversationRecord(t.max_failure_rate) for name, t in self.environments.items()}
        self._state = {"global_step": 0, "max_steps": max_steps}
        self._logged: dict[str, list[float]] = {}
        self._owners: dict[str, str] = {}
        self._by_steps: set[str] = set()  # names of the environments that have rewarded a step
        self.progress: Progress | None = None

    def graders(self, source: str = "data") -> list[str]:
        """The rewards that decide whether an answer to a source's task is right: the first reward that scores the
        source, or the environments if there is no such reward."""
        return [name for name in self.rewards if self.applies(name, source)][:1] or list(self.environments)

    @classmethod
    def of(
        cls,
        configs: Sequence[RewardConfig],
        max_steps: int = 0,
        system: str | None = None,
        functions: Mapping[str, Function] | None = None,
        hosts: Sequence[tuple[Host, EnvironmentConfig]] = (),
        applies: Applying = ALL,
    ) -> Scorer:
        """The scorer of a recipe's rewards, loaded and ready.

        `system` is the system message before text prompts. `functions` has the functions that were passed as objects,
        by their `use`. `hosts` are the hosts of the recipe's environments with their sections: the environments' own
        rewards are scores as well, and functions that take `environments` run in the hosts. `applies` says which
        rewards score which tasks.

        Raises UserError for a reward that cannot be loaded, for arguments that do not fit, and for duplicate names.
        """
        functions = functions or {}
        rewards: dict[str, Grader] = {}
        for config in configs:
            grader = _grader(config, system, functions.get(config.use))
            if grader.name in rewards:
                raise UserError(
                    f"rewards: two rewards have the name {grader.name!r}, but metrics need unique names: give one of "
                    "them another name (name: ...)"
                )
            rewards[grader.name] = grader
        _check_names(rewards, [host.description.name for host, _ in hosts])
        for name, config in zip(rewards, configs, strict=True):  # their processes start in parallel
            rewards[name].wait_ready()
            if rewards[name].takes_environments:
                rewards[name].close()
                function = functions.get(config.use)
                rewards[name] = hosted(name, config, _located(name, config), hosts, system, function)
        named = dict(zip(rewards, configs, strict=True))
        return cls(
            rewards,
            weights={name: config.weight for name, config in named.items()},
            max_failure_rates={name: config.max_failure_rate for name, config in named.items()},
            max_steps=max_steps,
            environments=terms_of(hosts),
            has_tools=any(host.description.tools for host, _ in hosts),
            applies=applies,
        )

    @property
    def models(self) -> dict[str, RewardModel]:
        """The reward models among the rewards, by the rewards' names."""
        return {name: reward.model for name, reward in self.rewards.items() if isinstance(reward, Modeled)}

    @property
    def judges(self) -> list[Judge]:
        """The judges among the rewards. A judge can grade after `Judge.bind`."""
        return [reward.judge for reward in self.rewards.values() if isinstance(reward, Judged)]

    @property
    def lends_environments(self) -> bool:
        """Whether a reward takes `environments`, so that an environment must stay alive until it is scored."""
        return any(isinstance(reward, Hosted) for reward in self.rewards.values())

    @property
    def failures(self) -> dict[str, int]:
        return {name: record.failures for name, record in self.records.items()}

    @property
    def failures_by_kind(self) -> dict[str, int]:
        """Number of conversations whose environment failed, by kind of failure; empty without environments."""
        return failures_by_kind(self.records)

    def failure_counts(self) -> dict[str, float]:
        """The failures so far as metrics, which can be summed over processes."""
        counts = {f"rewards/{name}/failures": float(count) for name, count in self.failures.items()}
        return counts | {f"environment/failures/{kind}": float(n) for kind, n in self.failures_by_kind.items()}

    def failures_of(self, kind: FailureKind) -> dict[str, int]:
        """Number of failures of one kind, by reward."""
        return {name: record.kinds[kind] for name, record in self.records.items()}

    def begin(self, step: int) -> None:
        """Begin training step `step` (from 1): set the `global_step` that rewards see, and reset logged metrics."""
        self._state["global_step"] = step - 1  # as in TRL: the number of finished steps
        self._logged = {}

    def metrics(self) -> dict[str, float]:
        """Metrics of the rewards: logged values since `begin`, failures and latencies since the start."""
        metrics = {name: fmean(values) for name, values in self._logged.items()}
        for name, record in self.records.items():
            metrics[f"rewards/{name}/failures"] = float(record.failures)
            if record.seconds:
                metrics |= {f"time/rewards/{name}/p{p}": record.latency(p / 100) for p in (50, 95)}
        return metrics

    def request(self, groups: Sequence[Group]) -> ScoringRequest:
        """The request that a reward gets to score `groups`."""
        return request_of(groups, columns_of([group.task for group in groups]), self._state)

    def steps_reward(self, environments: Iterable[str]) -> None:
        """Note that these environments reward steps, for example because another process has seen a rewarded step."""
        self._by_steps |= set(environments)

    def agreed(self, groups: Sequence[Group]) -> list[Group]:
        """Groups that several processes have scored, with the scores that a single process would have given.

        Each process knew only from its own groups which environments reward steps (`own_answers`).
        """
        self._by_steps |= rewarding_steps(groups)
        return with_sums_of_none(groups, self._by_steps & set(self.environments))

    def open(self, tasks: Sequence[Task]) -> Scoring:
        """A scoring for the groups of these tasks, which takes each group as soon as the group is whole."""
        return Scoring(self.rewards, tasks, self._state, self.progress, self.applies)

    def score(self, groups: Sequence[Group], scoring: Scoring | None = None) -> list[Group]:
        """The same groups with `scores`, `failures`, `extras` and `logged` in their rollouts.

        `scoring` may already have some of the groups; the result is the same. Raises BrokenRewardError, with the first
        traceback, if a function recently failed on more than its `max_failure_rate` of completions: a run with a broken
        grader would not learn.
        """
        if not groups:  # a process whose share is empty
            return []
        scoring = scoring or self.open([group.task for group in groups])
        try:
            self._by_steps |= rewarding_steps(groups)
            answers = scoring.answers(groups) | own_answers(groups, self.environments, self._by_steps)
        except BaseException:  # a second Ctrl-C: do not wait for calls that are under way
            self.close()
            raise
        answers = {
            name: [(places, self._told_apart(name, _masked(answer))) for places, answer in placed]
            for name, placed in answers.items()
        }
        by_place = _by_place(answers, sum(len(group.rollouts) for group in groups), self.metrics_only)
        scored = [
            replace(group, rollouts=tuple(_scored(rollout, next(by_place)) for rollout in group.rollouts))
            for group in groups
        ]
        for name, placed in answers.items():
            self._note(name, placed, groups)
            record = self.records[name]
            stops = name in self.environments or name not in self.metrics_only
            if record.broken is not None and stops:
                said = f"{self._what(name)} {record.broken}. First error: {record.first_error}"
                raise BrokenRewardError(said, scored)
        return scored

    def state(self) -> dict[str, Any]:
        """The counts, as JSON values for `load_state`."""
        records = {name: record.state() for name, record in self.records.items()}
        by_steps = sorted(self._by_steps)
        return {"global_step": self._state["global_step"], "records": records, "by_steps": by_steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the counts of `state`; a new function starts at 0."""
        self._state["global_step"] = state["global_step"]
        self._by_steps = set(state.get("by_steps", ()))
        for name, record in self.records.items():
            if name in state["records"]:
                record.load_state(state["records"][name])

    def check(self, columns: Collection[str], source: str = "data") -> None:
        """Raise UserError for a function that cannot be loaded, or cannot be called with these columns of a data
        source."""
        for name, reward in self.rewards.items():
            if self.applies(name, source) and (problem := reward.problem(columns)):
                named_source = None if source in TAKEN else source
                hint = column_hint(problem, columns, named_source)
                raise UserError(f"reward {name!r}: {problem}.{hint}{self._unless(source, '.' if hint else '')}")

    def close(self) -> None:
        """End all workers."""
        for reward in self.rewards.values():
            reward.close()

    def _unless(self, source: str, stop: str) -> str:
        """Further advice about a reward that does not fit the columns of one of several sources; `stop` ends the
        previous sentence."""
        if source in TAKEN:
            return ""
        return (
            f"{stop} These are the columns of the source {source!r}: if the reward is not for this source, list the "
            "source's rewards under it"
        )

    def _told_apart(self, name: str, answer: Answer) -> Answer:
        """The answer with `NAME/column` instead of a `log_extra` column that another reward has used first."""
        owned = {column: self._owners.setdefault(column, name) == name for column in answer.extras}
        extras = {column if owned[column] else f"{name}/{column}": values for column, values in answer.extras.items()}
        return replace(answer, extras=extras)

    def _what(self, name: str) -> str:
        own = self.environments.get(name)
        return f"{own.noun if own else 'reward'} {name!r}"

    def _note(self, name: str, answers: Placed, groups: Sequence[Group]) -> None:
        """Record the answers of a reward, and warn about its first failure."""
        record = self.records[name]
        was_fine = not record.failures
        record.add(answers)
        for _, answer in answers:
            for metric, values in answer.metrics.items():
                self._logged.setdefault(metric, []).extend(values)
        if was_fine and record.failures:
            places, answer = next((places, answer) for places, answer in answers if answer.failures)
            first = [(group.task, rollout) for group in groups for rollout in group.rollouts][
                places[min(answer.failures)]
            ]
            conversed = name in self.environments
            errors = list(answer.failures.values())
            whole = len(answer.values) > 1 and errors == [errors[0]] * len(answer.values)
            log.warning(
                "%s failed %s %s, the first of them %s: %s%s",
                self._what(name),
                "in" if conversed else "on",
                counted(record.failures, "conversation" if conversed else "completion"),
                last_said(first[0].prompt, first[1].trajectory),
                record.first_error,
                TOGETHER if whole and not (conversed or errors[0].startswith(UNUSABLE)) else "",
            )


def _grader(config: RewardConfig, system: str | None, function: Function | None) -> Inline | Isolated:
    """The grader of a recipe's reward: a model, the judge, or a function."""
    if config.model:
        return Modeled(config, system)
    if config.judges:
        return Judged(config, system)
    return make_grader(config, system, function)


def _masked(answer: Answer) -> Answer:
    """The answer with secrets masked in its errors: a service that refuses an API key may quote the key."""
    return replace(answer, failures={place: masked(error) for place, error in answer.failures.items()})


def _scored(rollout: Rollout, found: dict[str, Any]) -> Rollout:
    """The rollout with its scores and failures. A rollout whose environment failed counts as failed."""
    conversation = rollout.trajectory.conversation
    broke = conversation is not None and conversation.failure is not None
    return replace(without_home(rollout), **{**found, "failed": found["failed"] or broke})


def _check_names(rewards: Collection[str], environments: Sequence[str]) -> None:
    """Raise UserError for an environment with the name of a reward or of another environment."""
    for place, name in enumerate(environments):
        if name in rewards or name in environments[:place]:
            what = "a reward and an environment" if name in rewards else "two environments"
            raise UserError(
                f"{what} have the name {name!r}, but metrics need unique names: give the environment another name "
                "(environment.name, or environments.<key>.name)"
            )


def _located(name: str, config: RewardConfig) -> Located:
    found = locate_reward(config.use)
    return Located(name, found.where, found.what)


def _by_place(answers: Mapping[str, Placed], count: int, metrics_only: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield the fields that each rollout gets from the answers, in the order of the rollouts."""
    scores: list[dict[str, float | None]] = [dict.fromkeys(answers) for _ in range(count)]
    failures: list[dict[str, Failure]] = [{} for _ in range(count)]
    extras: list[dict[str, Any]] = [{} for _ in range(count)]
    logged: list[dict[str, list[float]]] = [{} for _ in range(count)]
    for name, placed in answers.items():
        for places, answer in placed:
            if len(places) == 1:
                for metric, numbers in answer.metrics.items():  # two rewards may log under one name
                    logged[places[0]].setdefault(metric, []).extend(numbers)
            for place, value in zip(places, answer.values, strict=True):
                scores[place][name] = value
            for inside, error in answer.failures.items():
                failures[places[inside]][name] = Failure(answer.kind, error)
            for column, values in answer.extras.items():
                for place, value in zip(places, values, strict=True):
                    extras[place][column] = value
    for score, failed, extra, metrics in zip(scores, failures, extras, logged, strict=True):
        counts, means = bool(set(failed) - set(metrics_only)), {name: fmean(values) for name, values in metrics.items()}
        yield {"scores": score, "failures": failed, "extras": extra, "logged": means, "failed": counts}
