"""What a check found, in one line for a person and in one object for a bug report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grpo.backend.secrets import masked

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`fail`: no run can be had as things are; `warn`: one can, but slower or without something.

    `remedy` says what to do about it.
    """

    name: str
    status: Status
    text: str
    remedy: str = ""

    def line(self) -> str:
        """The finding for a person."""
        return f"{self.status:<4}  {self.name:<12}  {self.text}{f' → {self.remedy}' if self.remedy else ''}"


def without_secrets(text: str) -> str:
    """`text` on one line, without logins in addresses and values of variables that look like secrets.

    No check says one, but an error may quote anything.
    """
    return " ".join(masked(text).split())


def gigabytes(size: float) -> str:
    """Bytes as a person reads them, in 2³⁰ bytes as everywhere here."""
    return f"{size / 2**30:,.1f} GB"
