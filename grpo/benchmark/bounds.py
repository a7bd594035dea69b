"""Bounds on measurements: the tables `[[bound]]` in the TOML file of `--check`.

`scripts/benchmarks/bounds.toml` has the project's bounds. `verdicts.py` compares a measurement with a bound.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx

from grpo.backend.device import on_gpu
from grpo.benchmark.protocol import ENOUGH, Measurement
from grpo.benchmark.setting import Setting
from grpo.errors import UserError

Figure = Literal["speed-up", "overhead", "value"]
"""What a bound limits: a row's ratio (`speed-up`), 1 / ratio - 1 (`overhead`), or the measured value (`value`)."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound on the rows of one benchmark whose case, side and unit match these patterns.

    `where` is "CPU", "GPU" (of any kind), "CUDA", "Metal", or a word of the device's name. `setting` has the values
    that the benchmark's setting must have; a `shape` in it means random weights. `why` is the reason for the bound.
    """

    benchmark: str
    side: str
    unit: str
    figure: Figure
    why: str
    least: float = -math.inf
    most: float = math.inf
    where: str | None = None
    case: str = "*"
    setting: Mapping[str, Any] = field(default_factory=dict)

    def applies(self, benchmark: str, setting: Setting, machine: frozenset[str]) -> bool:
        here = self.where is None or self.where in machine
        drawn = setting.model is None or "shape" not in self.setting
        same = all(getattr(setting, name) == value for name, value in self.setting.items())
        return benchmark == self.benchmark and here and drawn and same

    def matches(self, row: Measurement) -> bool:
        named = zip((row.case, row.side, row.unit), (self.case, self.side, self.unit), strict=True)
        return all(fnmatchcase(name, pattern) for name, pattern in named)

    def figures(self, row: Measurement) -> Sequence[float]:
        """The bounded figure of each turn."""
        if self.figure == "value":
            return row.runs
        return row.ratios if self.figure == "speed-up" else [1 / ratio - 1 for ratio in row.ratios]


def read_bounds(path: Path) -> list[Bound]:
    """The bounds in a file. Raises UserError, with the number of the bound, for a missing or invalid key."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--check {path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--check {path}: not TOML: {error}") from None
    tables = document.get("bound")
    if not isinstance(tables, list) or set(document) != {"bound"}:
        raise UserError(f"--check {path}: a file of bounds may contain only [[bound]] tables")
    return [_bound(table, f"--check {path}: bound {number}") for number, table in enumerate(tables, start=1)]


def _bound(table: Any, where: str) -> Bound:
    wanted = {part.name: part for part in fields(Bound)}
    if not isinstance(table, dict):
        raise UserError(f"{where}: not a table")
    if unknown := sorted(set(table) - set(wanted)):
        raise UserError(f"{where}: unknown key {unknown[0]}; the keys are {', '.join(wanted)}")
    required = [name for name, part in wanted.items() if part.default is part.default_factory is MISSING]
    if missing := [name for name in required if name not in table]:
        raise UserError(f"{where}: {missing[0]} is missing")
    for name, value in table.items():
        if not isinstance(value, _kind(name)) or isinstance(value, bool):
            raise UserError(f"{where}: {name} has the wrong type: {value!r}")
    if table["figure"] not in get_args(Figure):
        raise UserError(f"{where}: figure is {table['figure']!r}; expected {', '.join(get_args(Figure))}")
    if odd := sorted(set(table.get("setting", {})) - {part.name for part in fields(Setting)}):
        raise UserError(f"{where}: there is no setting {odd[0]}")
    bound = Bound(**table)
    if not (math.isfinite(bound.least) or math.isfinite(bound.most)):
        raise UserError(f"{where}: it has no limit: add least or most")
    return bound


def _kind(name: str) -> Any:
    """The type of a key's value."""
    return {"least": int | float, "most": int | float, "setting": dict}.get(name, str)


def bounds_for(table: Sequence[Bound], benchmark: str, setting: Setting) -> list[Bound]:
    """The bounds that apply to this benchmark with this setting on this machine."""
    machine = machine_words()
    return [bound for bound in table if bound.applies(benchmark, setting, machine)]


def required_bounds(table: Sequence[Bound], benchmark: str, setting: Setting) -> list[Bound]:
    """The bounds that `--check` compares measurements with.

    Raises UserError if no bound applies, or if there are too few runs to tell a shortfall from noise.
    """
    if setting.runs < ENOUGH:
        raise UserError(f"--check: fewer than {ENOUGH} runs cannot tell a shortfall from noise: use --runs {ENOUGH}")
    if not (bounds := bounds_for(table, benchmark, setting)):
        here, known = "/".join(sorted(machine_words())), [b for b in table if b.benchmark == benchmark]
        where = "; ".join(dict.fromkeys(f"{b.where or 'anywhere'} {dict(b.setting) or ''}".strip() for b in known))
        raise UserError(
            f"--check: no bound applies to `bench {benchmark}` with this setting on this machine ({here}). Bounds "
            f"exist for: {where or 'nothing'}"
        )
    return bounds


def machine_words() -> frozenset[str]:
    """The words that a bound's `where` may name on this machine."""
    if not on_gpu():
        return frozenset({"CPU"})
    name = str(mx.device_info().get("device_name", ""))
    return frozenset({"GPU", "CUDA" if mx.cuda.is_available() else "Metal", *name.split()})
