"""What is said of a run that goes wrong; it travels with the record of the step or evaluation that shows it."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Alarm:
    """A sign that a run goes wrong, told once.

    kind     what went wrong, in a word: `entropy`, `truncation`; `grpo.alarms` has all of them
    step     the step at which it was seen
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
        """What `Alarm(**...)` takes, as JSON holds it."""
        return asdict(self)
