"""Runs of processes that spread the weights are runs of one process, and go on with any number of processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs.driver import run
from test_divided_runs import CLI, check_alike
from test_ranks import LAUNCH, launch

from grpo.errors import UserError
from grpo.recipes import load_recipe

MORE = (
    "optim.steps=4",
    "optim.num_iterations=2",
    "checkpoint.every=1",
    "checkpoint.keep=9",
    "loss.beta=0.05",
    "rollout.prompts_per_step=4",
    "rollout.speculate=off",
    "eval={split: train, every: 2, prompts: 2, samples: 2}",
)
FULL = "adapter={type: full}", "optim.learning_rate=1e-4"

FAILS = """
import pathlib, sys
import mlx.core as mx
import grpo
from grpo.backend.ranks import Ranks
from grpo.recipes import load_recipe
scale = float("nan")
def loss(current, batch, cfg):
    return -current * batch.advantages * scale
trainer = grpo.Trainer(load_recipe(pathlib.Path(sys.argv[1]), sys.argv[2:]), loss=loss, quiet=True)
try:
    trainer.train()
except grpo.RunError as error:
    said = str(error)
assert "not finite" in said, said
scale = 1.0
pathlib.Path(f"measured-{Ranks.launched().rank}").write_text(str(trainer.evaluate().n))
"""


def spread(n: int, recipe: Path, *settings: object) -> None:
    ran = launch(n, *CLI, recipe, *MORE, "model.shard=fsdp", *settings, timeout=400)
    said = ran.stdout + ran.stderr
    assert "finished after step 4" in said, said
    assert f"model.shard: fsdp: {n} processes split the weights" in said


@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed beside this Python")
@pytest.mark.slow
@pytest.mark.parametrize("adapter", [(), FULL], ids=["lora", "full"])
def test_a_spread_run_is_that_of_one_process_and_each_goes_on_with_the_other_s(
    recipe: Path, adapter: tuple[str, ...]
) -> None:
    one, two = Path("runs/one"), Path("runs/two")
    run(recipe, *MORE, *adapter, f"output_dir={one}")
    spread(2, recipe, *adapter, f"output_dir={two}")
    check_alike(one, two, range(1, 5))
    run(recipe, *MORE, *adapter, "output_dir=runs/three", checkpoint=two / "checkpoints/step-000002")
    check_alike(one, Path("runs/three"), range(3, 5))
    for n, step in ((2, 2), (4, 3)):  # four processes on few cores take their time
        at, goes_on = one / f"checkpoints/step-{step:06d}", Path(f"runs/on-{n}")
        spread(n, recipe, *adapter, f"output_dir={goes_on}", "--resume-from", at)
        check_alike(one, goes_on, range(step + 1, 5))


@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed beside this Python")
@pytest.mark.slow
def test_a_trainer_whose_update_failed_loads_the_model_again_which_was_left_in_parts(recipe: Path) -> None:
    settings = (*MORE, "model.shard=fsdp", "optim.max_skipped_updates=1", "loss.beta=0")
    ran = launch(2, "-c", FAILS, recipe, *settings, timeout=300)
    measured = [Path(f"measured-{rank}") for rank in range(2)]
    assert [file.exists() and file.read_text() for file in measured] == ["2", "2"], ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("optim.gradient_checkpointing=false",), "all layers are checkpointed"),
        (("optim.gradient_checkpointing=2",), "all layers are checkpointed"),
        (("optim.offload_activations=true",), "inputs of layers stay on the device"),
        (("teacher={adapter: saved, kl: exact}",), "use teacher.kl: sampled"),
        ((*FULL, "optim.optimizer=muon"), "needs whole matrices"),
        ((*FULL, "optim.optimizer=adafactor"), "needs whole matrices"),
    ],
)
def test_what_spread_weights_do_not_do_is_refused(recipe: Path, settings: tuple[str, ...], why: str) -> None:
    with pytest.raises(UserError, match=why):
        load_recipe(recipe, ["model.shard=fsdp", *settings])


def test_what_one_process_does_with_whole_matrices_it_does_with_an_adapter(recipe: Path) -> None:
    load_recipe(recipe, ["model.shard=fsdp", "optim.optimizer=muon"])


def test_one_process_does_not_spread_weights(recipe: Path, run_cli) -> None:
    ran = run_cli("train", recipe, "model.shard=fsdp")
    assert ran.code == 2
    assert "this is one process" in ran.err
