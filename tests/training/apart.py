"""Runs whose processes sample or train, made by one process that does both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import driver

from grpo.runs import prepare as preparing
from grpo.runs.loop import Outcome

ONE_OF_EACH = "ranks={sample: 1, train: 1}"


def emulated(monkeypatch: pytest.MonkeyPatch, recipe: Path, *overrides: str, **how: Any) -> Outcome:
    """The run in this process alone, which samples and trains one after the other."""
    made = preparing.prepare
    given = any(override.startswith("ranks") for override in overrides)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "prepare", lambda cfg: made(cfg, alone=True))
        return driver.run(recipe, *([] if given else [ONE_OF_EACH]), *overrides, **how)
