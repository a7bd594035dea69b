"""Runs of processes that hold one model together: they are runs of one process, and go on with any number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from runs.driver import run
from test_ranks import LAUNCH, launch

from grpo.backend.ranks import Ranks
from grpo.config import Recipe
from grpo.errors import UserError
from grpo.model.tensor import divide
from grpo.recipes import load_recipe
from grpo.runs.completions import read_completions, stored_steps

CLI = "-c", "from grpo.cli import main; main()", "train"
MORE = (
    "optim.steps=4",
    "optim.num_iterations=2",
    "checkpoint.every=1",
    "checkpoint.keep=9",
    "loss.beta=0.05",
    "adapter.dropout=0.1",
    "rollout.speculate=off",
    "eval={split: train, every: 2, prompts: 2, samples: 2}",
)


def records(folder: Path, name: str) -> dict[int, dict[str, Any]]:
    return {(line := json.loads(text))["step"]: line for text in (folder / name).read_text().splitlines()}


def tokens(stored: Any) -> list[tuple[int, ...]]:
    return [rollout.trajectory.token_ids for group in stored[-1] for rollout in group.rollouts]


def check_alike(one: Path, other: Path, steps: range) -> None:
    """That two runs sampled the same, learned the same, and measured the same, but for rounding."""
    stored = {path.stem: read_completions(path) for path in stored_steps(one / "completions")}
    for path in stored_steps(other / "completions"):
        assert tokens(stored[path.stem]) == tokens(read_completions(path))
    for name, keys in (("metrics.jsonl", ("reward", "loss", "grad_norm", "kl")), ("eval.jsonl", ("avg@2",))):
        alone, divided = records(one, name), records(other, name)
        for step in (step for step in steps if step in alone):
            for key in keys:
                assert divided[step][key] == pytest.approx(alone[step][key], rel=1e-4, abs=1e-6), (step, key)
    last = f"checkpoints/step-{steps[-1]:06d}"
    for file in ("adapters", "optimizer"):
        whole: Any = mx.load(str(one / last / f"{file}.safetensors"))
        theirs: Any = mx.load(str(other / last / f"{file}.safetensors"))
        assert {path: array.shape for path, array in whole.items()} == {p: a.shape for p, a in theirs.items()}
        for path, array in whole.items():
            off = ~mx.isclose(array, theirs[path], rtol=1e-3, atol=1e-5)
            assert off.mean().item() <= 1e-3, (file, path)  # AdamW makes full steps of gradients that are rounding


@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed beside this Python")
@pytest.mark.slow
def test_a_divided_run_is_that_of_one_process_and_each_goes_on_with_the_other_s(recipe: Path) -> None:
    one, two = Path("runs/one"), Path("runs/two")
    run(recipe, *MORE, f"output_dir={one}")
    ran = launch(2, *CLI, recipe, *MORE, "model.shard=tensor", f"output_dir={two}")
    said = ran.stdout + ran.stderr
    assert "finished after step 4" in said, said
    assert "model.shard: tensor: 2 processes share one model" in said
    assert "decoding: joined layers, shared prompts" in said
    check_alike(one, two, range(1, 5))
    run(recipe, *MORE, "output_dir=runs/three", checkpoint=two / "checkpoints/step-000002")
    check_alike(one, Path("runs/three"), range(3, 5))
    at = one / "checkpoints/step-000002"
    ran = launch(2, *CLI, recipe, *MORE, "model.shard=tensor", "output_dir=runs/four", "--resume-from", at)
    assert "finished after step 4" in ran.stdout + ran.stderr, ran.stdout + ran.stderr
    check_alike(one, Path("runs/four"), range(3, 5))


@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed beside this Python")
@pytest.mark.slow
def test_two_groups_of_two_processes_are_two_processes(recipe: Path) -> None:
    brief = [*MORE, "optim.steps=2"]
    ran = launch(2, *CLI, recipe, *brief, "output_dir=runs/two")
    assert "finished after step 2" in ran.stdout, ran.stdout + ran.stderr
    begin = "import standin_groups; standin_groups.install(); from grpo.cli import main; main()"
    divided = "model.shard=tensor", "model.shard_size=2", "output_dir=runs/four"
    ran = launch(4, "-c", begin, "train", recipe, *brief, *divided, timeout=400)
    assert "finished after step 2" in ran.stdout, ran.stdout + ran.stderr
    assert "2 processes share one model, in 2 groups" in ran.stdout
    check_alike(Path("runs/two"), Path("runs/four"), range(1, 3))


@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed beside this Python")
@pytest.mark.slow
def test_a_ring_makes_no_groups_and_says_so(recipe: Path) -> None:
    ran = launch(4, *CLI, recipe, "model.shard=tensor", "model.shard_size=2")
    said = ran.stdout + ran.stderr
    assert "this backend of MLX cannot make groups of some of the processes" in said
    assert "Set model.shard_size to 4" in said
    assert "Traceback" not in said


class Several(Ranks):
    """Processes that are not there."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


def test_what_cannot_be_divided_is_refused_with_the_reason(zoo) -> None:
    with pytest.raises(UserError, match=r"3 processes cannot share 4 heads \(num_attention_heads\)"):
        divide(zoo("tied"), Several(3))
    with pytest.raises(UserError, match=r"4 processes cannot share 2 heads \(num_key_value_heads\) .* a divisor of 2"):
        divide(zoo("tied"), Several(4))
    with pytest.raises(UserError, match=r"the architecture gemma2: mlx-lm does not divide it\. .*qwen3"):
        divide(zoo("gemma2"), Several(2))


def test_processes_make_groups_or_say_why_not() -> None:
    with pytest.raises(UserError, match="this is a single process"):
        Ranks().divided(4)
    for size in (3, 8):
        with pytest.raises(
            UserError,
            match=f"model.shard_size: groups of {size} processes .* 4 processes cannot be divided into such groups",
        ):
            Several(4).divided(size)
    whole = Several(4).divided(None)
    assert (whole.size, whole.shard.size, whole.own, whole.first) == (1, 4, (), True)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("adapter.type=full",), "use lora or dora"),
        (("optim.optimizer=muon",), "needs whole matrices"),
        (("optim.moments=int8",), "packs the numbers of whole arrays"),
        (("tools=['digits.py:reward']",), "answer at different times"),
        (("rewards=[{use: judge}]",), "a single process scores"),
    ],
)
def test_what_a_divided_model_does_not_do_is_refused(recipe: Path, settings: tuple[str, ...], why: str) -> None:
    with pytest.raises(UserError, match=why):
        load_recipe(recipe, ["model.shard=tensor", *settings])


def test_a_size_without_a_way_to_divide_and_a_divided_teacher_do_nothing(recipe: Path) -> None:
    with pytest.raises(UserError, match="does nothing without model\\.shard"):
        load_recipe(recipe, ["model.shard_size=2"])
    with pytest.raises(UserError, match="every process holds the whole teacher"):
        load_recipe(recipe, ["teacher={model: {name: m, shard: tensor}}"])
    assert Recipe.model_fields["model"].annotation.model_fields["shard"].default is None


def test_one_process_does_not_divide_a_model(recipe: Path, run_cli) -> None:
    ran = run_cli("train", recipe, "model.shard=tensor")
    assert ran.code == 2
    assert "this is a single process" in ran.err
