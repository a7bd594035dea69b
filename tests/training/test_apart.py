"""Sampling and training at the same time: a lag of one step, the same numbers by one process and by several."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from launching import LAUNCH, launch
from runs.driver import same_end, timeless
from training.apart import emulated

from grpo.runs.completions import read_completions, stored_steps

CLI = "-c", "from grpo.cli import main; main()", "train"
MORE = (
    "optim.steps=4",
    "optim.learning_rate=0.02",
    "checkpoint.every=1",
    "checkpoint.keep=9",
    "rollout.speculate=off",
    "eval={split: train, every: 2, prompts: 2, samples: 2}",
)
launched = pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed beside this Python")


def policy_steps(folder: Path) -> list[set[tuple[int | None, int]]]:
    """The policy that sampled each step's completions, by the steps it had made, and their lag."""
    files = [read_completions(path)[1] for path in stored_steps(folder / "completions")]
    return [{(r.trajectory.policy_step, r.lag) for group in groups for r in group.rollouts} for groups in files]


def check_same(one: Path, other: Path) -> None:
    """That two runs sampled, learned and measured the same to the bit, whoever did what."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert timeless(one / name) == timeless(other / name)
    stored, also = (stored_steps(folder / "completions") for folder in (one, other))
    assert [read_completions(path) for path in stored] == [read_completions(path) for path in also]
    steps = sorted((one / "checkpoints").iterdir())
    for step in steps:
        names = sorted(path.name for path in step.glob("*.safetensors"))
        assert names == sorted(path.name for path in (other / "checkpoints" / step.name).glob("*.safetensors"))
        for name in names:
            assert (step / name).read_bytes() == (other / "checkpoints" / step.name / name).read_bytes(), (step, name)


def test_each_step_learns_from_the_policy_before_the_last_update(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated(monkeypatch, recipe, *MORE)
    assert policy_steps(Path("runs/toy")) == [{(0, 0)}, {(0, 1)}, {(1, 1)}, {(2, 1)}]
    steps = [json.loads(line) for line in Path("runs/toy/metrics.jsonl").read_text().splitlines()]
    assert [step["policy_lag/mean"] for step in steps] == [0, 1, 1, 1]


@launched
def test_a_sampler_and_a_trainer_are_one_process_that_does_both(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = launch(2, *CLI, recipe, *MORE, "ranks={sample: 1, train: 1}", "output_dir=runs/two")
    said = ran.stdout + ran.stderr
    assert "finished after step 4" in said, said
    emulated(monkeypatch, recipe, *MORE, "output_dir=runs/one")
    check_same(Path("runs/one"), Path("runs/two"))


def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated(monkeypatch, recipe, *MORE, "output_dir=runs/whole")
    shutil.copytree("runs/whole", "runs/parts")
    for at in (1, 2, 3):
        checkpoint = Path(f"runs/parts/checkpoints/step-{at:06d}")
        emulated(monkeypatch, recipe, *MORE, "output_dir=runs/parts", checkpoint=checkpoint)
        same_end(Path("runs/whole"), Path("runs/parts"))
