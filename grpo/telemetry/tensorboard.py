"""TensorBoard's event files, by the small writer of tensorboardX."""

from __future__ import annotations

from pathlib import Path

from grpo.types import EvalMetrics, StepMetrics


class TensorboardLogger:
    """Writes scalars under `train/` and `eval/`, and histograms of rewards and lengths."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=10)

    def log(self, record: StepMetrics | EvalMetrics) -> None:
        prefix = "eval" if isinstance(record, EvalMetrics) else "train"
        for name, value in record.values.items():
            self._writer.add_scalar(f"{prefix}/{name}", value, record.step)
        if isinstance(record, StepMetrics) and record.groups:
            rollouts = [rollout for group in record.groups for rollout in group.rollouts]
            lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
            rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
            for name, values in (("completion_length", lengths), ("reward", rewards)):
                if values:
                    self._writer.add_histogram(f"histograms/{name}", values, record.step)

    def close(self) -> None:
        self._writer.close()
