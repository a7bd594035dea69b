"""A whole run with its layers' inputs in a vault: planned, told, and the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from model.vaults import Doubled

from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs import prepare as preparing
from grpo.runs.prepare import Prepared, prepare

OFFLOADED = "optim.offload_activations=true"


def after_a_step(prepared: Prepared) -> dict[str, mx.array]:
    prepared.trainer.step(1)
    prepared.opened.close()
    return dict(tree_flatten(prepared.trainer.policy.model.trainable_parameters()))


def test_a_step_is_the_same_and_the_plan_says_where_the_inputs_are(recipe: Path, monkeypatch: Any) -> None:
    expected = after_a_step(prepare(load_recipe(recipe, ["optim.gradient_checkpointing=true"])))
    vault = Doubled()
    monkeypatch.setattr(preparing, "vault_of", lambda on: vault if on else None)
    prepared = prepare(load_recipe(recipe, [OFFLOADED]))
    assert prepared.plan.checkpointing is True
    assert vault.note() in prepared.notes
    before = vault.begun
    found = after_a_step(prepared)
    assert vault.begun > before
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[path], expected[path]).item() for path in found)


def test_a_machine_with_one_memory_is_told_before_a_model_is_loaded(recipe: Path) -> None:
    with pytest.raises(UserError, match="offload_activations: this run is on a CPU"):
        prepare(load_recipe(recipe, [OFFLOADED, "model.name=nowhere"]))
