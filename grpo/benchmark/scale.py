"""`grpo bench scale`: how the cost grows with the number of rows.

Under `mlx.launch -n N`, every process takes its share of the rows, all start together, and the slowest gives the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from grpo.backend.device import setup
from grpo.backend.random import derive_key
from grpo.backend.ranks import Ranks
from grpo.benchmark.models import model_for
from grpo.benchmark.protocol import Measurement, Side, Values, alternate
from grpo.benchmark.rollout import requests_of, untold
from grpo.benchmark.setting import Setting
from grpo.benchmark.train import step_trainer
from grpo.errors import UserError
from grpo.generation.generator import Generator
from grpo.generation.sampling import Sampling

TIMES = (1, 2, 4, 8)
GROWTH = "× a row"


def scaling(setting: Setting) -> Iterator[Measurement]:
    """Rollouts and whole steps with 1, 2, 4 and 8 times the prompts. Only the first process yields rows.

    `× a row` is the cost per row, relative to the cost with the fewest rows. Raises UserError for fewer prompts than
    processes.
    """
    setup()
    ranks = Ranks.launched()
    if setting.prompts < ranks.size:
        raise UserError(f"--prompts {setting.prompts}: too few for {ranks.size} processes")
    settings = {f"{times} × {setting.rows} rows": replace(setting, prompts=times * setting.prompts) for times in TIMES}
    generator = untold(model_for(setting), setting.rows)
    sides = {
        "rollout": [Side(name, _rollout(generator, scaled, ranks)) for name, scaled in settings.items()],
        "step": [Side(name, _step(scaled, ranks)) for name, scaled in settings.items()],
    }
    where = f"{setting.name}, {ranks.size} process{'es' if ranks.size > 1 else ''}"
    for what, sides_of_work in sides.items():
        rows = alternate(f"{what}, {where}", sides_of_work, setting.runs)
        if ranks.first:
            yield from [*rows, *_growth(rows, settings)]


def _rollout(generator: Generator, setting: Setting, ranks: Ranks) -> Callable[[], Values]:
    requests = ranks.share(requests_of(setting, generator.model))
    sampling = Sampling(max_tokens=setting.completion_length)

    def run() -> Values:
        generator.slots = setting.rows
        seconds = _slowest(lambda: generator.generate(requests, sampling, derive_key(0, "draw", *ranks.own)), ranks)
        return {"tok/s": setting.tokens / seconds, "s": seconds}

    return run


def _step(setting: Setting, ranks: Ranks) -> Callable[[], Values]:
    trainer, steps = step_trainer(setting, ranks), iter(range(1, 1_000_000))
    return lambda: {"s": _slowest(lambda: trainer.step(next(steps)), ranks)}


def _slowest(work: Callable[[], object], ranks: Ranks) -> float:
    ranks.wait()
    start = time.perf_counter()
    work()
    everyone: list[float] = ranks.gather(time.perf_counter() - start)
    return max(everyone)


def _growth(rows: list[Measurement], settings: dict[str, Setting]) -> list[Measurement]:
    """Seconds per row, turn by turn, relative to the side with the fewest rows."""
    base, *others = [row for row in rows if row.unit == "s"]
    found = []
    for row in others:
        times = settings[row.side].rows / settings[base.side].rows
        grown = tuple(mine / theirs / times for mine, theirs in zip(row.runs, base.runs, strict=True))
        found.append(Measurement(row.case, row.side, GROWTH, grown, row.cold / base.cold / times))
    return found
