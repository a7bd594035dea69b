"""`grpo bench train`: a whole GRPO step, compared with other toolkits."""

from __future__ import annotations

import time

import mlx.core as mx

from grpo.backend.device import limit_memory
from grpo.backend.ranks import Ranks
from grpo.benchmark.models import base_model
from grpo.benchmark.peers import Toolkit, running
from grpo.benchmark.protocol import Measurement, Side, Values, alternate
from grpo.benchmark.resident import watch_resident
from grpo.benchmark.rollout import untold
from grpo.benchmark.setting import Setting
from grpo.benchmark.work import Prompts, policy_of, recipe, synthetic
from grpo.generation.controller import speculation_of
from grpo.model.widehead import widen_head
from grpo.planning.planner import allowed, decode_as_planned, make_plan
from grpo.planning.workload import Workload
from grpo.recipes import with_settings
from grpo.rollout import RolloutEngine, sampling_of
from grpo.scoring.scorer import Scorer
from grpo.training.trainer import Trainer

PHASES = ("rollout", "reward", "logprobs", "update")


def step_trainer(setting: Setting, ranks: Ranks | None = None, scorer: Scorer | None = None) -> Trainer:
    """A trainer with the settings of its plan, whose completions all have the full length. The reward is the number of
    even token ids, unless `scorer` has another reward."""
    limit_memory(None if setting.limit is None else allowed(setting.limit))
    cfg = recipe(setting, {"micro_batch_tokens": "auto", "gradient_checkpointing": "auto"})
    model = base_model(setting)
    widen_head(model)  # as in a run; no effect on a float32 model
    policy = policy_of(model, cfg.optim)
    generator = untold(policy.model, setting.rows)
    workload = Workload(cfg.optim, cfg.rollout, cfg.adapter, cfg.eval, setting.prompt_length, setting.prompt_length)
    plan, optim = make_plan(workload, policy, generator.decoding, setting.limit)
    cfg = with_settings(cfg, {"optim": optim})
    generator.speculation = speculation_of(cfg.rollout.speculate)
    decode_as_planned(generator, plan)
    if setting.limit is not None:
        print("\n".join(plan.lines()[1:]), flush=True)  # the first line has a meaningless number of steps
    engine = RolloutEngine(generator, sampling_of(cfg.rollout))
    tasks = [group.task for group in synthetic(setting, policy.model)]
    even = {"even": lambda completion_ids, **_: [sum(i % 2 == 0 for i in ids) for ids in completion_ids]}
    trainer = Trainer(cfg, policy, Prompts(tasks), engine, scorer or Scorer(even), ranks=ranks)
    trainer.update.gradients.alone = plan.alone
    return trainer


def step_side(setting: Setting) -> Side:
    """The side of grpo's step: seconds of the step and of rollout, reward, logprobs and update, and memory in GB."""
    trainer, steps = step_trainer(setting), iter(range(1, 1_000_000))

    def run() -> Values:
        mx.clear_cache()
        mx.reset_peak_memory()
        resident = watch_resident()
        start = time.perf_counter()
        values = trainer.step(next(steps)).values
        total = time.perf_counter() - start
        phases = {f"s {phase}": values[f"time/{phase}"] for phase in PHASES}
        other = {"s other": total - sum(phases.values())}
        return {"s": total, **phases, **other, "GB": mx.get_peak_memory() / 1e9, **resident()}

    return Side("grpo", run)


def compare_steps(setting: Setting, toolkit: Toolkit | None) -> list[Measurement]:
    """A step of grpo and, with `toolkit`, a step of that toolkit with the same weights, prompts and lengths."""
    case = f"step, {setting}"
    if toolkit is None:
        return alternate(case, [step_side(setting)], setting.runs)
    with running(toolkit, setting) as peer:
        return alternate(f"{case}, against {toolkit}", [peer.side(), step_side(setting)], setting.runs)
