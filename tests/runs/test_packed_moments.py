"""A run with moments in 8 bits: stopped, taken back and gone on with as any other, and with other moments by leave."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from runs.driver import run, same_end
from runs.test_moments import at
from runs.test_resume import interrupt_in
from runs.test_wholly import EVERY, saved, steps

from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs.prepare import prepare
from grpo.training import optimizer

INT8 = "optim.moments=int8"
FULL = ("adapter.type=full", "optim.steps=3", "checkpoint.every=1", INT8)
LORA = ("adapter.rank=64", "optim.steps=2", "optim.num_minibatches=2", INT8)
"""A rank at which the toy's matrices have 4,096 numbers."""


def optimizer_of(folder: str, step: int) -> dict[str, mx.array]:
    return mx.load(str(Path(folder) / f"checkpoints/step-{step:06d}/optimizer.safetensors"))


@pytest.mark.quick_cases("settings0")
@pytest.mark.parametrize("settings", [FULL, (*FULL, "model.dtype=bfloat16"), (*LORA, "adapter.type=dora")])
def test_a_resumed_run_ends_in_the_same_bits(recipe, settings, monkeypatch) -> None:
    monkeypatch.setattr(optimizer, "GROUP", 2**13)  # arrays move in parts
    run(recipe, *settings, EVERY, "output_dir=whole")
    run(recipe, *settings, EVERY, "output_dir=parts", change=interrupt_in(2, "update"))
    assert steps("parts") == ["step-000001"]
    run(recipe, *settings, EVERY, "output_dir=parts", resume=True)
    same_end(Path("whole"), Path("parts"))
    assert {array.dtype for array in optimizer_of("parts", 2).values()} > {mx.int8, mx.uint8}


def test_a_step_that_fails_is_taken_back_with_its_moments(recipe, monkeypatch) -> None:
    """An adapter's, after its first update of two."""
    run(recipe, *LORA, EVERY, "output_dir=whole")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        run(recipe, *LORA, EVERY, "output_dir=failed", change=at("optimizer", patch))
    assert saved("failed", 1) == saved("whole", 1)
    assert any(array.dtype == mx.int8 and array.any().item() for array in optimizer_of("failed", 1).values())


@pytest.mark.parametrize(("before", "after"), [("float32", "int8"), ("int8", "float32")])
def test_a_run_goes_on_with_other_moments_by_leave(recipe, before: str, after: str) -> None:
    settings = ("adapter.type=full", "checkpoint.every=1", "output_dir=run")
    run(recipe, *settings, "optim.steps=1", f"optim.moments={before}")
    changed = (*settings, "optim.steps=2", f"optim.moments={after}")
    with pytest.raises(UserError, match=f"optim.moments: {before} → {after}"):
        run(recipe, *changed, resume=True)
    assert run(recipe, *changed, changed=True).state.step == 2
    packed = {True: "int8", False: "float32"}
    assert [packed["model.embed_tokens.weight.m.codes" in optimizer_of("run", n)] for n in (1, 2)] == [before, after]
    assert optimizer_of("run", 2)["step"].item() == 2


def test_another_optimizer_is_refused_in_words(recipe) -> None:
    settings = ("adapter.type=full", "checkpoint.every=1", "output_dir=run", INT8)
    run(recipe, *settings, "optim.steps=1", "optim.optimizer=lion")
    with pytest.raises(UserError, match="resume: the checkpoint's file optimizer has other arrays or shapes"):
        run(recipe, *settings, "optim.steps=2", "optim.optimizer=adamw", changed=True)


def test_moments_that_are_all_too_small_are_said(recipe) -> None:
    said = "optim.moments: int8 does nothing here: every trained array has fewer than 4,096 numbers"
    for rank, notes in ((2, 1), (64, 0)):
        prepared = prepare(load_recipe(recipe, [f"adapter.rank={rank}", INT8]))
        with prepared.opened:
            assert prepared.notes.count(said) == notes
