"""What measurements are bounded by, in one table. `verdicts.py` says how a measurement is held against it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import mlx.core as mx

from grpo.backend.device import on_gpu
from grpo.benchmark.lengths import GROWTH
from grpo.benchmark.protocol import ENOUGH, Row
from grpo.benchmark.setting import Setting
from grpo.errors import UserError

Figure = Literal["speed-up", "overhead", "value"]
"""Of a row: its ratio; 1 / ratio - 1, what it costs more than the side it is held against; or what was measured."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A promise about the rows of one benchmark whose case, side and unit these patterns match.

    `where` is "CPU", "GPU" (of any kind), "CUDA", "Metal", or a word of the device's name; `setting` what must have
    been asked for. `why` says what makes it hold.
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
        return benchmark == self.benchmark and here and all(getattr(setting, k) == v for k, v in self.setting.items())

    def matches(self, row: Row) -> bool:
        named = zip((row.case, row.side, row.unit), (self.case, self.side, self.unit), strict=True)
        return all(fnmatchcase(name, pattern) for name, pattern in named)

    def figures(self, row: Row) -> Sequence[float]:
        """One for each turn."""
        if self.figure == "value":
            return row.runs
        return row.ratios if self.figure == "speed-up" else [1 / ratio - 1 for ratio in row.ratios]


_06B = {"shape": "qwen3-0.6b", "model": None, "completion_length": 128}
_ONE_M = {"shape": "qwen3-1m", "model": None}
_ROLLOUT = {**_ONE_M, "prompts": 8, "completions": 8, "prompt_length": 128, "completion_length": 128}
_STEP = {**_ONE_M, "prompts": 2, "completions": 8, "prompt_length": 64, "completion_length": 64}
_UPDATE = {**_ONE_M, "completions": 8, "prompt_length": 512, "completion_length": 64}

BOUNDS: tuple[Bound, ...] = (
    Bound("sampling", "top_k 50", "tok/s", "overhead", "a threshold by one kernel", most=0.005, where="GPU"),
    Bound("sampling", "top_p 0.9", "tok/s", "overhead", "the same, by shares of the whole", most=0.07, where="GPU"),
    Bound("sampling", "repetition_penalty 1.1", "tok/s", "overhead", "seen tokens are kept there", most=0.02,
          where="GPU"),
    Bound("sampling", "all of them", "tok/s", "overhead", "the filters share one threshold", most=0.05, where="GPU"),
    Bound("length", "* tokens", "ms", "overhead", "late steps are like early ones", least=-0.1, most=0.1, where="GPU"),
    Bound("context", "*", GROWTH, "value", "no length at which other kernels suddenly serve", most=1.15),
    Bound("streaming", "stream", "ms", "overhead", "text by the new token alone", most=0.026, case="50 tokens*"),
    Bound("streaming", "asyncio", "ms", "overhead", "a turn of the loop a token", most=0.068, case="50 tokens*"),
    Bound("streaming", "stream, *", "ms", "overhead", "callbacks are short", most=0.003, case="50 tokens*"),
    Bound("adapter", "after a switch", "ms switch", "value", "arrays are swapped, none is computed", most=1.0),
    Bound("adapter", "after a switch", "ms", "overhead", "a switch leaves nothing to be done again", most=0.0),
    Bound("rollout", "grpo", "tok/s", "speed-up", "joined layers and shared prompts, with the same BLAS", least=1.5,
          where="CPU", setting=_ROLLOUT),
    Bound("rollout", "grpo", "tok/s", "speed-up", "attention by kernels of our own", least=4.5,
          where="H200", setting={**_06B, "prompts": 8, "completions": 8, "prompt_length": 256}),
    Bound("rollout", "grpo", "tok/s", "speed-up", "a prompt's keys are read once for its group", least=5.0,
          where="H200", setting={**_06B, "prompts": 8, "completions": 16, "prompt_length": 2048}),
    Bound("train", "grpo", "s", "speed-up", "against mlx-lm-lora with the same BLAS (--peer-python, --blas)", least=4.0,
          where="CPU", case="step, *", setting=_STEP),
    Bound("train", "shared*", "s", "speed-up", "512 + 8 × 64 tokens instead of 8 × 576", least=3.0,
          where="CPU", case="update, *", setting=_UPDATE),
    Bound("train", "shared*", "s", "speed-up", "8.5 times fewer tokens through the layers", least=5.0,
          where="H200", case="update, *", setting={**_06B, "completions": 16, "prompt_length": 2048}),
)  # fmt: skip
"""Ratios depend on the load, so speed-ups are bounded at those that they were promised for.

Sampling and lengths are bounded on a GPU, where a step waits for launches. On a CPU a filter's passes over
`[rows, vocabulary]` are a tenth of a small model's step and more, and so is attention over some hundred tokens of the
completion itself: `scripts/benchmarks/RESULTS.md` has both."""


def bounds_for(benchmark: str, setting: Setting) -> list[Bound]:
    """The bounds on this benchmark of this setting on this machine."""
    machine = machine_words()
    return [bound for bound in BOUNDS if bound.applies(benchmark, setting, machine)]


def require_bounds(benchmark: str, setting: Setting) -> None:
    """Raise UserError where `--check` would have nothing to check, or too few runs to tell anything by."""
    if setting.runs < ENOUGH:
        raise UserError(f"--check: fewer than {ENOUGH} runs cannot tell noise from a shortfall: --runs {ENOUGH}")
    if not bounds_for(benchmark, setting):
        here, known = "/".join(sorted(machine_words())), [b for b in BOUNDS if b.benchmark == benchmark]
        where = "; ".join(dict.fromkeys(f"{b.where or 'anywhere'} {dict(b.setting) or ''}".strip() for b in known))
        raise UserError(
            f"--check: nothing of `bench {benchmark}` is bounded here ({here}). Bounded: {where or 'nothing'}"
        )


def machine_words() -> frozenset[str]:
    """What a bound's `where` may name here."""
    if not on_gpu():
        return frozenset({"CPU"})
    name = str(mx.device_info().get("device_name", ""))
    return frozenset({"GPU", "CUDA" if mx.cuda.is_available() else "Metal", *name.split()})
