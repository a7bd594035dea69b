"""Whole runs with drafts and without: the same run, to the bit, whether or not it is stopped."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from runs.driver import run

from grpo.config import RolloutConfig
from grpo.errors import UserError
from grpo.generation import controller
from grpo.recipes import load_recipe
from grpo.telemetry.console import _parts
from grpo.training import trainer
from grpo.types import StepMetrics

EVAL = "eval: {split: train, every: 2, prompts: 2, samples: 2}\ncheckpoint: {every: 2}\n"


@pytest.fixture
def four(recipe: Path) -> Path:
    """Four steps over a few prompts, so that each comes again."""
    recipe.write_text(recipe.read_text().replace("optim: {steps: 2", "optim: {steps: 4") + EVAL)
    return recipe


def speculation_of(folder: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name.startswith("speculation/")} for line in lines]


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU rounds wide products otherwise")
def test_a_run_with_drafts_is_the_run_without_even_if_it_is_stopped(four: Path) -> None:
    run(four, "output_dir=plain", "rollout.speculate=off")
    run(four, "output_dir=drafted", "rollout.speculate=3")
    run(four, "output_dir=stopped", "rollout.speculate=3", "optim.steps=2")
    run(four, "output_dir=stopped", "rollout.speculate=3", resume=True, changed=True)  # without any memory
    for folder in ("drafted", "stopped"):
        told = speculation_of(folder)
        assert all(metrics["speculation/width"] > 1 for metrics in told)
        assert any(metrics["speculation/accepted"] > 0 for metrics in told)
        for file in ("metrics.jsonl", "eval.jsonl"):  # what a plain run does not tell is all that differs
            ours, plain = (_without(Path(name, file)) for name in (folder, "plain"))
            assert ours == plain
        last = "checkpoints/step-000004/adapters.safetensors"
        assert Path(folder, last).read_bytes() == Path("plain", last).read_bytes()
    assert speculation_of("plain") == [{}] * 4


def _without(path: Path) -> list[dict[str, object]]:
    clocked = ("time/", "step_time", "rollout_tokens_per_second", "peak_memory_gb", "speculation/")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(clocked)} for line in lines]


def test_a_step_tells_of_its_own_rollout_alone(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations come between steps, and have drafts as well."""
    monkeypatch.setattr(controller, "HOPED", float("inf"))  # all steps stay plain: a turn is a token
    told: list[dict[str, float]] = []
    monkeypatch.setattr(trainer, "speculation_metrics", lambda counts: told.append(counts) or {})
    run(four, "output_dir=run")
    lines = [json.loads(line) for line in Path("run", "metrics.jsonl").read_text().splitlines()]
    assert [counts["turns"] for counts in told] == [line["num_tokens"] for line in lines]


@pytest.mark.parametrize(("given", "meant"), [("off", "off"), ("auto", "auto"), ("7", 7)])
def test_what_can_be_asked_for(recipe: Path, given: str, meant: object) -> None:
    assert load_recipe(recipe, [f"rollout.speculate={given}"]).rollout.speculate == meant


@pytest.mark.parametrize("given", ["2", "8", "on", "true", "fast"])
def test_what_cannot_be_asked_for_is_told(recipe: Path, given: str) -> None:
    with pytest.raises(UserError, match=rf"rollout\.speculate.*auto.* got .*{given}"):
        load_recipe(recipe, [f"rollout.speculate={given}"])


def test_drafts_are_the_default() -> None:
    assert RolloutConfig().speculate == "auto"


def test_the_terminal_tells_what_drafts_bring_where_they_bring_something() -> None:
    values = {"reward": 1.0, "completions/mean_length": 5.0, "rollout_tokens_per_second": 10.0}
    drafted = {"speculation/accepted": 2.25, "speculation/width": 3.0, "speculation/gain": 1.5}
    assert "  ".join(_parts(StepMetrics(1, values | drafted, ()))).endswith(
        "10 tok/s (drafts: 1.50 × as fast, 2.2 accepted per decoding step)"
    )
    assert "  ".join(_parts(StepMetrics(1, values | drafted | {"speculation/width": 1.0}, ()))).endswith("10 tok/s")
    assert "  ".join(_parts(StepMetrics(1, values, ()))).endswith("10 tok/s")
