"""What `grpo bench train` measures is what training does."""

from __future__ import annotations

import json

import pytest

from grpo.benchmark import train
from grpo.benchmark.models import write_model
from grpo.benchmark.protocol import alternate
from grpo.benchmark.rollout import Load
from grpo.config import ModelConfig
from grpo.errors import RunError, UserError
from grpo.model.load import load

SMALL = Load(prompts=2, completions=2, prompt_length=8, completion_length=6)


def test_a_whole_step_is_measured_in_its_parts() -> None:
    rows = {row.unit: row.mean for row in alternate("case", [train.step_side("qwen3-1m", SMALL)], runs=1)}
    parts = [rows[f"s {part}"] for part in ("rollout", "reward", "logprobs", "update", "other")]
    assert sum(parts) == pytest.approx(rows["s"], rel=1e-6)
    assert min(parts) >= 0
    assert rows["GB"] > 0


def test_variants_of_the_update_are_held_against_the_first(monkeypatch) -> None:
    names = ["plain", "shared"]
    rows = list(train.compare_updates("qwen3-1m", SMALL, 1, names, seconds=600))
    assert [row.side for row in rows if row.unit == "s"] == names
    by = {(row.side, row.unit): row for row in rows}
    assert by["plain", "s"].ratio is None
    assert by["shared", "s"].ratio == pytest.approx(by["plain", "s"].mean / by["shared", "s"].mean)
    assert list(train.compare_updates("qwen3-1m", SMALL, 1, names, seconds=0)) == []


def test_shared_and_plain_are_compared_before_they_are_measured(monkeypatch) -> None:
    assert "shared against plain" in train.parity("qwen3-1m", SMALL)
    monkeypatch.setattr(train, "_norm", lambda tree: float(next(iter(tree.values())).size))
    with pytest.raises(RunError, match=r"shared against plain: 1\.0e"):
        train.parity("qwen3-1m", SMALL)


def test_variants_by_name() -> None:
    assert train.variant_names(" shared; shared, kept ") == ["shared", "shared, kept"]
    assert train.variant_names("") == list(train.VARIANTS)
    with pytest.raises(UserError, match="no variant 'fast'"):
        train.variant_names("fast")


def test_a_shapes_model_can_be_loaded_by_a_peer(tmp_path) -> None:
    write_model("qwen3-1m", tmp_path / "model")
    model, tokenizer = load(ModelConfig(name=str(tmp_path / "model")))
    assert len(model.layers) == 4
    assert json.loads((tmp_path / "model/config.json").read_text())["eos_token_id"] == 2047
    assert tokenizer.encode("7")
