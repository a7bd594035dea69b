"""Weights & Biases, through its package. Metrics have TRL's names and prefixes."""

from __future__ import annotations

import logging
import os
import shlex
from itertools import islice
from pathlib import Path
from typing import Any

from grpo.backend.hub import one_line
from grpo.config import Recipe, WandbConfig
from grpo.environments.shown import asked, transcript
from grpo.plugins import source_file
from grpo.runs.checkpoint import RECIPE, newest_whole
from grpo.runs.folder import CHECKPOINTS
from grpo.runs.state import RunState
from grpo.telemetry.sent import Tell, named_numbers
from grpo.types import EvalMetrics, StepMetrics

warn = logging.getLogger(__name__).warning

INIT_TIMEOUT, FINISH_TIMEOUT = 30.0, 300.0
"""Seconds to wait for the service: at the start, and for the last uploads."""
STEP = "train/global_step"
TABLE = "completions"
COLUMNS = ["step", "prompt", "completion", "reward", "advantage"]


class WandbLogger:
    """Logs steps under `train/`, evaluations under `eval/`, completions, histograms, and the run's files."""

    def __init__(
        self,
        cfg: WandbConfig,
        recipe: Recipe,
        folder: Path,
        run_id: str,
        tell: Tell = print,
        resumed: RunState | None = None,
    ) -> None:
        """Open the run `run_id`, or reopen it on resuming. Without a connection to W&B, the run is stored locally for
        `wandb sync`.

        `tell` prints a line for the user at the end. If W&B has steps after the `resumed` state, they are removed, or
        their repetitions are not logged.
        """
        import wandb

        self._cfg, self._folder, self._tell = cfg, folder, tell
        common: dict[str, Any] = {
            "project": cfg.project,
            "entity": cfg.entity,
            "group": cfg.group,
            "tags": list(cfg.tags),
            "notes": cfg.notes,
            "id": run_id,
            "name": folder.resolve().name,
            "dir": folder,
            "config": recipe.model_dump(mode="json"),
        }
        waits = {"silent": True, "init_timeout": INIT_TIMEOUT, "finish_timeout": FINISH_TIMEOUT}
        try:
            self._run: Any = _rewound(dict(common, mode=cfg.mode, settings=waits), resumed)
        except wandb.Error as error:
            first = str(error).splitlines()[0]
            warn("W&B: %s. The run is stored in %s; `wandb sync` uploads it", first, folder / "wandb")
            wandb.teardown()  # wandb's service process still holds the run's id
            self._run = wandb.init(**common, resume="allow", mode="offline", settings={"silent": True})
        self._run.define_metric(STEP)
        self._run.define_metric("train/*", step_metric=STEP)
        self._run.define_metric("train/reward", step_metric=STEP, summary="max")
        self._run.define_metric("eval/*", step_metric=STEP, summary="max")
        sources = dict.fromkeys(filter(None, map(source_file, recipe.uses)))
        self._keep("recipe", [folder / RECIPE, *sources])

    def log(self, record: StepMetrics | EvalMetrics) -> None:
        values: dict[str, Any] = dict(named_numbers(record))
        if isinstance(record, StepMetrics) and record.groups:
            values |= self._of_completions(record)
        # The step is also logged as a value: W&B's own step must grow with each record, and a step may have two.
        place = _place(record.step, isinstance(record, EvalMetrics))
        self._run.log({**values, STEP: record.step}, step=place, commit=True)
        for alarm in record.alarms:
            self._run.alert(title=f"{alarm.kind} at step {alarm.step}", text=str(alarm), level="WARN")

    def _of_completions(self, record: StepMetrics) -> dict[str, Any]:
        """Histograms of rewards and lengths, and the first rows of the table of completions."""
        import wandb

        rollouts = [rollout for group in record.sampled for rollout in group.rollouts]
        rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
        made: dict[str, Any] = {
            "histograms/completion_length": wandb.Histogram([rollout.trajectory.trained_tokens for rollout in rollouts])
        }
        if rewards:
            made["histograms/reward"] = wandb.Histogram(rewards)
        rows = (
            [record.step, asked(group.task, r.trajectory), transcript(r), r.reward, r.advantage]
            for group in record.sampled
            for r in group.rollouts
        )
        if self._cfg.completions:
            made[TABLE] = wandb.Table(columns=COLUMNS, data=list(islice(rows, self._cfg.completions)))
        return made

    def close(self) -> None:
        """Upload the newest adapter and end the run; for an offline run, print how to upload it."""
        newest, _ = newest_whole(self._folder / CHECKPOINTS)
        if newest is not None:
            self._keep("adapter", sorted(newest.glob("adapter*")))
        kept = Path(self._run.dir).parent if self._run.offline else None
        self._run.finish()
        if kept is not None:
            self._tell(f"W&B      wandb sync {shlex.quote(os.path.relpath(kept))}")

    def _keep(self, kind: str, files: list[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(f"{self._folder.resolve().name}-{kind}", "model" if kind == "adapter" else kind)
        for path in files:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)


def _place(step: int, evaluation: bool) -> int:
    """W&B's own step of a record. W&B ignores a record whose step it already has."""
    return 2 * step + evaluation


def _rewound(settings: dict[str, Any], resumed: RunState | None) -> Any:
    """Open a run; if it has steps after the `resumed` state, rewind it if W&B allows that.

    Raises `wandb.Error` if W&B cannot be reached.
    """
    import wandb

    run: Any = wandb.init(**settings, resume="allow")
    if resumed is None or run.offline or run.step <= _place(resumed.step, True) + 1:
        return run
    run.finish()
    last = _place(resumed.step, resumed.after is not None and resumed.after.step == resumed.step)
    try:
        return wandb.init(**settings, resume_from=f"{settings['id']}?_step={last}")
    except wandb.Error as error:
        warn(
            "W&B cannot rewind this run: %s. It keeps its old records after step %d, and ignores their repetitions",
            one_line(error),
            resumed.step,
        )
        wandb.teardown()
        return wandb.init(**settings, resume="allow")
