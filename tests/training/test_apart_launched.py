"""Processes that sample and processes that train, by mlx.launch: they are one process that does both."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import LAUNCH, launch
from runs.conversing import conversing  # noqa: F401
from runs.driver import timeless
from training.apart import ONE_OF_EACH, emulated
from training.test_apart import EVAL, MORE, stored
from training.test_divided_runs import check_alike

CLI = "-c", "from grpo.cli import main; main()", "train"
SPLITTING = "import standin_groups; standin_groups.install(); from grpo.cli import main; main()"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed")]


def check_same(one: Path, other: Path) -> None:
    """That two runs sampled, learned and measured the same to the bit, whoever did what."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert timeless(one / name) == timeless(other / name)
    assert stored(one) == stored(other)
    steps = sorted((one / "checkpoints").iterdir())
    assert len(steps) == 4
    for step in steps:
        also = other / "checkpoints" / step.name
        names = sorted(path.name for path in step.glob("*.safetensors"))
        assert names == sorted(path.name for path in also.glob("*.safetensors"))
        assert all((step / name).read_bytes() == (also / name).read_bytes() for name in names), step


def tokens(folder: Path) -> list[list[tuple[int, ...]]]:
    return [[one.trajectory.token_ids for group in step for one in group.rollouts] for step in stored(folder)]


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("adapter.type=full", "optim.learning_rate=0.001", "model.dtype=bfloat16", "optim.moments=int8"),
        (
            "loss={beta: 0.1, importance_sampling_correction: token_truncate}",
            "adapter={sync_reference_every: 2, ref_model_mixup_alpha: 0.5, dropout: 0.1}",
            "optim.num_iterations=2",
            "optim.num_minibatches=2",
        ),
    ],
    ids=["lora", "full", "corrected"],
)
def test_a_sampler_and_a_trainer(recipe: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]) -> None:
    ran = launch(2, *CLI, recipe, *MORE, EVAL, *settings, ONE_OF_EACH, "output_dir=runs/two", timeout=300)
    said = ran.stdout + ran.stderr
    assert "finished after step 4" in said, said
    assert "ranks: process 0 trains" in said
    assert "exited with code" not in said  # nor does the sampler, which has made no update, count as untrained
    emulated(monkeypatch, recipe, *MORE, EVAL, *settings, "output_dir=runs/one")
    check_same(Path("runs/one"), Path("runs/two"))
    at = Path("runs/two/checkpoints/step-000002")
    ran = launch(
        2, *CLI, recipe, *MORE, EVAL, *settings, ONE_OF_EACH, "output_dir=runs/two", "--resume-from", at, timeout=300
    )
    assert "finished after step 4" in ran.stdout + ran.stderr, ran.stdout + ran.stderr
    check_same(Path("runs/one"), Path("runs/two"))


@pytest.mark.parametrize("slots", [64, 4], ids=["shares", "tickets"])
def test_two_samplers(recipe: Path, monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    settings = (*MORE, EVAL, "rollout.prompts_per_step=3", f"rollout.max_concurrency={slots}")
    two = "ranks={sample: 2, train: 1}"
    ran = launch(3, *CLI, recipe, *settings, two, "output_dir=runs/three", timeout=300)
    assert "finished after step 4" in ran.stdout + ran.stderr, ran.stdout + ran.stderr
    emulated(monkeypatch, recipe, *settings, "output_dir=runs/one")
    check_same(Path("runs/one"), Path("runs/three"))


def test_two_samplers_of_conversations(
    conversing: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin = "from runs.conversing import calls_draw; from grpo.environments.chat import Chat; Chat.parse = calls_draw"
    begin += "; from grpo.cli import main; main()"
    settings = ("checkpoint.every=1", "checkpoint.keep=9", "rollout.speculate=off")
    two = "ranks={sample: 2, train: 1}"
    ran = launch(3, "-c", begin, "train", conversing, *settings, two, "output_dir=runs/three", timeout=300)
    assert "finished after step 4" in ran.stdout + ran.stderr, ran.stdout + ran.stderr
    emulated(monkeypatch, conversing, *settings, "output_dir=runs/one")
    one, three = (tokens(Path(f"runs/{name}")) for name in ("one", "three"))
    assert one == three


def test_two_samplers_and_two_trainers(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (*MORE, EVAL, "rollout.prompts_per_step=4", "loss.beta=0.05")
    four = "ranks={sample: 2, train: 2}"
    ran = launch(4, "-c", SPLITTING, "train", recipe, *settings, four, "output_dir=runs/four", timeout=400)
    assert "finished after step 4" in ran.stdout + ran.stderr, ran.stdout + ran.stderr
    emulated(monkeypatch, recipe, *settings, "output_dir=runs/one")
    check_alike(Path("runs/one"), Path("runs/four"), range(1, 5))


def test_two_trainers_of_a_ring_are_refused(recipe: Path) -> None:
    ran = launch(3, *CLI, recipe, "ranks={sample: 1, train: 2}", "rollout.prompts_per_step=4")
    said = ran.stdout + ran.stderr
    assert "this MLX backend cannot make a group of them" in said
    assert "Set ranks.train to 1" in said
    assert "Traceback" not in said
