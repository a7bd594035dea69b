"""Trackio: the same metrics as W&B, in a local database that Trackio's dashboard shows."""

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
        """Start the Trackio run, or continue it if `resumed`: old records of repeated steps stay next to the new ones.

        `tell` prints a line for the user at the end. Raises UserError if the package is not installed.
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
            with _silent():  # the terminal already shows the alarm
                self._run.alert(
                    title=f"{alarm.kind} at step {alarm.step}",
                    text=str(alarm),
                    level=self._trackio.AlertLevel.WARN,
                    step=alarm.step,
                )

    def close(self) -> None:
        """Write the remaining records; print how to show a local run."""
        with _silent():
            self._trackio.finish()
        if self._cfg.space_id is None:
            self._tell(f"Trackio  trackio show --project {self._cfg.project}")


def _silent() -> redirect_stdout[io.StringIO]:
    """A context that discards prints: Trackio prints its progress."""
    return redirect_stdout(io.StringIO())
