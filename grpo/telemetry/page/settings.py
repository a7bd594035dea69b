"""What was trained on what, in a few lines for the page."""

from __future__ import annotations

from grpo.config import EnvironmentConfig
from grpo.telemetry.page.cards import values_of
from grpo.telemetry.recorded import RecordedRun
from grpo.tools.card import data_names, short_name, short_what


def settings(run: RecordedRun) -> list[list[str]]:
    """Headings, each with what the recipe says of it."""
    cfg = run.recipe
    own = [config for config in cfg.conversations.values() if config.what]
    graded = [
        *((short_name(one.use), one.weight) for one in cfg.rewards),
        *((short_what(one), one.weight) for one in own if _rewards(run, one)),
    ]
    loss = f"{cfg.loss.type}, beta {cfg.loss.beta:g}, learning rate {cfg.optim.learning_rate:g}"
    loss += f", {cfg.teacher.describe()}" if cfg.teacher else ""
    talks = ", ".join([*map(short_what, own), *(short_name(one.use) for one in cfg.tools)])
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
    """Whether a step on record has a reward from an environment; where that cannot be told, it has."""
    name = environment.called
    known = {metric for record in run.steps for metric in record.values if metric.startswith(f"rewards/{name}/")}
    return not known or f"rewards/{name}/mean" in known
