"""Finds the smallest memory limit of a step, or measures the longest completion that can be trained within a limit.

    python scripts/benchmarks/longest.py least [--shape qwen3-0.6b] [--prompts 8] [--completions 8] ...
    python scripts/benchmarks/longest.py length --limit 24 [--shape qwen3-8b] [--bits 4] [--kv-bits 8] [--tokens N] ...

`least` prints the smallest `memory.limit_gb` that the plan accepts (`grpo bench train --limit` runs a step with it).

`length` plans completions of `--tokens` tokens (default: the longest that fit by the plan) after one prompt, and
measures the peak memory of rollout and update. The update is the gradient of `--batches` micro-batches (default: all,
and the optimizer's step). With `--whole`, completions are decoded whole. Otherwise only their last 64 tokens are
decoded, after prompts that are longer by the rest, in the same slots: a row then has as many keys and values as at the
end of a whole completion, and shares none of them, which is the maximum. Every line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import grpo  # isort: skip  # noqa: F401  before mlx, so that the BLAS is in place

import mlx.core as mx

from grpo.backend.device import limit_memory, setup
from grpo.backend.random import derive_key
from grpo.benchmark.models import base_model
from grpo.benchmark.setting import Setting
from grpo.benchmark.updates import packing_of
from grpo.benchmark.work import WEIGHTS, policy_of, recipe, synthetic
from grpo.config import Recipe
from grpo.errors import TooLargeError
from grpo.generation.generator import Generator, Request
from grpo.model.drawn import NoTokenizer
from grpo.model.policy import Policy
from grpo.objective.groups import with_advantages
from grpo.planning.planner import Planner, allowed, decode_as_planned
from grpo.planning.workload import Workload
from grpo.recipes import with_settings
from grpo.rollout import sampling_of
from grpo.training.batches import make_minibatches
from grpo.training.update import Updater

END = 64
"""Number of tokens that are decoded at the end of a completion without `--whole`."""


def recipe_of(setting: Setting, kv_bits: int | None, slots: int) -> Recipe:
    cfg = recipe(setting, {"micro_batch_tokens": "auto", "gradient_checkpointing": "auto"})
    correction = {"loss.importance_sampling_correction": "token_truncate"} if kv_bits else {}
    return with_settings(cfg, {"rollout.kv_bits": kv_bits, "rollout.max_concurrency": slots, **correction})


def planner_of(setting: Setting, cfg: Recipe, policy: Policy, generator: Generator, limit: float) -> Planner:
    load = Workload(cfg.optim, cfg.rollout, cfg.adapter, cfg.eval, setting.prompt_length, setting.prompt_length)
    return Planner(load, policy, generator.decoding, limit, cfg.loss)


def least(setting: Setting) -> None:
    """Print the smallest limit that the plan accepts, searched upward from the memory that each refusal asks for."""
    cfg, model = recipe_of(setting, None, setting.rows), base_model(setting)
    policy = policy_of(model, cfg.optim)
    generator = Generator(policy.model, NoTokenizer(), setting.rows)  # type: ignore[arg-type]
    limit = 2**20
    while True:
        try:
            plan, _ = planner_of(setting, cfg, policy, generator, limit / 2**30).plan()
            break
        except TooLargeError as error:
            limit = max(error.needed, int(limit * 1.01))
    told = {"limit_gb": round(limit / 2**30 + 0.0005, 3), "planned GB": plan.total / 1e9, "slots": plan.slots}
    print(json.dumps(told | {"lines": plan.lines()}), flush=True)


def length(
    setting: Setting, kv_bits: int | None, tokens: int | None, whole: bool, batches: int | None, tries: bool
) -> None:
    assert setting.limit is not None
    limit_memory(allowed(setting.limit))
    model = base_model(setting)
    cfg = recipe_of(setting, kv_bits, setting.slots or setting.rows)
    policy = policy_of(model, cfg.optim)
    generator = Generator(policy.model, NoTokenizer(), setting.at_once, kv_bits)  # type: ignore[arg-type]
    begun = time.perf_counter()
    if tokens is None:
        tokens = planner_of(setting, cfg, policy, generator, setting.limit).longest()
        print(json.dumps({"by the plan": tokens, "s": round(time.perf_counter() - begun, 1)}), flush=True)
    cfg = with_settings(cfg, {"rollout.max_completion_length": tokens})
    planner = planner_of(setting, cfg, policy, generator, setting.limit)
    if not tries:
        planner._tried = lambda *_: None  # type: ignore[method-assign]
    plan, optim = planner.plan()
    cfg = with_settings(cfg, {"optim": optim})
    told = {"tokens": tokens, "planned GB": plan.total / 1e9, "slots": plan.slots, "lines": plan.lines()}
    print(json.dumps(told | {"s": round(time.perf_counter() - begun, 1)}), flush=True)
    decode_as_planned(generator, plan)
    for part in (lambda: updated(setting, cfg, policy, batches), lambda: decoded(setting, cfg, generator, whole)):
        mx.clear_cache()
        mx.reset_peak_memory()
        begun = time.perf_counter()
        found: dict[str, Any] = part()
        peak = {"peak GB": mx.get_peak_memory() / 1e9, "of the limit": mx.get_peak_memory() / 2**30 / setting.limit}
        print(json.dumps(found | peak | {"s": round(time.perf_counter() - begun, 2)}), flush=True)


def decoded(setting: Setting, cfg: Recipe, generator: Generator, whole: bool) -> dict[str, Any]:
    """Decode the whole rollout, or only its end."""
    most = cfg.rollout.max_completion_length
    sampling = sampling_of(
        with_settings(cfg, {"rollout.max_completion_length": most if whole else min(END, most)}).rollout
    )
    prompts = setting.draw(generator.decoding.vocabulary)
    if whole:
        requests = [Request(ids, setting.completions) for ids in prompts]
    else:
        ids: Any = mx.random.randint(1, 1000, (generator.slots, max(1, most - END)), key=derive_key(0, "own")).tolist()
        requests = [Request([*prompts[0], *own], 1) for own in ids]
    generator.generate(requests, sampling, derive_key(0, "draw"), True)
    return {"part": "rollout, whole" if whole else "rollout, its end", "rows": len(requests) if not whole else None}


def updated(setting: Setting, cfg: Recipe, policy: Policy, batches: int | None) -> dict[str, Any]:
    """Compute the update, or only the gradient of its first micro-batches."""
    most = cfg.rollout.max_completion_length
    longer = Setting(**{**{name: getattr(setting, name) for name in Setting.__slots__}, "completion_length": most})
    groups = with_advantages(synthetic(longer, policy.model), WEIGHTS, cfg.advantage, cfg.loss.preset)
    update = Updater(policy, cfg.optim, cfg.loss)
    minibatch = make_minibatches(groups, cfg.loss, packing_of(policy, cfg), most)
    number = sum(map(len, minibatch))
    if batches is None:
        update(minibatch, 1)
    else:
        mx.eval(update.gradient(minibatch[0][:batches]).arrays)
    return {"part": "update", "micro-batches": batches or number, "of": number}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["least", "length"])
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--kv-bits", type=int, choices=[4, 8])
    parser.add_argument("--limit", type=float)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--completion-length", type=int, default=128, help="with `least`")
    parser.add_argument("--slots", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--batches", type=int)
    parser.add_argument("--untried", action="store_true", help="plan without trying the longest row")
    args = parser.parse_args()
    if args.what == "length" and args.limit is None:
        parser.error("length needs --limit")
    setup()
    names = ["shape", "bits", "limit", "prompts", "completions", "prompt_length", "completion_length", "slots"]
    setting = Setting(**{name: getattr(args, name) for name in names})
    if args.what == "least":
        least(setting)
    else:
        length(setting, args.kv_bits, args.tokens, args.whole, args.batches, not args.untried)


if __name__ == "__main__":
    main()
