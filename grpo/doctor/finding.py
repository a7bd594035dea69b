"""The result of a check, as a line for the user and as an object for a bug report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grpo.backend.secrets import masked

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check. `fail`: runs do not work; `warn`: runs work, but slower or without a feature.

    `remedy` says what to do about it.
    """

    name: str
    status: Status
    text: str
    remedy: str = ""

    def line(self) -> str:
        """Return the finding as a line for the user."""
        return f"{self.status:<4}  {self.name:<12}  {self.text}{f' → {self.remedy}' if self.remedy else ''}"


def without_secrets(text: str) -> str:
    """Return `text` on one line, without logins in URLs and without values of variables that look like secrets.

    No check prints a secret, but an error may quote anything.
    """
    return " ".join(masked(text).split())


def gigabytes(size: float) -> str:
    """Format a number of bytes in GB. As everywhere in grpo, 1 GB is 2³⁰ bytes."""
    return f"{size / 2**30:,.1f} GB"
