"""The sections `checkpoint` and `log`: what a run saves, and where it logs."""

from __future__ import annotations

from typing import Literal

from grpo.config.section import Name, NonNegative, Positive, Section


class CheckpointConfig(Section):
    every: Positive = 25
    """Steps between checkpoints. The last step always writes a checkpoint."""
    keep: Positive = 3
    """Number of checkpoints to keep: the newest. The best checkpoint is kept in addition."""
    metric_for_best_model: str | None = None
    """The evaluation metric that selects the best checkpoint, such as `pass@4`. The highest value wins. Default:
    avg@k."""


class WandbConfig(Section):
    project: str = "grpo"
    """W&B project to log to."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes the run to its folder, to be uploaded later by `wandb sync`. `online` does the same if it cannot
    reach W&B."""
    entity: str | None = None
    """User or team. Default: the entity of the login."""
    group: str | None = None
    """Name of a group of runs. W&B shows the runs of a group together."""
    tags: tuple[str, ...] = ()
    """Tags that help to find the run."""
    notes: str | None = None
    """A note on what the run is for."""
    completions: NonNegative = 8
    """Rows per step in the table of completions. 0: no table."""


class TrackioConfig(Section):
    project: str = "grpo"
    """Trackio project to log to."""
    name: str | None = None
    """Name of the run in Trackio. Default: the name of the run's folder."""
    group: str | None = None
    """Name of a group of runs. Trackio shows the runs of a group together."""
    space_id: str | None = None
    """A Space, `owner/name`, that receives the run. It is created if it does not exist. Default: none; the run stays in
    Trackio's database on this machine."""


class CompletionsConfig(Section):
    every: Positive = 1
    """Store the completions of one step in this many, starting with the first step. 1: of every step."""
    groups: Positive | None = None
    """Number of prompts to keep from each stored step, with all their completions. The seed decides which. Default: all
    prompts."""


class LogConfig(Section):
    wandb: WandbConfig | None = None
    """Also log to Weights & Biases."""
    tensorboard: bool = False
    """Also write TensorBoard event files into `<run>/tensorboard`."""
    trackio: TrackioConfig | None = None
    """Also log to Trackio. It needs the extra `trackio`."""
    use: tuple[Name, ...] = ()
    """Your own loggers, `file.py:function`, `file.py` (if it has one function) or `package.module:function`. grpo calls
    each logger with every StepMetrics and EvalMetrics. If a logger raises an exception, grpo stops calling it and keeps
    training."""
    completions: CompletionsConfig | None = CompletionsConfig()
    """Which completions are stored in the run's folder, with their scores, failures and advantages. null: none."""
    kl: Positive | Literal["auto"] | None = "auto"
    """Steps between measurements of `kl` in a run without a KL penalty. (A run with a penalty reports `kl` at every
    step.) Each measurement is one more forward pass of the step's completions under the reference, about a third of an
    update. With `adapter.type: full` the reference is a second copy of the weights. `auto`: 10, but never with
    `adapter.type: full`. null: never."""
