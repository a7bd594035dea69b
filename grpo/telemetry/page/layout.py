"""Defines the page's plots: their order, titles, metrics and descriptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpo.config import CurriculumConfig
from grpo.data.curriculum import TENTHS
from grpo.data.pools import POOLS
from grpo.telemetry.page.cards import is_phase
from grpo.telemetry.recorded import RecordedRun

CURRICULUM = "curriculum/"
OUTCOMES = ["solved_none", "mixed", "solved_all"]

REWARD, POLICY, COMPLETIONS, COST = "Reward", "Policy", "Completions", "Time and memory"

CURVES = (
    (REWARD, "Reward", ("reward",), "mean over the step's completions of the weighted sum of their rewards"),
    (
        REWARD,
        "Spread within groups",
        ("reward_std",),
        "standard deviation of the reward within a group, mean over groups",
    ),
    (
        REWARD,
        "Groups with equal rewards",
        ("frac_reward_zero_std",),
        "fraction of groups whose rewards are all equal: the policy learns nothing from them",
    ),
    (POLICY, "Entropy", ("entropy",), "of the policy at the sampling temperature, in nats, mean over tokens"),
    (POLICY, "KL to the reference", ("kl",), "estimate, mean over tokens, in nats"),
    (POLICY, "KL to the teacher", ("teacher/kl",), "KL(policy ‖ teacher), mean over tokens, in nats"),
    (
        POLICY,
        "Clipped fractions",
        ("clip_ratio/low_mean", "clip_ratio/high_mean"),
        "fraction of tokens whose ratio left the clip range below and above",
    ),
    (POLICY, "Gradient norm", ("grad_norm",), "before clipping"),
    (POLICY, "Loss", ("loss",), "near 0 by construction in on-policy GRPO: the value does not measure progress"),
    (POLICY, "Learning rate", ("learning_rate",), "of the step's last update"),
    (
        POLICY,
        "Sampler against trainer",
        ("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"),
        "absolute difference between the logprobs of the generator and of the trainer",
    ),
    (POLICY, "Age of completions", ("policy_lag/mean", "policy_lag/max"), "steps between sampling and learning"),
    (
        COMPLETIONS,
        "Completion length",
        ("completions/mean_length", "completions/max_length"),
        "tokens that the policy sampled, mean and longest",
    ),
    (
        COMPLETIONS,
        "Truncated and repeating",
        ("completions/clipped_ratio", "completions/repetition_ratio"),
        "fraction of completions ended by the length limit, and by the limit on repetition",
    ),
    (COMPLETIONS, "Turns", ("turns/mean",), "turns of the model in a conversation"),
    (
        COMPLETIONS,
        "Tool calls",
        ("tools/call_frequency", "tools/failure_frequency"),
        "calls per completion, and the fraction of calls that failed",
    ),
    (COST, "Peak memory", ("peak_memory_gb",), "in GB, since the run started"),
    (COST, "Sampling speed", ("rollout_tokens_per_second",), "tokens per second while completions are sampled"),
    (COST, "Time of a step", ("step_time",), "seconds"),
)
"""(section, title, metrics, description). A plot without data in any run is left out."""

Plot = dict[str, Any]


def layout(runs: Sequence[RecordedRun]) -> list[Plot]:
    """The plots that these runs have data for.

        section   the heading above the plot
        title     the plot's title
        about     what the plot shows, on one line
        kind      lines: each metric of each run is a curve; interval: each evaluation metric of each run is a curve
                  with its 95 % interval; stack: stacked metrics, one plot per run
        series    [[metric, label], …]
        shades    whether the colors are a scale from low to high (stack)
        run       the index of the plot's only run; null for a plot of all runs

    Metrics without a plot here get small plots at the end of the page.
    """
    known = {name for run in runs for record in run.steps for name in record.values}
    curves = [
        _plot(section, title, about, "lines", {name: _short(name, names) for name in names if name in known})
        for section, title, names, about in CURVES
    ]
    plots = [*_evaluations(runs), *curves, *_families(known), *_stacks(runs, known)]
    order = list(dict.fromkeys(["Reward", "Evaluation", POLICY, COMPLETIONS, COST, *(p["section"] for p in plots)]))
    return sorted((plot for plot in plots if plot["series"]), key=lambda plot: order.index(plot["section"]))


def _plot(section: str, title: str, about: str, kind: str, series: Mapping[str, str]) -> Plot:
    pairs = [[name, label] for name, label in series.items()]
    return {
        "section": section,
        "title": title,
        "about": about,
        "kind": kind,
        "series": pairs,
        "shades": False,
        "run": None,
    }


def _short(name: str, names: Sequence[str]) -> str:
    """The label of a metric in its plot: the last part of its name, if the plot has several metrics."""
    return name.rpartition("/")[2] if len(names) > 1 else name


def _evaluations(runs: Sequence[RecordedRun]) -> list[Plot]:
    """A plot per evaluation metric: first `greedy` and the metrics that select the runs' best checkpoints."""
    best = [run.recipe.best_metric for run in runs if run.recipe.eval]
    known = dict.fromkeys(name for run in runs for evaluation in run.evaluations for name in evaluation.values)
    chosen = [name for name in dict.fromkeys(["greedy", *best, *known]) if name in known]
    about = "on held-out prompts, with 95 % intervals over prompts"
    return [_plot("Evaluation", name, about, "interval", {name: name}) for name in chosen]


def _families(known: set[str]) -> list[Plot]:
    """Plots whose metrics contain names from the recipe: rewards and sources."""

    def family(prefix: str, suffix: str) -> dict[str, str]:
        found = sorted(name for name in known if name.startswith(prefix) and name.endswith(suffix))
        return {name: name.removeprefix(prefix).removesuffix(suffix) for name in found}

    rewards = family("rewards/", "/mean")
    rewards = rewards if len(rewards) > 1 else {}  # a single reward equals `reward` up to its weight
    return [
        _plot(REWARD, "Each reward", "mean score of each reward, before weights", "lines", rewards),
        _plot(
            "Sources",
            "Reward by source",
            "mean reward of each source's completions",
            "lines",
            family("sources/", "/reward"),
        ),
        _plot("Sources", "Length by source", "mean tokens", "lines", family("sources/", "/mean_length")),
        _plot(
            "Sources",
            "Solved by source",
            "fraction of groups that are all solved",
            "lines",
            family("sources/", "/solved_all"),
        ),
    ]


def _stacks(runs: Sequence[RecordedRun], known: set[str]) -> list[Plot]:
    """Stacked plots of each run: outcomes, phases, finish reasons of conversations, sources, curriculum pools."""
    shares = {name for name in _under(known, "sources/") if name.endswith("/share")}
    parts = [
        (
            REWARD,
            "Groups by outcome",
            "fraction of groups in which no, some, or all completions have reward 1 or more",
            OUTCOMES,
            "",
        ),
        (COST, "Where the time goes", "seconds of each phase of a step", sorted(filter(is_phase, known)), "time/"),
        (COMPLETIONS, "How conversations end", "fraction of each reason", sorted(_under(known, "stop/")), "stop/"),
        ("Sources", "Tasks by source", "share of the step's tasks", sorted(shares), "sources/"),
    ]
    plots = []
    for place, run in enumerate(runs):
        own = {name for record in run.steps for name in record.values if record.values[name]}
        for section, title, about, names, prefix in parts:
            series = {name: name.removeprefix(prefix).removesuffix("/share") for name in names if name in own}
            plots.append(_plot(section, title, about, "stack", series) | {"run": place, "shades": names is OUTCOMES})
        plots += [plot | {"run": place} for plot in _pools(run)]
    return plots


def _under(names: set[str], prefix: str) -> set[str]:
    return {name for name in names if name.startswith(prefix)}


def _pools(run: RecordedRun) -> list[Plot]:
    """For a run with a curriculum: a histogram of its tasks' solve rates over steps, and the draws per pool. With
    `data.sources`, these two plots for each source with a curriculum."""
    known = {name for record in run.steps for name in record.values}
    plots = []
    for source, data in run.recipe.data.parts.items():
        folder = f"{CURRICULUM}{source}/" if run.recipe.data.sources else CURRICULUM
        if f"{folder}unseen" not in known or data.curriculum is None:
            continue
        suffix = f" ({source})" if run.recipe.data.sources else ""
        rates = _plot(
            "Curriculum",
            f"Tasks by solve rate{suffix}",
            "tasks by the solve rate of their latest group",
            "stack",
            _rates(folder),
        )
        drawn = {f"{folder}drawn/{pool}": said for pool, said in _described(data.curriculum).items()}
        draws = _plot(
            "Curriculum", f"Draws by pool{suffix}", "share of the step's tasks drawn from each pool", "stack", drawn
        )
        plots += [rates | {"shades": True}, draws]
    return plots


def _rates(folder: str) -> dict[str, str]:
    """The metrics of the histogram, which begin with `folder`, with labels for their ranges of solve rates."""
    names = [f"{folder}{name.removeprefix(CURRICULUM)}" for name in TENTHS]
    said = {name: f"{place / len(names):g} to {(place + 1) / len(names):g}" for place, name in enumerate(names)}
    return {**said, f"{folder}unseen": "no rate yet"}


def _described(cfg: CurriculumConfig) -> dict[str, str]:
    """Labels of the pools, with the range of solve rates of each."""
    low, high = f"{cfg.hard_threshold:g}", f"{cfg.easy_threshold:g}"
    bounds = {"hard": f"0 to {low}", "normal": f"above {low}, to {high}", "easy": f"above {high}, to 1"}
    return {pool: f"{pool} ({bounds.get(pool, 'no rate yet')})" for pool in POOLS}
