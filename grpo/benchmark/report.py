"""The output of a benchmark: rows and verdicts as text, a JSON file for programs, an exit code."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from grpo.backend.device import cpu_cores, describe
from grpo.backend.versions import versions
from grpo.benchmark.bounds import read_bounds, required_bounds
from grpo.benchmark.protocol import CONFIDENCE, ENOUGH, Measurement, interval
from grpo.benchmark.setting import Setting
from grpo.benchmark.verdicts import Verdict, judge
from grpo.errors import RunError

BETTER = "times better than the case's first row, or than the row's reference (below 1: worse)"
LEGEND = (
    "mean ± sd of the runs after the cold run; spread: (max - min) / mean; ratio (×): median over turns, "
    f"{BETTER}, with its {100 * CONFIDENCE:.0f} % interval (fewer than {ENOUGH} runs: minimum and maximum)"
)
LEGEND_OF_ONE = f"one run after the cold run; ratio (×): {BETTER}"


def report(
    benchmark: str,
    setting: Setting,
    measure: Callable[[], Iterable[Measurement]],
    path: Path | None,
    check: Path | None,
) -> None:
    """Measure, print each row immediately, and write the rows to `path` if it is given.

    `check` is a file of bounds for the rows. Raises UserError before the measurements if no bound applies, and RunError
    after them for the bounds that fall short.
    """
    bounds = required_bounds(read_bounds(check), benchmark, setting) if check is not None else []
    rows = list(_shown(measure()))
    verdicts = judge(bounds, rows)
    if path is not None and rows:  # with several processes, only one has rows
        _write(path, document(benchmark, setting, rows, verdicts))
    if verdicts:
        print("\n".join(["\nbounds", *(f"  {verdict.line()}" for verdict in verdicts)]))
    if bounds and not verdicts:
        wanted = "; ".join(f"{bound.case}: {bound.side} ({bound.why})" for bound in bounds)
        raise RunError(f"bench {benchmark}: none of the bounded rows was measured: {wanted}")
    if short := [verdict.line() for verdict in verdicts if verdict.falls_short]:
        raise RunError("\n".join([f"bench {benchmark}: {len(short)} of {len(verdicts)} bounds fall short:", *short]))


def _write(path: Path, found: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"--json {path}: cannot be written: {error.strerror}; the rows are printed above") from error


def _shown(rows: Iterable[Measurement]) -> Iterator[Measurement]:
    """Yield the rows and print them, with the machine before the first row and the case before its rows."""
    case = None
    for row in rows:
        if case is None:
            legend = LEGEND if len(row.runs) > 1 else LEGEND_OF_ONE
            print("\n".join([machine(), ", ".join(f"{name} {v}" for name, v in versions().items()), legend]))
        if row.case != case:
            print(f"\n{row.case}")
            case = row.case
        print(f"  {row.line()}", flush=True)
        yield row


def machine() -> str:
    """The machine on one line."""
    processor = mx.device_info(mx.Device(mx.cpu)).get("device_name", "unknown")
    return f"{platform.system()} {platform.machine()}, {cpu_cores()} cores ({processor}), {describe()}"


def document(
    benchmark: str, setting: Setting, rows: Sequence[Measurement], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    """The content of the JSON file."""
    return {
        "benchmark": benchmark,
        "setting": {**asdict(setting), "shape": None if setting.model else setting.shape},
        "machine": machine(),
        "versions": versions(),
        "rows": [_row(row) for row in rows],
        "bounds": [_verdict(verdict) for verdict in verdicts],
    }


def _row(row: Measurement) -> dict[str, Any]:
    low, high = interval(row.ratios) if row.ratios else (None, None)
    figures = {"mean": row.mean, "sd": row.sd, "spread": row.spread, "ratio": row.ratio}
    return {**asdict(row), **figures, "ratio_low": low, "ratio_high": high}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    bound, row = verdict.bound, verdict.row
    limits = {name: end for name, end in (("least", bound.least), ("most", bound.most)) if abs(end) != float("inf")}
    return {
        "case": row.case, "side": row.side, "unit": row.unit, "figure": bound.figure, "median": verdict.figure,
        "low": verdict.low, "high": verdict.high, **limits, "falls_short": verdict.falls_short, "why": bound.why,
    }  # fmt: skip
