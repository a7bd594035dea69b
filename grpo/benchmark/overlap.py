"""`grpo bench overlap`: a step with a slow reward, scored while other groups decode, and scored after decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count
from typing import Any

from grpo.benchmark.protocol import Measurement, Side, Values, alternate
from grpo.benchmark.setting import Setting
from grpo.benchmark.train import step_trainer
from grpo.benchmark.work import synthetic
from grpo.config import RewardConfig
from grpo.rollout import RolloutEngine
from grpo.scoring.scorer import Scorer
from grpo.types import Group


def overlap_costs(setting: Setting, seconds: float, slots: int | None) -> list[Measurement]:
    """Seconds of a step whose reward takes `seconds` per group, and seconds of only sampling and of only scoring.

    `slots` rows decode simultaneously (None: the rows of one group), so that groups end one after the other, as they do
    if some prompts need longer answers than others.
    """
    with _scorer(seconds) as slow, _scorer(0) as instant:
        trainer = step_trainer(setting, scorer=slow)
        trainer.engine.generator.slots = slots or setting.completions
        groups = synthetic(setting, trainer.policy.model)
        early, late, steps = trainer.engine, _Late(trainer.engine), count(1)

        def step(scorer: Scorer, engine: RolloutEngine) -> Callable[[], Values]:
            def run() -> Values:
                trainer.scorer, trainer.engine = scorer, engine
                return _timed(lambda: trainer.step(next(steps)))

            return run

        sides = [
            Side("scored after all", step(slow, late)),
            Side("scored while others decode", step(slow, early)),
            Side("without the reward's time", step(instant, early)),
            Side("the reward's time", lambda: _timed(lambda: slow.score(groups))),
        ]
        return alternate(f"step, {seconds:g} s a group, {setting}", sides, setting.runs)


@contextmanager
def _scorer(seconds: float) -> Iterator[Scorer]:
    """A reward that takes `seconds` per group, in a worker process, as in a recipe."""
    use, timeout = "grpo.benchmark.slow:reward", 60 + 2 * seconds
    with closing(Scorer.of([RewardConfig(use=use, kwargs={"seconds": seconds}, timeout=timeout)])) as scorer:
        yield scorer


class _Late(RolloutEngine):
    """An engine that passes on no group before all groups are sampled."""

    def __init__(self, engine: RolloutEngine) -> None:
        super().__init__(engine.generator, engine.sampling, engine.environment)

    def rollout(self, *args: Any, **named: Any) -> list[Group]:
        return super().rollout(*args, **{**named, "whole": None})


def _timed(work: Callable[[], object]) -> Values:
    start = time.perf_counter()
    work()
    return {"s": time.perf_counter() - start}
