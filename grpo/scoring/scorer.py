"""The reward functions of a recipe applied to groups, all at the same time.

A function that raises, hangs, dies, or answers with something that is no usable number has failed for those
completions: they score None, which keeps them out of their group's baseline, and counters say so. It never becomes a
zero.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from grpo.backend.secrets import masked
from grpo.config import RewardConfig
from grpo.errors import RunError, UserError
from grpo.plugins import Function
from grpo.scoring.contract import Answer
from grpo.scoring.grader import Answers, Inline, Isolated, RewardRecord, ScoringRequest, make_grader
from grpo.scoring.hints import column_hint
from grpo.scoring.session import Scoring, columns_of, request_of
from grpo.scoring.text import counted
from grpo.types import Failure, Group, Progress, Task

log = logging.getLogger(__name__)


class BrokenRewardError(RunError):
    """A function failed on more completions than it may; `groups` are those of the scoring that showed it."""

    def __init__(self, said: str, groups: Sequence[Group]) -> None:
        super().__init__(said)
        self.groups = groups


class Scorer:
    """A recipe's rewards. `failures` counts, by name, the completions that a function failed on."""

    def __init__(
        self,
        rewards: Mapping[str, Inline | Isolated | Function],
        metrics_only: Collection[str] = (),
        max_failure_rates: Mapping[str, float] | None = None,
        max_steps: int = 0,
    ) -> None:
        """`rewards` that are plain functions run inline. `metrics_only` names those that may fail as they like, because
        nothing is learnt from them."""
        self.rewards: dict[str, Inline | Isolated] = {
            name: reward if isinstance(reward, Inline | Isolated) else Inline(name, reward, {})
            for name, reward in rewards.items()
        }
        self.metrics_only = metrics_only
        default = RewardConfig.model_fields["max_failure_rate"].default
        self.records = {name: RewardRecord((max_failure_rates or {}).get(name, default)) for name in rewards}
        self._state = {"global_step": 0, "max_steps": max_steps}
        self._logged: dict[str, list[float]] = {}
        self._owners: dict[str, str] = {}
        self.progress: Progress | None = None

    @classmethod
    def of(
        cls,
        configs: Sequence[RewardConfig],
        max_steps: int = 0,
        system: str | None = None,
        functions: Mapping[str, Function] | None = None,
    ) -> Scorer:
        """The rewards that a recipe names, ready; `system` is the system message of its text prompts. `functions` are
        those that were given as objects, by their `use`.

        Raises UserError for one that cannot be had, for arguments that do not fit, and for two of one name.
        """
        rewards: dict[str, Inline | Isolated] = {}
        for config in configs:
            grader = make_grader(config, system, (functions or {}).get(config.use))
            if grader.name in rewards:
                raise UserError(
                    f"rewards: two of them are called {grader.name!r}; metrics need one name each: give one a name of "
                    "its own (name: ...)"
                )
            rewards[grader.name] = grader
        for reward in rewards.values():  # their processes are starting side by side
            reward.wait_ready()
        named = dict(zip(rewards, configs, strict=True))
        return cls(
            rewards,
            metrics_only={name for name, config in named.items() if config.weight == 0},
            max_failure_rates={name: config.max_failure_rate for name, config in named.items()},
            max_steps=max_steps,
        )

    @property
    def failures(self) -> dict[str, int]:
        return {name: record.failures for name, record in self.records.items()}

    @property
    def timeouts(self) -> dict[str, int]:
        """Those of the failures in which the function took too long."""
        return {name: record.timeouts for name, record in self.records.items()}

    def begin(self, step: int) -> None:
        """Training step `step` (from 1) begins: rewards are told so, and what they log is counted anew."""
        self._state["global_step"] = step - 1  # as in TRL: the steps that are done
        self._logged = {}

    def metrics(self) -> dict[str, float]:
        """What there is to tell about the rewards themselves, since `begin` and since the start."""
        told = {name: fmean(values) for name, values in self._logged.items()}
        for name, record in self.records.items():
            told[f"rewards/{name}/failures"] = float(record.failures)
            if record.seconds:
                told |= {f"time/rewards/{name}/p{p}": record.latency(p / 100) for p in (50, 95)}
        return told

    def request(self, groups: Sequence[Group]) -> ScoringRequest:
        """What each reward is given of `groups`."""
        return request_of(groups, columns_of([group.task for group in groups]), self._state)

    def open(self, tasks: Sequence[Task]) -> Scoring:
        """A scoring of the groups that these tasks will have: it is given each group as soon as that is whole."""
        return Scoring(self.rewards, tasks, self._state, self.progress)

    def score(self, groups: Sequence[Group], scoring: Scoring | None = None) -> list[Group]:
        """The same groups with `scores`, `failures`, `extras` and `logged` in their rollouts.

        `scoring` has been given some of the groups before, or none; what comes of it is the same. Raises
        BrokenRewardError, with the first traceback, when a function failed on more than its `max_failure_rate` of
        completions lately: a broken grader is not training.
        """
        if not groups:  # a process whose share is empty
            return []
        scoring = scoring or self.open([group.task for group in groups])
        try:
            answers = scoring.answers(groups)
        except BaseException:  # a second Ctrl-C: nobody waits for what is still under way
            self.close()
            raise
        answers = {
            name: [(span, self._told_apart(name, _masked(answer))) for span, answer in spans]
            for name, spans in answers.items()
        }
        placed = _by_place(answers, sum(len(group.rollouts) for group in groups), self.metrics_only)
        scored = [
            replace(group, rollouts=tuple(replace(rollout, **next(placed)) for rollout in group.rollouts))
            for group in groups
        ]
        for name, spans in answers.items():
            self._note(name, spans, groups)
            record = self.records[name]
            if record.broken is not None and name not in self.metrics_only:
                said = f"reward {name!r} {record.broken}. The first time: {record.first_error}"
                raise BrokenRewardError(said, scored)
        return scored

    def state(self) -> dict[str, Any]:
        """What it has counted, as JSON holds it: what `load_state` takes."""
        records = {name: record.state() for name, record in self.records.items()}
        return {"global_step": self._state["global_step"], "records": records}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on counting; a function that is new starts from nothing."""
        self._state["global_step"] = state["global_step"]
        for name, record in self.records.items():
            if name in state["records"]:
                record.load_state(state["records"][name])

    def check(self, columns: Collection[str]) -> None:
        """Raise UserError for a function that cannot be had, or not be called with these columns of the dataset."""
        for name, reward in self.rewards.items():
            if problem := reward.problem(columns):
                raise UserError(f"reward {name!r}: {problem}.{column_hint(problem, columns)}")

    def close(self) -> None:
        """Leave no worker behind."""
        for reward in self.rewards.values():
            reward.close()

    def _told_apart(self, name: str, answer: Answer) -> Answer:
        """The answer with `NAME/column` for a column of `log_extra` that another reward logged before this one."""
        owned = {column: self._owners.setdefault(column, name) == name for column in answer.extras}
        extras = {column if owned[column] else f"{name}/{column}": values for column, values in answer.extras.items()}
        return replace(answer, extras=extras)

    def _note(self, name: str, answers: Answers, groups: Sequence[Group]) -> None:
        """Count, and warn of a first failure."""
        record = self.records[name]
        was_fine = not record.failures
        record.add(answers)
        for _, answer in answers:
            for metric, values in answer.metrics.items():
                self._logged.setdefault(metric, []).extend(values)
        if was_fine and record.failures:
            place = next(begin + min(answer.failures) for (begin, _), answer in answers if answer.failures)
            log.warning(
                "reward %r failed on %s, the first of them %.200r: %s",
                name,
                counted(record.failures),
                self.request(groups).columns["completions"][place],
                record.first_error,
            )


def _masked(answer: Answer) -> Answer:
    """The answer without secrets in its errors: a service that refuses a key may quote it."""
    return replace(answer, failures={place: masked(error) for place, error in answer.failures.items()})


def _by_place(answers: Mapping[str, Answers], count: int, metrics_only: Collection[str]) -> Iterator[dict[str, Any]]:
    """What each rollout gets of the answers, in order."""
    scores: list[dict[str, float | None]] = [{} for _ in range(count)]
    failures: list[dict[str, Failure]] = [{} for _ in range(count)]
    extras: list[dict[str, Any]] = [{} for _ in range(count)]
    logged: list[dict[str, list[float]]] = [{} for _ in range(count)]
    for name, spans in answers.items():
        for (begin, end), answer in spans:
            if end - begin == 1:
                for metric, told in answer.metrics.items():  # two rewards may log under one name
                    logged[begin].setdefault(metric, []).extend(told)
            for place, value in enumerate(answer.values, begin):
                scores[place][name] = value
            for place, error in answer.failures.items():
                failures[begin + place][name] = Failure(answer.kind, error)
            for column, values in answer.extras.items():
                for place, value in enumerate(values, begin):
                    extras[place][column] = value
    for own, failed, extra, all_told in zip(scores, failures, extras, logged, strict=True):
        counts, means = bool(set(failed) - set(metrics_only)), {name: fmean(told) for name, told in all_told.items()}
        yield {"scores": own, "failures": failed, "extras": extra, "logged": means, "failed": counts}
