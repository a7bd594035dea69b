"""Runs whose completions are sampled with keys and values in few bits: corrected, checked, and said."""

from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from planning.test_parity import TASKS, moved
from runs.driver import run

from grpo.config import AdapterConfig
from grpo.errors import RunError, UserError
from grpo.generation.generator import Generator
from grpo.generation.packed import BitPacking
from grpo.generation.sampling import Sampling
from grpo.model.adapters import Adapters
from grpo.model.drawn import NoTokenizer
from grpo.model.policy import Policy
from grpo.planning.parity import check_parity
from grpo.recipes import load_recipe
from grpo.rollout import RolloutEngine
from grpo.runs.prepare import prepare
from grpo.tools import evaluate
from grpo.tools.evaluate import EvalOptions, measure
from grpo.training.gap import GapWatch

CORRECTED = "loss.importance_sampling_correction=token_truncate"
MEAN, WEIGHT = "sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/max"


@pytest.mark.parametrize("bits", [4, 8])
def test_it_wants_a_correction(recipe: Path, bits: int) -> None:
    with pytest.raises(UserError, match=r"rollout\.kv_bits=\d: .* Set also loss\.importance_sampling_correction"):
        load_recipe(recipe, [f"rollout.kv_bits={bits}"])
    for loss in (CORRECTED, "loss.type=dppo"):  # whose ratio is to the sampler
        assert load_recipe(recipe, [f"rollout.kv_bits={bits}", loss]).rollout.kv_bits == bits


@pytest.mark.parametrize("target", ["recipe", "model"])
def test_an_evaluation_wants_none(recipe: Path, toy_folder: Path, target: str, monkeypatch) -> None:
    """Nothing is trained, so no token has to be weighed."""
    bits = []
    monkeypatch.setattr(evaluate, "prepare", lambda cfg, **given: bits.append(prepare(cfg, **given)) or bits[-1])
    asked = EvalOptions(data="train.jsonl", prompt="{question}", reward="digits.py:reward", samples=1, prompts=2)
    found = measure(str({"recipe": recipe, "model": toy_folder}[target]), asked, ["rollout.kv_bits=4"])
    assert set(found.before.values) >= {"greedy", "avg@1"}
    assert bits[0].trainer.engine.generator.kv_bits == 4
    with pytest.raises(UserError, match=r"rollout\.kv_bits: expected 4 or 8"):
        measure(str(recipe), asked, ["rollout.kv_bits=3"])


@pytest.mark.parametrize("given", ["3", "16", "true"])
def test_other_bits_are_refused(recipe: Path, given: str) -> None:
    with pytest.raises(UserError, match=r"rollout\.kv_bits"):
        load_recipe(recipe, [f"rollout.kv_bits={given}", CORRECTED])


def test_a_step_weighs_tokens_by_the_difference(recipe: Path) -> None:
    steps = {}
    for bits in (None, 8, 4):
        prepared = prepare(load_recipe(recipe, [f"rollout.kv_bits={bits or 'null'}", CORRECTED]))
        steps[bits] = prepared.trainer.step(1).values
        said = [note for note in prepared.notes if note.startswith("decoding:")]
        assert (f"keys and values in {bits} bits" in said[0]) == (bits is not None)
    assert steps[None][MEAN] < 1e-5 < steps[8][MEAN] < steps[4][MEAN] < 0.3
    assert steps[None][WEIGHT] == pytest.approx(1, abs=1e-4)
    assert steps[4][WEIGHT] > 1.001


@pytest.mark.slow  # three runs
def test_a_run_evaluates_and_resumes(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "eval: {split: train, every: 1, prompts: 2, samples: 2}\n")
    how = ("rollout.kv_bits=4", CORRECTED, "checkpoint.every=1")
    run(recipe, *how, "output_dir=whole")
    run(recipe, *how, "output_dir=halves", "optim.steps=1")
    run(recipe, *how, "output_dir=halves", resume=True, changed=True)
    last = "checkpoints/step-000002/adapters.safetensors"
    assert Path("whole", last).read_bytes() == Path("halves", last).read_bytes()


def test_the_plan_counts_the_bits(recipe: Path) -> None:
    plans = [
        prepare(load_recipe(recipe, [f"rollout.kv_bits={bits}", CORRECTED])).trainer.engine.generator.decoding
        for bits in ("null", 8, 4)
    ]
    full, eight, four = (decoding.outside(50, 1000) for decoding in plans)
    assert four < eight < full


def test_the_gap_has_a_bound_of_its_own() -> None:
    policy = SimpleNamespace(dtype=mx.bfloat16, temperature=1.0)
    explained = GapWatch(policy, 30.0, kv_bits=8).explained
    assert explained.bound == pytest.approx(0.05)
    assert "3.2 times what rounding in bfloat16 and in keys and values of 8 bits" in explained.said(0.16)
    assert "no rollout.kv_bits, model.dtype: float32, and" in explained.remedy


def quantised(zoo, bits: int) -> tuple[Policy, RolloutEngine]:
    model = zoo("tied")
    policy = Policy(model, Adapters(model, AdapterConfig(rank=4), mx.random.key(0)), 1.0)
    return policy, RolloutEngine(Generator(model, NoTokenizer(), 4, bits), Sampling())


@pytest.mark.parametrize(("bits", "least"), [(8, 0.1), (4, 0.9)])
def test_the_check_before_a_run_sees_the_adapter(zoo, bits: int, least: float) -> None:
    assert least <= moved(check_parity(*quantised(zoo, bits), TASKS, 0)) <= 3


def test_a_model_that_so_few_bits_spoil_is_refused(zoo, monkeypatch) -> None:
    made = quantised(zoo, 4)
    numbers = BitPacking.numbers
    monkeypatch.setattr(BitPacking, "numbers", lambda packing, in_bits: -numbers(packing, in_bits))
    with pytest.raises(
        RunError, match=r"Keys and values in 4 bits may be too coarse .* set rollout.kv_bits to 8, or remove it"
    ):
        check_parity(*made, TASKS, 0)
