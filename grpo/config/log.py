"""The sections that say what is kept of a run: `checkpoint` and `log`."""

from __future__ import annotations

from typing import Literal

from grpo.config.section import Name, NonNegative, Positive, Section


class CheckpointConfig(Section):
    every: Positive = 25
    """Steps between checkpoints. The last step always has one."""
    keep: Positive = 3
    """How many to keep: the newest. The best is kept besides."""
    metric_for_best_model: str | None = None
    """The evaluation's metric by which one is the best, highest first, such as `pass@4`. Default: avg@k."""


class WandbConfig(Section):
    project: str = "grpo"
    """Project to log to."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes the run to its folder, for `wandb sync` later. So does `online` where W&B cannot be reached."""
    entity: str | None = None
    """User or team. Default: that of the login."""
    group: str | None = None
    """Runs of one group are shown together."""
    tags: tuple[str, ...] = ()
    """To find the run by."""
    notes: str | None = None
    """What the run is for."""
    completions: NonNegative = 8
    """Rows a step in the table of completions. 0: no table."""


class TrackioConfig(Section):
    project: str = "grpo"
    """Project to log to."""
    name: str | None = None
    """The run's name there. Default: that of its folder."""
    group: str | None = None
    """Runs of one group are shown together."""
    space_id: str | None = None
    """A Space, `owner/name`, that gets the run, and is made where there is none. Default: none; the run stays in
    Trackio's database on this machine."""


class CompletionsConfig(Section):
    every: Positive = 1
    """Steps between those whose completions are stored; the first one's always are."""
    groups: Positive | None = None
    """Of a stored step, keep so many prompts with all their completions, drawn from the seed. Default: all."""


class LogConfig(Section):
    wandb: WandbConfig | None = None
    """Log to Weights & Biases as well."""
    tensorboard: bool = False
    """Write TensorBoard's event files into `<run>/tensorboard` as well."""
    trackio: TrackioConfig | None = None
    """Log to Trackio as well. It needs the extra `trackio`."""
    use: tuple[Name, ...] = ()
    """Loggers of your own, `file.py:function`, `file.py` (of one function) or `package.module:function`: each is called
    with every StepMetrics and EvalMetrics. One that raises is left out from there on."""
    completions: CompletionsConfig | None = CompletionsConfig()
    """Which completions are stored in the run's folder, with scores, failures and advantages. null: none."""
    kl: Positive | Literal["auto"] | None = "auto"
    """Steps between measurements of `kl` in a run without a penalty, which tells it at every step. Each is one more
    forward pass of the step's completions under the reference, about a third of an update, and where whole weights
    train the reference is a second copy of them. `auto`: 10, but never where whole weights train. null: never."""
