"""`grpo report`: runs as one HTML file that needs nothing beside it, several laid over each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from grpo.config import EnvironmentConfig
from grpo.data.prompts import last_text
from grpo.environments.shown import asked, told
from grpo.runs.completions import read_completions, stored_steps
from grpo.runs.folder import COMPLETIONS
from grpo.telemetry.plots import curves, evaluations, stacked
from grpo.telemetry.pools import pools_of
from grpo.telemetry.recorded import RecordedRun
from grpo.tools.card import data_names, short_name, short_what
from grpo.types import EvalMetrics, Group, Rollout, Task

SHOWN = 3
"""Completions of each kind, and prompts that changed most."""
STEPS = 6
"""Steps whose completions are shown, evenly from the first to the last."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .25rem .8rem; text-align: left; vertical-align: top; overflow-wrap: break-word; }
th { border-bottom: 1px solid #999; } tr:nth-child(even) td { background: #f7f7f7; }
svg { max-width: 100%; height: auto; } .none { color: #777; }
pre { white-space: pre-wrap; background: #f7f7f7; padding: .6rem; margin: .3rem 0; }
pre.said { background: none; border-left: 3px solid #ccc; color: #666; margin-left: 1.5rem; }
nav a { margin-right: 1rem; }
details { margin: .5rem 0; } summary { cursor: pointer; } .best { color: #228833; } .worst { color: #cc3344; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } svg { background: #fff; }
  pre, tr:nth-child(even) td { background: #242424; } }
"""
SCRIPT = """
const box = document.getElementById("filter");
box?.addEventListener("input", () => {
  for (const entry of document.querySelectorAll("#completions .entry"))
    entry.hidden = !entry.textContent.toLowerCase().includes(box.value.toLowerCase());
});
"""


@dataclass(frozen=True, slots=True)
class PagePart:
    """A part of the page: its anchor, its heading, and its HTML (none: there is nothing to show, and it is said)."""

    anchor: str
    heading: str
    body: str | None


LOST = {"crash": "crashes", "memory": "too much memory"}
"""Failures of processes that environments share, and their headings."""


def report(runs: Sequence[RecordedRun]) -> str:
    """The page, from what the runs' folders hold."""
    sections = [
        PagePart("setup", "What was trained on what", _setup(runs)),
        *([PagePart("alarms", "What went wrong", wrong)] if (wrong := _alarms(runs)) else []),
        PagePart("reward", "Reward", curves(runs, ["reward"])),
        PagePart("kl", "KL to the reference", curves(runs, ["kl"])),
        *([PagePart("teacher", "KL to the teacher", taught)] if (taught := curves(runs, ["teacher/kl"])) else []),
        PagePart("length", "Completion length", curves(runs, ["completions/mean_length", "completions/max_length"])),
        PagePart("entropy", "Entropy", curves(runs, ["entropy"])),
        PagePart("clip", "Clipped fractions", curves(runs, ["clip_ratio/low_mean", "clip_ratio/high_mean"])),
        PagePart("evaluation", "Evaluation, with 95 % intervals", _evaluation(runs)),
        *([PagePart("curriculum", "Curriculum: tasks by solve rate", drawn)] if (drawn := pools_of(runs)) else []),
        PagePart("time", "Where the time goes", _time(runs)),
        PagePart("memory", "Peak memory, GB", curves(runs, ["peak_memory_gb"])),
        PagePart("failures", "Reward failures", _failures(runs)),
        PagePart("completions", "Completions to read", _completions(runs)),
    ]
    title = escape("GRPO: " + ", ".join(run.folder.name for run in runs))
    links = "".join(f'<a href="#{part.anchor}">{escape(part.heading)}</a> ' for part in sections)
    parts = "".join(_html(section) for section in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1><nav>{links}</nav>{parts}<script>{SCRIPT}</script></body></html>\n"
    )


def _html(section: PagePart) -> str:
    body = section.body or '<p class="none">Nothing of this is on record.</p>'
    return f'<section id="{section.anchor}"><h2>{escape(section.heading)}</h2>{body}</section>'


def _setup(runs: Sequence[RecordedRun]) -> str:
    rows = []
    for run in runs:
        cfg = run.recipe
        own = [config for config in cfg.conversations.values() if config.what]
        rewarding = [config for config in own if _rewarded(run, config)]
        graded = [
            *((short_name(one.use), one.weight) for one in cfg.rewards),
            *((short_what(one), one.weight) for one in rewarding),
        ]
        rewards = ", ".join(f"{use} × {weight:g}" for use, weight in graded)
        size = f"{cfg.rollout.prompts_per_step} × {cfg.rollout.num_generations}"
        silent = max(_values(run, "steps_without_signal"), default=0.0)
        steps = f"{run.step} of {cfg.optim.steps}, {run.state}" + (f", {silent:.0f} without a signal" if silent else "")
        replayed = sum(_values(run, "reuse/groups"))
        steps += f", {replayed:.0f} older groups replayed" if replayed else ""
        loss = f"{cfg.loss.type}, beta {cfg.loss.beta:g}, lr {cfg.optim.learning_rate:g}"
        loss += f", {cfg.teacher.describe()}" if cfg.teacher else ""
        talks = ", ".join([*map(short_what, own), *(short_name(one.use) for one in cfg.tools)])
        what = [
            run.folder.name,
            short_name(cfg.model.name),
            " and ".join(data_names(cfg)),
            talks or "none",
            rewards,
        ]
        rows.append([*what, size, loss, steps])
    heads = ["run", "model", "data", "environments and tools", "rewards", "prompts × completions", "loss", "steps"]
    return _table(heads, rows)


def _alarms(runs: Sequence[RecordedRun]) -> str | None:
    rows = [
        [run.folder.name, str(alarm.step), alarm.kind, alarm.what, alarm.advice] for run in runs for alarm in run.alarms
    ]
    return _table(["run", "step", "alarm", "what happened", "what to do"], rows) if rows else None


def _rewarded(run: RecordedRun, environment: EnvironmentConfig) -> bool:
    """Whether a step on record has a reward from an environment; where that cannot be told, it has."""
    name = environment.called
    known = {metric for record in run.steps for metric in record.values if metric.startswith(f"rewards/{name}/")}
    return not known or f"rewards/{name}/mean" in known


def _evaluation(runs: Sequence[RecordedRun]) -> str | None:
    named = [run for run in runs if run.evaluations]
    if not named:
        return None
    plot = evaluations(named, ["greedy", *dict.fromkeys(run.recipe.best_metric for run in named if run.recipe.eval)])
    rows = []
    for run in named:
        first, last = run.evaluations[0], run.evaluations[-1]
        for name in last.values:
            rows.append([run.folder.name, name, _with_interval(first, name), _with_interval(last, name), str(last.n)])
    return (plot or "") + _table(["run", "metric", "first", "last", "prompts"], rows)


def _with_interval(metrics: EvalMetrics, name: str) -> str:
    low, high = metrics.intervals.get(name, (0.0, 0.0))
    return f"{metrics.values[name]:.3f} ({low:.3f} to {high:.3f})" if name in metrics.values else ""


def _time(runs: Sequence[RecordedRun]) -> str | None:
    parts = []
    for run in runs:
        seconds = {
            name.removeprefix("time/"): [record.values.get(name, 0.0) for record in run.steps]
            for name in sorted({name for record in run.steps for name in record.values if _is_phase(name)})
        }
        if plot := stacked(seconds, [record.step for record in run.steps]):
            total = sum(map(sum, seconds.values())) or 1.0
            shares = ", ".join(f"{name} {sum(values) / total:.0%}" for name, values in seconds.items())
            parts.append(f"<h3>{escape(run.folder.name)}</h3><p>{escape(shares)}</p>{plot}")
    return "".join(parts) or None


def _is_phase(name: str) -> bool:
    """Whether a metric is a phase of a step, `time/rollout`, and not part of one, `time/rewards/remote/p50`."""
    return name.startswith("time/") and name.count("/") == 1


def _failures(runs: Sequence[RecordedRun]) -> str | None:
    """For each reward, the completions that it failed on and had no score for; of an environment, conversations."""
    known = {name for run in runs for record in run.steps for name in record.values}
    more = [kind for kind in LOST if any(name.endswith(f"/{kind}_rate") for name in known)]
    rows = []
    for run in runs:
        names = sorted({name.split("/")[1] for record in run.steps for name in record.values if name[:8] == "rewards/"})
        for name in names:
            total = max(_values(run, f"rewards/{name}/failures"), default=0.0)
            rates = [_values(run, f"rewards/{name}/{kind}_rate") for kind in ("none", "error", "timeout", *more)]
            cells = [f"{fmean(values):.1%}" if values else "" for values in rates]
            rows.append([run.folder.name, name, f"{total:.0f}", *cells])
    headings = ["run", "reward", "failures", "no score", "errors", "timeouts", *(LOST[kind] for kind in more)]
    return _table(headings, rows) if rows else None


def _values(run: RecordedRun, name: str) -> list[float]:
    return [record.values[name] for record in run.steps if name in record.values]


def _completions(runs: Sequence[RecordedRun]) -> str | None:
    parts = []
    for run in runs:
        paths = stored_steps(run.folder / COMPLETIONS)
        if not paths:
            continue
        chosen = sorted({round(i * (len(paths) - 1) / max(1, STEPS - 1)) for i in range(STEPS)})
        steps = [_sampled(*read_completions(paths[place])) for place in chosen]
        parts.append(f"<h3>{escape(run.folder.name)}</h3>" + _changed(steps))
        parts += [_of_step(step, groups) for step, groups in steps]
    return '<p><input id="filter" placeholder="only those with…"></p>' + "".join(parts) if parts else None


def _sampled(step: int, groups: Sequence[Group]) -> tuple[int, list[Group]]:
    """A stored step with the groups that it sampled itself: those that it replayed are in an earlier step's file."""
    return step, [group for group in groups if not group.replayed]


def _of_step(step: int, groups: Sequence[Group]) -> str:
    """The best and the worst completions of a step."""
    rated = sorted(
        (
            (rollout.reward, place, group.task, rollout)
            for place, (group, rollout) in enumerate((g, r) for g in groups for r in g.rollouts)
            if rollout.reward is not None
        ),
        key=lambda rated: (-rated[0], rated[1]),
    )
    best, worst = rated[:SHOWN], rated[max(SHOWN, len(rated) - SHOWN) :]
    shown = [_entry("best", task, rollout) for _, _, task, rollout in best]
    shown += [_entry("worst", task, rollout) for _, _, task, rollout in worst]
    return f"<details><summary>step {step}: best and worst</summary>{''.join(shown)}</details>"


def _changed(steps: Sequence[tuple[int, list[Group]]]) -> str:
    """The tasks whose mean reward changed most between two of the steps."""
    seen: dict[tuple[str, int], list[tuple[float, int, Group]]] = {}
    for step, groups in steps:
        for group in groups:
            rewards = [rollout.reward for rollout in group.rollouts if rollout.reward is not None]
            if rewards:
                seen.setdefault(group.task.identity, []).append((fmean(rewards), step, group))
    changes = sorted(
        ((times[-1][0] - times[0][0], times) for times in seen.values() if len(times) > 1),
        key=lambda change: -abs(change[0]),
    )
    parts = []
    for change, times in changes[:SHOWN]:
        told = "".join(
            f"<p>step {step}, mean reward {mean:.3f}</p>" + _entry("then", group.task, group.rollouts[0])
            for mean, step, group in (times[0], times[-1])
        )
        prompt = escape(last_text(times[0][2].task.prompt))
        parts.append(f"<details><summary>most changed, {change:+.3f}: {prompt}</summary>{told}</details>")
    return "".join(parts) or '<p class="none">No prompt was seen at two of the steps shown.</p>'


def _entry(kind: str, task: Task, rollout: Rollout) -> str:
    scores = ", ".join(f"{name} {'none' if score is None else f'{score:g}'}" for name, score in rollout.scores.items())
    reward = "none" if rollout.reward is None else f"{rollout.reward:g}"
    length = f"{rollout.trajectory.trained_tokens} tokens, {rollout.trajectory.finish_reason}"
    return (
        f'<div class="entry"><b class="{kind}">reward {reward}</b> ({escape(scores)}), advantage '
        f"{rollout.advantage:+.3f}, {length}<pre>{escape(asked(task, rollout.trajectory))}</pre>"
        f"{_answer(rollout)}</div>"
    )


def _answer(rollout: Rollout) -> str:
    """What the model said; indented what tools and environments said between it, which is not learned from."""
    if rollout.trajectory.conversation is None:
        return f"<pre>{escape(rollout.trajectory.text)}</pre>"
    return "".join(
        f"<pre{'' if said.trained else ' class=said'}>{escape(chr(10).join(said.lines()))}</pre>"
        for said in told(rollout)
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
