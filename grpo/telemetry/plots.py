"""Plots for the report, by matplotlib, as SVG that stands in a page by itself."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from grpo.telemetry.recorded import RecordedRun

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Paul Tol's bright scheme, which colour-blind people can tell apart."""
DASHES = ("-", "--", ":", "-.")


def curves(runs: Sequence[RecordedRun], names: Sequence[str]) -> str | None:
    """Metrics over steps: a colour for each run, a dash for each metric. None where no run has any of them."""
    axes, figure = _axes()
    for run, colour in zip(runs, _colours(runs), strict=True):
        for name, dash in zip(names, _dashes(names), strict=True):
            points = [(record.step, record.values[name]) for record in run.steps if name in record.values]
            if points:
                label = _label(runs, names, run, name)
                axes.plot(*zip(*points, strict=True), dash, color=colour, label=label, linewidth=1.5)
    return _svg(axes, figure)


def evaluations(runs: Sequence[RecordedRun], names: Sequence[str]) -> str | None:
    """Evaluations over steps with their intervals."""
    axes, figure = _axes()
    for run, colour in zip(runs, _colours(runs), strict=True):
        for name, dash in zip(names, _dashes(names), strict=True):
            known = [evaluation for evaluation in run.evaluations if name in evaluation.values]
            if not known:
                continue
            steps, values = [evaluation.step for evaluation in known], [evaluation.values[name] for evaluation in known]
            low, high = zip(*(evaluation.intervals[name] for evaluation in known), strict=True)
            axes.plot(steps, values, dash, color=colour, marker="o", label=_label(runs, names, run, name))
            axes.fill_between(steps, low, high, color=colour, alpha=0.12)
    return _svg(axes, figure)


def stacked(
    parts: Mapping[str, Sequence[float]],
    steps: Sequence[int],
    unit: str = "seconds",
    colours: Sequence[str] = COLOURS,
) -> str | None:
    """What each step is made of: the parts on top of each other, such as how long each phase takes."""
    axes, figure = _axes(unit)
    if steps:
        chosen = [colours[i % len(colours)] for i in range(len(parts))]
        axes.stackplot(steps, *parts.values(), labels=list(parts), colors=chosen, alpha=0.8)
    return _svg(axes, figure, beside=True)


def _axes(unit: str = "") -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes, figure


def _svg(axes: Any, figure: Any, beside: bool = False) -> str | None:
    """The figure, None if it is empty. The legend is in it, or `beside` it with the first entry lowest."""
    import matplotlib

    if not axes.has_data():
        return None
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "reverse": True} if beside else {}
    axes.legend(fontsize="small", frameon=False, **place)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "grpo"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]


def _colours(runs: Sequence[RecordedRun]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]


def _dashes(names: Sequence[str]) -> list[str]:
    return [DASHES[i % len(DASHES)] for i in range(len(names))]


def _label(runs: Sequence[RecordedRun], names: Sequence[str], run: RecordedRun, name: str) -> str:
    """What tells a curve from the others: the run, the metric, or both."""
    parts = ([run.folder.name] if len(runs) > 1 else []) + ([name] if len(names) > 1 or len(runs) == 1 else [])
    return " ".join(parts)
