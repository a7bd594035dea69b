"""The type of an alarm, which is part of the record of the step or evaluation that raised it."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Alarm:
    """A problem of a run, reported once per run.

    kind     the kind of problem, such as `entropy` or `truncation`; `grpo.alarms` defines all kinds
    step     the step that raised the alarm
    what     what happened, with numbers
    advice   what to look at, and which setting to change
    """

    kind: str
    step: int
    what: str
    advice: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.what}. {self.advice}"

    def plain(self) -> dict[str, str | int]:
        """The arguments of `Alarm(**...)` as JSON values."""
        return asdict(self)
