"""Trackio: the same numbers as W&B's, in a local database that its own dashboard shows."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from grpo.backend.imports import extra
from grpo.config import Recipe, TrackioConfig
from grpo.telemetry.sent import Tell, named_numbers
from grpo.types import EvalMetrics, StepMetrics


class TrackioLogger:
    """Logs steps under `train/`, evaluations under `eval/`, and alarms as alerts. Without `space_id` it uses no
    network."""

    def __init__(
        self, cfg: TrackioConfig, recipe: Recipe, folder: Path, tell: Tell = print, resumed: bool = False
    ) -> None:
        """A `resumed` run goes on under its name; what Trackio has of later steps stays, beside those that come again.

        `tell` is called with what there is to say to the person at the end. Raises UserError without the package.
        """
        with extra("trackio", "log.trackio"):
            import trackio

        self._trackio: Any = trackio
        self._cfg, self._tell = cfg, tell
        with _silent():
            self._run: Any = trackio.init(
                project=cfg.project,
                name=cfg.name or folder.resolve().name,
                group=cfg.group,
                space_id=cfg.space_id,
                config=recipe.model_dump(mode="json"),
                resume="allow" if resumed else "never",
                embed=False,
            )

    def log(self, record: StepMetrics | EvalMetrics) -> None:
        self._run.log(dict(named_numbers(record)), step=record.step)
        for alarm in record.alarms:
            with _silent():  # the terminal has the alarm
                self._run.alert(
                    title=f"{alarm.kind} at step {alarm.step}",
                    text=str(alarm),
                    level=self._trackio.AlertLevel.WARN,
                    step=alarm.step,
                )

    def close(self) -> None:
        """Write what is left; say how to look at a run on this machine."""
        with _silent():
            self._trackio.finish()
        if self._cfg.space_id is None:
            self._tell(f"Trackio  trackio show --project {self._cfg.project}")


def _silent() -> redirect_stdout[io.StringIO]:
    """A block whose prints are not shown: Trackio says on the terminal what it does."""
    return redirect_stdout(io.StringIO())
