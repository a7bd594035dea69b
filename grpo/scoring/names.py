"""Checks the names that rewards log under: the names of the run's metrics are reserved. Worker processes import this
module."""

from __future__ import annotations

import re

_STEP = (
    "step",
    "reward",
    "reward_std",
    "reward_penalty",
    "frac_reward_zero_std",
    "solved_all",
    "solved_none",
    "mixed",
    "entropy",
    "kl",
    "beta",
    "off_policy_kept",
    "loss",
    "grad_norm",
    "learning_rate",
    "adapter_delta",
    "skipped_updates",
    "updates_without_signal",
    "steps_without_signal",
    "num_prompts",
    "num_tokens",
    "dropped_prompts",
    "epoch",
    "peak_memory_gb",
    "rollout_tokens_per_second",
    "step_time",
    "tokens",
    "alarms",
)
_EVALUATION = ("n", "grader", "failed_gradings", "greedy", r"(avg|pass|maj)@\d+", r".*_interval")
_CONVERSATIONS = ("turns/mean", "tools/(call|failure)_frequency", "stop/.*", "environment/.*")
_FOLDERS = (
    "rewards",
    "completions",
    "curriculum",
    "clip_ratio",
    "sampling",
    "speculation",
    "time",
    "sources",
    "update",
    "policy_lag",
    "ranks",
    "reuse",
    "teacher",
)
"""Prefixes of the run's metrics: every name below one of them, such as `time/rollout`, is reserved."""

_OWN = (*_STEP, *_EVALUATION, *_CONVERSATIONS, *(f"{folder}/.*" for folder in _FOLDERS))
_RESERVED = re.compile("|".join(_OWN), re.DOTALL)


def check_metric(name: str) -> None:
    """Raise ValueError for a name that `log_metric` refuses: a metric of the run, or a text that cannot be stored.

    TRL mixes the metrics of rewards with its own. In grpo, a reward's metric `step` would be read as the step's number.
    """
    _check_text("log_metric", name)
    if _RESERVED.fullmatch(name):
        raise ValueError(f"log_metric({name!r}): the run has a metric of this name; use another name: 'mine/{name}'")


def check_column(name: str) -> None:
    """Raise ValueError for a column name of `log_extra` that cannot be stored.

    Every valid text is allowed, because the prefix in `extra/<name>` keeps the column apart from the run's columns.
    """
    _check_text("log_extra", name)


def _check_text(hook: str, name: str) -> None:
    try:
        name.encode()
    except (AttributeError, UnicodeEncodeError):
        raise ValueError(f"{hook}({name!r}): a name must be a text without lone surrogates") from None
