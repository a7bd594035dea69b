"""Writes TensorBoard's event files, through tensorboardX."""

from __future__ import annotations

import textwrap
from pathlib import Path

from grpo.environments.shown import asked, transcript
from grpo.runs.state import RunState
from grpo.telemetry.sent import best_of, named_numbers
from grpo.types import EvalMetrics, StepMetrics


class TensorboardLogger:
    """Writes scalars under `train/` and `eval/`, histograms of rewards and lengths, and each step's best completion."""

    def __init__(self, folder: Path, resumed: RunState | None = None, texts: bool = True) -> None:
        """For a `resumed` run, TensorBoard drops the steps after the checkpoint, because the run repeats them.

        `texts`: whether to write completions.
        """
        self._texts = texts
        from tensorboardX import SummaryWriter

        folder, suffix, purge = folder / "tensorboard", "", None
        if resumed is not None:
            suffix = f".after-{resumed.step}"
            purge = resumed.step + 1 if resumed.step else 0  # at step 0 the run repeats the first evaluation, too
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10, filename_suffix=suffix)

    def log(self, record: StepMetrics | EvalMetrics) -> None:
        for name, value in named_numbers(record).items():
            self._writer.add_scalar(name, value, record.step)
        for alarm in record.alarms:
            self._writer.add_text(f"alarms/{alarm.kind}", str(alarm), record.step)
        if isinstance(record, StepMetrics) and record.groups:
            rollouts = [rollout for group in record.sampled for rollout in group.rollouts]
            lengths = [rollout.trajectory.trained_tokens for rollout in rollouts]
            rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
            for name, values in (("completion_length", lengths), ("reward", rewards)):
                if values:
                    self._writer.add_histogram(f"histograms/{name}", values, record.step)
            if self._texts and (best := best_of(record)) is not None:
                task, rollout = best
                text = f"{asked(task, rollout.trajectory)}\n\n{transcript(rollout)}"
                self._writer.add_text("completions/best", textwrap.indent(text, "    "), record.step)  # not as Markdown

    def close(self) -> None:
        self._writer.close()
