"""Records of each reward and environment so far: its failures and the duration of its calls."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from grpo.scoring.contract import Answer
from grpo.types import FAILURES

Placed = list[tuple[tuple[int, ...], Answer]]
"""One answer per call, with the indices of the call's completions among all completions of a scoring."""


class RewardRecord:
    """A reward's failures by kind since the start, recent failures, latencies, and first error."""

    COUNTED = "failed on {failed} of the last {count} completions"

    WINDOW = 3
    """Number of scorings whose failures count for `broken`."""

    def __init__(self, max_failure_rate: float) -> None:
        self.max_failure_rate = max_failure_rate
        self.kinds: Counter[str] = Counter()
        self.first_error: str | None = None
        self.seconds: deque[float] = deque(maxlen=1000)
        self._lately: deque[tuple[int, int]] = deque(maxlen=self.WINDOW)

    def add(self, answers: Placed) -> None:
        failed = sum(len(answer.failures) for _, answer in answers)
        for _, answer in answers:
            self.kinds[answer.kind] += len(answer.failures)
        self._lately.append((failed, sum(len(answer.values) for _, answer in answers)))
        self.seconds.extend(answer.seconds for _, answer in answers)
        if self.first_error is None:
            self.first_error = next((e for _, answer in answers for e in answer.failures.values()), None)

    def state(self) -> dict[str, Any]:
        """The counts, as JSON values. Latencies are left out: they belong to one machine and one process."""
        counts = {"failures": self.failures, "kinds": dict(self.kinds)}
        return {**counts, "lately": list(self._lately), "first_error": self.first_error}

    def load_state(self, state: Mapping[str, Any]) -> None:
        timeouts = state.get("timeouts", 0)  # older checkpoints have this count instead of `kinds`
        self.kinds = Counter(state.get("kinds", {"error": state["failures"] - timeouts, "timeout": timeouts}))
        self.first_error = state["first_error"]
        self._lately = deque(((failed, count) for failed, count in state["lately"]), maxlen=self.WINDOW)

    @property
    def failures(self) -> int:
        """Number of completions on which the reward failed since the start."""
        return self.kinds.total()

    @property
    def broken(self) -> str | None:
        """A message if the reward recently failed on more than `max_failure_rate` of the completions, else None."""
        failed, count = map(sum, zip(*self._lately, strict=True))
        if failed <= self.max_failure_rate * count:
            return None
        return f"{self.COUNTED.format(failed=failed, count=count)} (max_failure_rate: {self.max_failure_rate:g})"

    def latency(self, quantile: float) -> float:
        """A quantile of the duration of the last 1,000 calls, in seconds."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]


class ConversationRecord(RewardRecord):
    """The failures of an environment's conversations."""

    COUNTED = "failed in {failed} of the last {count} conversations"

    def add(self, answers: Placed) -> None:
        super().add(answers)
        self.seconds.clear()  # other metrics report the duration of conversations


def failures_by_kind(records: Mapping[str, RewardRecord]) -> dict[str, int]:
    """Number of conversations whose environment failed since the start, over all environments, by kind of failure."""
    kinds = [record.kinds for record in records.values() if isinstance(record, ConversationRecord)]
    return {kind: sum(counts[kind] for counts in kinds) for kind in FAILURES} if kinds else {}
