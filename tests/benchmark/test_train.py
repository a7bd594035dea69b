"""What `grpo bench train` measures is what training does."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import mlx.nn as nn
import pytest

from grpo.backend.device import limit_memory
from grpo.benchmark import train, updates
from grpo.benchmark.models import write_model
from grpo.benchmark.protocol import alternate
from grpo.benchmark.setting import Setting
from grpo.config import ModelConfig
from grpo.errors import RunError, TooLargeError, UserError
from grpo.model.load import load

SMALL = Setting("qwen3-tiny", prompts=2, completions=2, prompt_length=8, completion_length=6)


def test_a_whole_step_is_measured_in_its_parts() -> None:
    rows = {row.unit: row.mean for row in alternate("case", [train.step_side(SMALL)], runs=1)}
    parts = [rows[f"s {part}"] for part in ("rollout", "reward", "logprobs", "update", "other")]
    assert sum(parts) == pytest.approx(rows["s"], rel=1e-6)
    assert min(parts) >= 0
    assert rows["GB"] > 0
    assert rows.get("GB resident", 1) > 0


def test_a_measured_step_has_drafts_as_a_run_s_step_has_them() -> None:
    assert train.step_trainer(SMALL).engine.generator.speculation is not None


def test_a_step_is_planned_for_a_limit_and_for_a_quantized_base(capsys) -> None:
    free = train.step_trainer(replace(SMALL, bits=4))
    assert sum(isinstance(module, nn.QuantizedLinear) for module in free.policy.model.modules()) == 14
    with pytest.raises(TooLargeError, match=r"memory\.limit_gb allows"):
        train.step_trainer(replace(SMALL, bits=4, limit=0.0001))
    train.step_trainer(replace(SMALL, bits=4, limit=0.01))
    assert "of 10 MB: weights" in capsys.readouterr().out
    limit_memory(None)


def test_variants_of_the_update_are_held_against_the_first(capsys) -> None:
    names = ["plain", "shared"]
    rows = updates.compare_updates(SMALL, names, seconds=600)
    assert "shared against plain" in capsys.readouterr().out
    assert [row.side for row in rows if row.unit == "s"] == names
    by = {(row.side, row.unit): row for row in rows}
    assert by["plain", "s"].ratio is None
    assert by["shared", "s"].ratio == by["plain", "s"].runs[0] / by["shared", "s"].runs[0]
    assert {row.side for row in updates.compare_updates(SMALL, names, seconds=-60)} == {"plain"}
    assert "left out after -1 min: shared (--minutes)" in capsys.readouterr().out


def test_shared_and_plain_are_compared_before_they_are_measured(monkeypatch) -> None:
    monkeypatch.setattr(updates, "_norm", lambda tree: float(next(iter(tree.values())).size))
    with pytest.raises(RunError, match=r"shared against plain: 1\.0e"):
        updates.compare_updates(SMALL, ["plain"], 600)


def test_variants_by_name() -> None:
    assert updates.variant_names(" shared; shared, kept ") == ["shared", "shared, kept"]
    assert updates.variant_names("") == list(updates.VARIANTS)
    with pytest.raises(UserError, match="no variant 'fast'"):
        updates.variant_names("fast")


def test_a_shapes_model_can_be_loaded_by_a_peer(tmp_path) -> None:
    write_model(SMALL, tmp_path / "model")
    model, tokenizer = load(ModelConfig(name=str(tmp_path / "model")))
    assert len(model.layers) == 2
    assert json.loads((tmp_path / "model/config.json").read_text())["eos_token_id"] == 255
    assert tokenizer.encode("7")


def test_a_group_of_one_is_no_group() -> None:
    with pytest.raises(UserError, match="--completions 1"):
        train.step_side(Setting("qwen3-tiny"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--variants", "plain"], "--variants has no effect without --update"),
        (["--peer", "unsloth"], "--peer, --blas and --peer-options have no effect without --peer-python"),
        (["--blas"], "--peer, --blas and --peer-options have no effect without --peer-python"),
        (["--peer-options", "--no-cce"], "--peer, --blas and --peer-options have no effect without --peer-python"),
        (["--peer-python", sys.executable, "--peer", "nope"], "--peer nope: expected mlx-lm-lora or unsloth"),
        (["--update", "--blas"], "leave --update out"),
        (["--update", "--limit", "1"], "--limit has no effect with --update"),
        (["--limit", "0"], "--limit: expected a number above 0, got 0"),
        (["--bits", "7"], "--bits: MLX quantizes to 2, 3, 4, 5, 6 or 8 bits"),
        (["--bits", "4", "--model", "tiny"], "--bits is only for random weights"),
        (["--bits", "4", "--peer-python", sys.executable], "without another toolkit"),
        (["--limit", "nan"], "less than or equal to 1000000"),
        (["--peer-python", "/nowhere/python"], "does not exist"),
    ],
)
def test_options_that_would_do_nothing_are_refused(run_cli, arguments: list[str], said: str) -> None:
    ran = run_cli("bench", "train", *arguments)
    assert ran.code == 2
    assert said in " ".join(ran.err.split())
