"""Draws random settings, plans each setting, runs a step of it, and reports the ratio of peak to planned memory.

    python scripts/benchmarks/plan.py [--count 200] [--first 0] [--seconds 600]

Models have random weights and at most the size of `qwen3-1m`. Rows, lengths, adapters, checkpointing, micro-batches and
the memory limit are random, too. Every completion has the length of the planned micro-batch that needs the most memory:
usually the maximum length, or a shorter one if attention keeps the scores of shorter rows only. Each setting prints a
line of JSON: the setting, and its planned and measured bytes, in total and by phase. A setting that the plan refuses,
because the limit is too small, is printed but not counted. The last line is a summary.

If a CPU computes two micro-batches in parallel, the plan is an upper bound: the memory if both are at their peaks at
the same time, which happens by chance. Such settings have a separate summary, unless another phase needs the most
memory. `taskset -c 0` shows the results for one core, which has no such settings.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpo  # isort: skip  # noqa: F401  before mlx, so that the BLAS is in place

import mlx.core as mx

from grpo.backend.device import setup
from grpo.benchmark.rollout import untold
from grpo.benchmark.work import Prompts
from grpo.config import Recipe
from grpo.errors import TooLargeError
from grpo.generation.controller import speculation_of
from grpo.model.adapters import Adapters
from grpo.model.mlxlm import new_model
from grpo.model.policy import Policy
from grpo.planning.plan import Plan
from grpo.planning.planner import decode_as_planned, make_plan
from grpo.planning.workload import Workload
from grpo.recipes import with_settings
from grpo.rollout import RolloutEngine, sampling_of
from grpo.scoring.scorer import Scorer
from grpo.training.trainer import Trainer
from grpo.types import Task

MOST_WORK = 2e11
"""Maximum number of multiplications per step: some seconds."""
SCORE = 200
"""Number of multiplications that take as long as the work on one attention score."""
MOST_TURNS = 10_000
"""Maximum number of layers that decoding computes one after another."""
NEAR = 0.05
"""Relative difference between peak and plan that counts as near."""


def drawn(number: int) -> dict[str, Any]:
    """The setting with this number, the same at every call."""
    while True:
        choose = random.Random(number)
        number += 1_000_003  # if a step would take too long, draw another setting
        heads = choose.choice([2, 4])
        setting: dict[str, Any] = {
            "depth": choose.choice([2, 3, 4, 8, 12]),
            "hidden": choose.choice([64, 128, 192]),
            "inner": choose.choice([64, 192, 384]),
            "heads": heads,
            "kv_heads": choose.choice([1, heads // 2, heads]),
            "head_dim": choose.choice([16, 32]),
            "vocabulary": choose.choice([256, 2048, 8192]),
            "tied": choose.random() < 0.7,
            "prompts": choose.choice([1, 2, 4, 8]),
            "completions": choose.choice([2, 4, 8, 16]),
            "prompt_length": int(2 ** choose.uniform(3, 9)),
            "completion_length": int(2 ** choose.uniform(3, 10)),
            "adapter": choose.choice(["lora", "lora", "lora", "dora", "full"]),
            "rank": choose.choice([4, 16, 32]),
            "checkpointing": choose.choice(["auto", "auto", True, False]),
            "micro_batch_tokens": choose.choice(["auto", "auto", "auto", 256, 1024, 4096]),
            "share_prompts": choose.random() < 0.75,
            "beta": choose.choice([0.0, 0.0, 0.05]),
            "iterations": choose.choice([1, 1, 1, 2]),
            "slots": choose.choice([4, 16, 64]),
            "limit": choose.choice([None, choose.uniform(0.5, 1.0)]),
        }
        if setting["limit"] is not None:  # otherwise most fixed values would not fit
            setting |= {"checkpointing": "auto", "micro_batch_tokens": "auto"}
        layer = setting["hidden"] * (setting["inner"] * 3 + setting["head_dim"] * heads * 4)
        numbers = setting["depth"] * layer + setting["hidden"] * setting["vocabulary"]
        rows = setting["prompts"] * setting["completions"]
        length = setting["prompt_length"] + setting["completion_length"]
        attended = setting["depth"] * heads * (setting["head_dim"] + SCORE) * length
        turns = -(-rows // setting["slots"]) * setting["completion_length"] * setting["depth"]
        if 4 * rows * length * (numbers + attended) < MOST_WORK and turns < MOST_TURNS:
            return setting


def recipe_of(setting: dict[str, Any], limit: float | None) -> Recipe:
    full = setting["adapter"] == "full"
    return Recipe.model_validate(
        {
            "model": {"name": "drawn"},
            "adapter": {"type": setting["adapter"], **({} if full else {"rank": setting["rank"]})},
            "data": {"source": "drawn"},
            "rewards": [{"use": "drawn"}],
            "loss": {"beta": setting["beta"]},
            "rollout": {
                "prompts_per_step": setting["prompts"],
                "num_generations": setting["completions"],
                "max_completion_length": setting["completion_length"],
                "max_concurrency": setting["slots"],
            },
            "optim": {
                "steps": 999,
                "num_iterations": setting["iterations"],
                "gradient_checkpointing": setting["checkpointing"],
                "micro_batch_tokens": setting["micro_batch_tokens"],
                "share_prompts": setting["share_prompts"],
            },
            **({} if limit is None else {"memory": {"limit_gb": limit}}),
        },
        strict=False,
    )


def policy_of(setting: dict[str, Any], cfg: Recipe) -> Policy:
    model = new_model(
        {
            "model_type": "qwen3",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": setting["tied"],
            "hidden_size": setting["hidden"],
            "num_hidden_layers": setting["depth"],
            "num_attention_heads": setting["heads"],
            "num_key_value_heads": setting["kv_heads"],
            "head_dim": setting["head_dim"],
            "intermediate_size": setting["inner"],
            "vocab_size": setting["vocabulary"],
        }
    )
    model.freeze()
    mx.eval(model.parameters())
    adapters = Adapters(model, cfg.adapter, mx.random.key(0), cfg.needs_reference)
    return Policy(model, adapters, 1.0, cfg.optim.share_prompts)


def planned_trainer(setting: dict[str, Any], cfg: Recipe) -> tuple[Trainer, Plan]:
    """A trainer with the settings of its plan, whose completions all have the planned length. Raises TooLargeError."""
    policy = policy_of(setting, cfg)
    generator = untold(policy.model, cfg.rollout.max_concurrency)
    length = setting["prompt_length"]
    load = Workload(cfg.optim, cfg.rollout, cfg.adapter, None, length, length)
    plan, optim = make_plan(load, policy, generator.decoding, cfg.memory.limit_gb, cfg.loss)
    assert plan.shape is not None
    rollout = with_settings(cfg.rollout, {"max_completion_length": plan.shape.length})
    cfg = with_settings(cfg, {"optim": optim, "rollout": rollout})
    generator.speculation = speculation_of(cfg.rollout.speculate)
    decode_as_planned(generator, plan)
    engine = RolloutEngine(generator, sampling_of(cfg.rollout))
    draw = random.Random(0)
    ids = [tuple(draw.randrange(1, setting["vocabulary"]) for _ in range(length)) for _ in range(setting["prompts"])]
    tasks = [Task(number, "", prompt, {}) for number, prompt in enumerate(ids)]
    # All rewards differ, because a row with advantage 0 would be left out of the update.
    scorer = Scorer({"drawn": lambda completion_ids, **_: [random.Random(str(ids)).random() for ids in completion_ids]})
    trainer = Trainer(cfg, policy, Prompts(tasks), engine, scorer)
    trainer.update.gradients.alone = plan.alone
    return trainer, plan


def as_after_an_update(trainer: Trainer) -> None:
    """Allocate everything that a run holds from its first update on.

    Before the first update, the optimizer's zeros are not computed, and the adapter's states share their arrays.
    """
    adapters = trainer.policy.adapters
    adapters.load_state({path: array + 0 for path, array in adapters.state().items()})
    mx.eval(trainer.update.optimizer.state, [adapters.state(name) for name in adapters.names])


@contextmanager
def watching(trainer: Trainer, peaks: dict[str, int]) -> Iterator[None]:
    """A block that records the peak memory of each phase of a step."""

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            before = mx.get_peak_memory()
            peaks["rest"] = max(peaks.get("rest", 0), before)
            mx.reset_peak_memory()
            made = call(*given, **named)
            peaks[name] = max(peaks.get(name, 0), mx.get_peak_memory())
            mx.reset_peak_memory()
            return made

        return called

    places = [(trainer.engine, "rollout", "rollout"), (trainer.update, "gradient", "update"),
              (trainer.update, "apply", "optimizer's step")]  # fmt: skip
    for thing, attribute, name in places:
        setattr(thing, attribute, watched(name, getattr(thing, attribute)))
    mx.reset_peak_memory()
    yield
    peaks["rest"] = max(peaks.get("rest", 0), mx.get_peak_memory())


def measured(setting: dict[str, Any]) -> dict[str, Any]:
    """The planned and the measured memory of a setting, in bytes."""
    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory()
    begun = time.perf_counter()
    limit = None
    if setting["limit"] is not None:
        free = planned_trainer(setting, recipe_of(setting, None))[1].total
        limit = setting["limit"] * free / 2**30
        gc.collect()
    try:
        trainer, plan = planned_trainer(setting, recipe_of(setting, limit))
    except TooLargeError as error:
        return {"refused": str(error)}
    planning = time.perf_counter() - begun
    as_after_an_update(trainer)
    peaks: dict[str, int] = {}
    with watching(trainer, peaks), trainer.wholly():
        trainer.step(1)
    peaks = {name: peak - others for name, peak in peaks.items()}
    stays = sum(plan.stays.values())
    phases = {name: [(stays + size), peaks.get(name, 0)] for name, size in plan.phases.items()}
    peak = max(peaks.values())
    return {
        "over": round(peak / plan.total, 4),
        "peak": peak,
        "planned": plan.total,
        "limit": None if limit is None else int(limit * 2**30),
        "rest": peaks["rest"],
        "phases": phases,
        "bound": plan.lanes > 1 and max(phases, key=lambda name: phases[name][0]) == "update",
        "chosen": [plan.micro_batch, plan.checkpointing, plan.slots, plan.fed, plan.lanes],
        "s": [round(planning, 2), round(time.perf_counter() - begun - planning, 2)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="number of settings")
    parser.add_argument("--first", type=int, default=0, help="number of the first setting")
    parser.add_argument("--seconds", type=float, default=600, help="begin no further setting after this time")
    args = parser.parse_args()
    setup()
    found, begun = [], time.perf_counter()
    for number in range(args.first, args.first + args.count):
        if time.perf_counter() - begun > args.seconds:
            break
        setting = drawn(number)
        found.append(measured(setting))
        print(json.dumps({"number": number, **found[-1], "setting": setting}), flush=True)
    print(json.dumps(summed_up(found)))


def summed_up(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of all settings: the fraction of peaks near their plans, and the spread of the ratios."""
    planned = [result for result in found if "over" in result]
    exact = sorted(result["over"] for result in planned if not result["bound"])
    bounds = sorted(result["over"] for result in planned if result["bound"])
    limited = [result["peak"] / result["limit"] for result in planned if result["limit"]]
    summary: dict[str, Any] = {"settings": len(exact), "refused": len(found) - len(planned)}
    if exact:
        near = sum(abs(ratio - 1) <= NEAR for ratio in exact)
        summary |= {"within 5 %": round(near / len(exact), 3)} | spread(exact)
    if bounds:
        summary["two lanes"] = {"settings": len(bounds)} | spread(bounds)
    if limited:
        summary["most of a limit"] = round(max(limited), 3)
    return summary


def spread(ratios: list[float]) -> dict[str, float]:
    """The lowest, the middle and the highest of sorted ratios."""
    return {"least": ratios[0], "middle": ratios[len(ratios) // 2], "most": ratios[-1]}


if __name__ == "__main__":
    main()
