"""How everything is measured: sides take turns in one process, after a warm-up, and what counts is their ratio."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grpo import __version__
from grpo.backend.device import describe

LOWER_IS_BETTER = frozenset({"s", "ms", "GB"})
"""Units, or their first words: `s rollout` is a part of `s`."""

PACKAGES = ("mlx", "mlx-lm", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mkl", "numpy", "mlx-lm-lora", "trl")

Values = Mapping[str, float]
"""One run's measurements by unit: `{"tok/s": …, "GB": …}`."""


@dataclass(frozen=True, slots=True)
class Side:
    """One way to do a case's work: `run` does it once and says what it measured."""

    name: str
    run: Callable[[], Values]


@dataclass(frozen=True, slots=True)
class Row:
    """One side of one case in one unit. `cold` is the warm-up run, which `mean` and `sd` leave out.

    `ratio` says how many times better than the case's first side, whichever way the unit counts; None on that side.
    """

    case: str
    side: str
    unit: str
    mean: float
    sd: float
    runs: tuple[float, ...]
    cold: float
    ratio: float | None

    def line(self) -> str:
        """The row for a person."""
        spread = f" ± {100 * self.sd / self.mean if self.mean else 0.0:4.1f} %" if len(self.runs) > 1 else ""
        ratio = "" if self.ratio is None else f"  {self.ratio:.2f} ×"
        figures = f"{self.mean:>12,.3f} {self.unit:<6}{spread}  cold {self.cold:,.3f}"
        return f"{self.case:<24} {self.side:<24} {figures}{ratio}"


def alternate(case: str, sides: Sequence[Side], runs: int) -> list[Row]:
    """Warm every side up once, then let them take turns `runs` times.

    The first side is what the others are held against.
    """
    cold = [side.run() for side in sides]
    turns = [[side.run() for side in sides] for _ in range(runs)]
    rows: list[Row] = []
    for number, side in enumerate(sides):
        for unit, first in cold[number].items():
            series = tuple(turn[number][unit] for turn in turns)
            mean = statistics.fmean(series)
            peer = next((row.mean for row in rows if row.side == sides[0].name and row.unit == unit), None)
            rows.append(Row(case, side.name, unit, mean, _sd(series), series, first, _ratio(unit, mean, peer)))
    return rows


def _ratio(unit: str, mean: float, peer: float | None) -> float | None:
    if peer is None:
        return None
    return peer / mean if unit.split()[0] in LOWER_IS_BETTER else mean / peer


def _sd(series: Sequence[float]) -> float:
    return statistics.stdev(series) if len(series) > 1 else 0.0


def machine() -> str:
    """The machine in one line."""
    return f"{platform.system()} {platform.machine()}, {describe()}"


def versions() -> dict[str, str]:
    """Versions of what the measurements depend on, of the packages that are installed."""
    found = {"python": platform.python_version(), "grpo": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Write `machine`, `versions` and `rows` for other programs to read."""
    document: dict[str, Any] = {"machine": machine(), "versions": versions(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=2) + "\n")


def finish(rows: Iterable[Row], path: Path | None) -> None:
    """Print rows as they come, and write them to `path` if there is one."""
    print(machine(), flush=True)
    done = []
    for row in rows:
        print(row.line(), flush=True)
        done.append(row)
    if path is not None:
        write_json(path, done)
