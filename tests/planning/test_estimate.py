"""Estimates for machines that are not at hand: by the plan's own arithmetic, and as the recipes tell them."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import make_model
from planning.loads import workload

from grpo.backend import cuda
from grpo.backend.device import on_gpu
from grpo.config import AdapterConfig
from grpo.errors import UserError
from grpo.generation.choice import find_decoding
from grpo.model.adapters import Adapters
from grpo.model.drawn import config_of
from grpo.model.known import CONFIGS
from grpo.model.load import load
from grpo.model.outline import costs_of, costs_of_config, outline
from grpo.model.policy import Policy
from grpo.planning.activations import reckoned_footprint
from grpo.planning.drafting import Case, plan_on
from grpo.planning.elsewhere import model_config
from grpo.planning.estimate import LEGEND, estimate, estimates
from grpo.planning.footprint import measure_footprint
from grpo.planning.machines import CHIPS, Machine, described
from grpo.planning.machines import cuda as card
from grpo.planning.planner import make_plan
from grpo.plugins import bundled
from grpo.recipes import load_recipe, recipe_of
from grpo.training.packing import Shape

NAMED = {chip.name: chip for chip in CHIPS}
H200 = NAMED["H200"]
SHOWN = [NAMED[name] for name in ("H200", "RTX 4090 24 GB", "M4 Max 128 GB", "M4 16 GB")]
"""Those that stand at the head of each recipe."""
RECIPES = sorted(bundled("recipes").glob("*.yaml"))
FROM_THE_HUB = [path for path in RECIPES if not load_recipe(path).model.name.startswith("builtin:")]


def recipe(name: str = "Qwen/Qwen3-0.6B", **sections):
    given = {"data": {"source": "x", "max_prompt_length": 256}, "rewards": [{"use": "math_answer"}],
             "rollout": {"max_completion_length": 128}, "optim": {"steps": 10}}  # fmt: skip
    return recipe_of({"model": {"name": name}, **given, **sections}, "test")


@pytest.mark.parametrize("path", FROM_THE_HUB, ids=lambda path: path.stem)
def test_a_recipe_says_what_is_estimated_for_it(path: Path) -> None:
    said = re.findall(r"^#   ((?:H200|RTX|M4).*)$", path.read_text(), re.MULTILINE)
    assert said == estimates(load_recipe(path), SHOWN), f"`grpo recipes costs {path.stem}` has what should stand there"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-Coder-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("mlx-community/Qwen3-8B-4bit", 8_190_735_360),
        ("mlx-community/Qwen3-30B-A3B-4bit", 30_532_122_624),
    ],
)
def test_known_models_have_as_many_parameters_as_the_published_ones(name: str, parameters: int) -> None:
    assert costs_of_config(CONFIGS[name]).parameters == parameters


def test_every_recipes_model_is_known() -> None:
    recipes = [load_recipe(path) for path in FROM_THE_HUB]
    graders = {reward.model for cfg in recipes for reward in cfg.rewards if reward.model}
    assert {cfg.model.name for cfg in recipes} | graders == set(CONFIGS)


@pytest.mark.each_value
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "off"), [("tied", 0.25), ("moe", 0.35)])
def test_a_reckoned_footprint_is_near_the_measured_one(kind: str, checkpointing: bool, off: float) -> None:
    wider = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "moe_intermediate_size": 384}
    model = make_model(kind, **{name: size for name, size in wider.items() if kind == "moe" or "moe" not in name})
    adapters = Adapters(model, AdapterConfig(rank=8), mx.random.key(0))
    measured = measure_footprint(Policy(model, adapters, 1.0, True), checkpointing)
    reckoned = reckoned_footprint(costs_of(model), checkpointing, fused=False)
    shape = Shape(2, 96, 8, 96)
    assert reckoned.bytes(shape) == pytest.approx(measured.bytes(shape), rel=off)


def test_the_plan_of_an_outline_is_that_of_the_model(toy_folder: Path) -> None:
    cfg = recipe(str(toy_folder), adapter={"rank": 4})
    model, _ = load(cfg.model)
    adapters = Adapters(model, cfg.adapter, mx.random.key(0))
    decoding = find_decoding(model)
    real, _ = make_plan(workload(cfg, 64), Policy(model, adapters, 1.0), decoding)
    drawn = outline(model_config(cfg.model), cfg.adapter, mx.float32)
    reckon = partial(reckoned_footprint, costs_of(drawn), fused=False)
    there = Machine(real.memory, on_gpu(), cuda.available())
    reckoned, _ = plan_on(Case(there, replace(workload(cfg, 64), parts=2), drawn, 1, decoding, reckon))
    update = {"phases": {**real.phases, "update": reckoned.phases["update"]}, "micro_batch": reckoned.micro_batch}
    assert reckoned == replace(real, **update)


FOUR_B = {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
          "head_dim": 128, "intermediate_size": 9728}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "prompts", "length", "seconds"),
    [
        ({}, 8, 128, 0.904),
        ({}, 8, 1024, 7.04),
        ({}, 1, 2048, 13.9),
        ({}, 1, 4096, 26.6),
        (FOUR_B, 8, 128, 1.73),
    ],
)
def test_steps_measured_on_an_h200_are_met_within_a_fifth(
    changes: dict, prompts: int, length: int, seconds: float
) -> None:
    """scripts/benchmarks/RESULTS.md: 8 completions of each prompt of 256 tokens, LoRA r16, bfloat16."""
    cfg = recipe(rollout={"prompts_per_step": prompts, "num_generations": 8, "max_completion_length": length})
    found = estimate(H200, cfg, {**config_of("qwen3-0.6b"), **changes})
    assert found.step == pytest.approx(seconds, rel=0.2)
    assert found.run == pytest.approx(10 * found.step)
    assert re.search(r"step about \S+ s +run about ", found.line())


def test_a_time_is_said_by_how_it_is_known() -> None:
    for name, word in (("RTX 3090 24 GB", "roughly"), ("M4 Max 64 GB", "over")):
        (line,) = estimates(recipe(), [NAMED[name]])
        assert f"step {word} " in line
        assert f"run {word} " in line
    limits, _ = (estimate(NAMED[name], recipe(), CONFIGS["Qwen/Qwen3-0.6B"]) for name in ("M4 16 GB", "H200"))
    faster = estimate(replace(NAMED["M4 16 GB"], bandwidth=240e9, flops=8.2e12), recipe(), CONFIGS["Qwen/Qwen3-0.6B"])
    assert limits.step == pytest.approx(2 * faster.step)  # a bound by limits alone


def test_what_goes_through_memory_takes_longer_on_a_slower_card_and_launches_do_not() -> None:
    config = CONFIGS["Qwen/Qwen3-0.6B"]
    slow = estimate(replace(H200, bandwidth=H200.bandwidth / 4), recipe(), config).step
    assert 1.5 < slow / estimate(H200, recipe(), config).step < 2.5


def test_a_machine_can_be_described(run_cli) -> None:
    assert described(24, 936, None, "cuda") == replace(card("", 24, 936, 70.2), name="24 GB, 936 GB/s")
    mac = described(36, 410, None, "metal")
    assert (mac.memory, mac.flops, mac.times) == (24 * 2**30, pytest.approx(12.3e12), "bound")
    ran = run_cli("recipes", "costs", "qwen3-math", "--memory", 24, "--bandwidth", 936, "--tflops", 71)
    assert ran.code == 0, ran.err
    line, said, *more = ran.out.splitlines()
    assert line.startswith("24 GB, 936 GB/s")
    assert said == LEGEND["scaled"]
    known = estimates(load_recipe(bundled("recipes") / "qwen3-math.yaml"), [NAMED["RTX 3090 24 GB"]])
    assert line[18:] == known[0][18:]
    assert more == run_cli("recipes", "costs", "qwen3-math", "--memory", 24).out.splitlines()
    without = ["--bandwidth", 936], ["--tflops", 71], ["--memory", 24, "--tflops", 71], ["--backend", "metal"]
    for half in (*without, ["--memory", "inf", "--bandwidth", 936]):
        assert run_cli("recipes", "costs", "qwen3-math", *half).code == 2


@pytest.mark.parametrize("more", [{"adapter": {"dropout": 0.1}}, {"loss": {"top_entropy_quantile": 0.2}}])
def test_forward_passes_beside_the_update_take_their_time(more: dict) -> None:
    """With dropout the logprobs before the update are not the update's own; entropies are looked at before it."""
    config = CONFIGS["Qwen/Qwen3-0.6B"]
    without = estimate(H200, recipe(), config).step
    assert without < estimate(H200, recipe(**more), config).step < 1.3 * without


def test_evaluations_take_their_time() -> None:
    config = CONFIGS["Qwen/Qwen3-0.6B"]
    without = estimate(H200, recipe(), config)
    often = estimate(H200, recipe(eval={"every": 1, "samples": 4}), config)
    assert often.step == without.step
    assert often.run > without.run + 11 * without.step


def test_memory_is_the_plans_and_a_small_machine_decodes_fewer_rows_at_once() -> None:
    config = CONFIGS["Qwen/Qwen3-0.6B"]
    long = recipe(rollout={"max_completion_length": 4096, "num_generations": 16, "max_concurrency": 128})
    large, small = (estimate(NAMED[name], long, config) for name in ("M4 Max 128 GB", "M4 16 GB"))
    assert large.bytes > 40 * 2**30
    assert small.bytes < NAMED["M4 16 GB"].memory
    whole = estimate(H200, recipe(adapter={"type": "full"}), config)
    assert whole.bytes > (2 + 12) * 596_049_920  # weights, float32 copies and two moments


def test_a_recipes_own_limit_holds_on_a_larger_machine() -> None:
    config = CONFIGS["Qwen/Qwen3-0.6B"]
    free = estimate(H200, recipe(), config).bytes
    for limit in (4.0, 3.0):
        assert estimate(H200, recipe(memory={"limit_gb": limit}), config).bytes <= limit * 2**30 < free
    (line,) = estimates(recipe(memory={"limit_gb": 1.0}), [H200])
    assert "1.9 GB needed, 0.9 GB more than memory.limit_gb; the largest part is weights" in line
    (line,) = estimates(recipe(memory={"limit_gb": 1_000.0}), [H200])
    assert "memory.limit_gb: 1000 GB is more than the machine has for MLX (131.0 GB)" in line


def test_what_cannot_fit_is_said_with_what_is_missing_and_what_binds() -> None:
    (line,) = estimates(recipe("Qwen/Qwen2.5-7B"), [NAMED["M4 16 GB"]])
    found = re.fullmatch(
        r"M4 16 GB +does not fit: ([\d.]+) GB needed, ([\d.]+) GB too much; the largest part is weights, "
        r"([\d.]+) GB",
        line,
    )
    assert found, line
    needed, missing, weights = map(float, found.groups())
    assert needed - missing == pytest.approx(16 * 2 / 3, abs=0.11)
    assert weights == pytest.approx((2 * 7_615_616_512 + 2 * 40_370_176) / 2**30, abs=0.1)  # and the adapter
    whole = recipe("Qwen/Qwen3-1.7B", adapter={"type": "full"})
    (line,) = estimates(whole, [NAMED["RTX 4090 24 GB"]])
    assert "the largest part is optimizer, 19.2 GB" in line  # float32 copies and two moments: 12 bytes a parameter
    enough = float(line.split(" GB needed")[0].split()[-1]) + 0.1
    assert "step" in estimates(whole, [card("", enough, 936, 71)])[0]
    assert "does not fit" in estimates(whole, [card("", enough - 0.5, 936, 71)])[0]


def test_the_command_reads_a_models_own_config(run_cli, recipe: Path) -> None:
    ran = run_cli("recipes", "costs", recipe, "optim.steps=20")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert [line.split("  ")[0] for line in lines[: len(CHIPS)]] == [chip.name for chip in CHIPS]
    assert lines[len(CHIPS) :] == list(LEGEND.values())


def test_a_mistake_is_not_taken_for_too_little_memory(run_cli) -> None:
    wrong = run_cli("recipes", "costs", "qwen3-math", "adapter.targets=[self_attn.z_proj]")
    assert wrong.code == 2
    assert "z_proj" in wrong.err


def test_a_model_without_a_config_is_named() -> None:
    with pytest.raises(UserError, match="has no config"):
        model_config(recipe("builtin:arithmetic-student").model)
