"""The page's table of a run's main settings."""

from __future__ import annotations

from grpo.config import EnvironmentConfig
from grpo.telemetry.page.cards import values_of
from grpo.telemetry.recorded import RecordedRun
from grpo.tools.card import data_names, short_name, short_what


def settings(run: RecordedRun) -> list[list[str]]:
    """Rows of the table: [heading, text]."""
    cfg = run.recipe
    environments = [config for config in cfg.conversations.values() if config.what]
    graded = [
        *((short_name(reward.use), reward.weight) for reward in cfg.rewards),
        *((short_what(config), config.weight) for config in environments if _rewards(run, config)),
    ]
    loss = f"{cfg.loss.type}, beta {cfg.loss.beta:g}, learning rate {cfg.optim.learning_rate:g}"
    loss += f", {cfg.teacher.describe()}" if cfg.teacher else ""
    talks = ", ".join([*map(short_what, environments), *(short_name(tool.use) for tool in cfg.tools)])
    adapter = cfg.adapter.type if cfg.adapter.type == "full" else f"{cfg.adapter.type}, rank {cfg.adapter.rank}"
    return [
        ["model", f"{short_name(cfg.model.name)} ({adapter})"],
        ["data", " and ".join(data_names(cfg))],
        *([["environments and tools", talks]] if talks else []),
        ["rewards", ", ".join(f"{use} × {weight:g}" for use, weight in graded) or "none"],
        ["prompts × completions", f"{cfg.rollout.prompts_per_step} × {cfg.rollout.num_generations}"],
        ["loss", loss],
        ["steps", _steps(run)],
    ]


def _steps(run: RecordedRun) -> str:
    silent = max(values_of(run, "steps_without_signal"), default=0.0)
    replayed = sum(values_of(run, "reuse/groups"))
    parts = [
        f"{run.step} of {run.recipe.optim.steps}",
        run.state,
        f"{silent:.0f} without a signal" if silent else "",
        f"{replayed:.0f} older groups replayed" if replayed else "",
    ]
    return ", ".join(filter(None, parts))


def _rewards(run: RecordedRun, environment: EnvironmentConfig) -> bool:
    """Whether a recorded step has a reward from the environment; True if the records do not tell."""
    name = environment.called
    known = {metric for record in run.steps for metric in record.values if metric.startswith(f"rewards/{name}/")}
    return not known or f"rewards/{name}/mean" in known
