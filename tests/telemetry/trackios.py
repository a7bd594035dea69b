"""A stand-in for the package trackio, with the signatures of its 0.43."""

from __future__ import annotations

from types import ModuleType
from typing import Any


class StandInRun:
    """Notes what it is given."""

    def __init__(self, sent: list[Any]) -> None:
        self._sent = sent

    def log(self, metrics: dict, step: int | None = None) -> None:
        self._sent.append(("log", step, dict(metrics)))

    def alert(
        self, title: str, text: str | None = None, level: str = "warn", step: int | None = None, webhook_url: Any = None
    ) -> None:
        print("noise on the terminal")
        self._sent.append(("alert", step, title, text, level))


def trackio_stand_in(sent: list[Any]) -> ModuleType:
    """A module that appends to `sent` what it is called with."""
    module: Any = ModuleType("trackio")

    def init(
        project: str,
        name: str | None = None,
        group: str | None = None,
        space_id: str | None = None,
        config: dict | None = None,
        resume: str = "never",
        embed: bool = True,
    ) -> StandInRun:
        print("noise on the terminal")
        sent.append(("init", project, name, group, space_id, resume, embed))
        return StandInRun(sent)

    def finish() -> None:
        print("noise on the terminal")
        sent.append(("finish",))

    module.init, module.finish = init, finish
    module.AlertLevel = type("AlertLevel", (), {"WARN": "warn"})
    return module
