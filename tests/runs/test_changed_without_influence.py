"""Settings that change nothing of what a run samples and learns may change when it is resumed."""

from pathlib import Path

import mlx.core as mx
import pytest
from runs.driver import run, timeless

from grpo.config.describe import settings
from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs.resume import WITHOUT_INFLUENCE, find_start

OTHERS = {
    "rollout.speculate": "3",
    "checkpoint.every": "1",
    "checkpoint.keep": "1",
    "log.tensorboard": "true",
    "log.completions": "null",
    "alarms": "off",
}


@pytest.mark.quick_cases("rollout.speculate", "log.completions")
@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU rounds wide products otherwise")
@pytest.mark.parametrize("setting", OTHERS)
def test_a_run_that_is_resumed_with_another_one_ends_in_the_same_weights(recipe: Path, setting: str) -> None:
    first = ("rollout.speculate=off", "checkpoint.every=2")
    recipe.write_text(recipe.read_text().replace("steps: 2", "steps: 3"))
    run(recipe, "output_dir=whole", *first)
    stopped_after(recipe, 2, "output_dir=parts", *first)
    run(recipe, "output_dir=parts", *first, f"{setting}={OTHERS[setting]}", resume=True)
    last = "checkpoints/step-000003/adapters.safetensors"
    assert Path("whole", last).read_bytes() == Path("parts", last).read_bytes()
    assert without_speculation("whole") == without_speculation("parts")


def stopped_after(recipe: Path, steps: int, *overrides: str) -> None:
    """A run that a signal ends in the step behind so many."""

    def change(trainer, stop) -> None:
        step = trainer.step

        def counted(n: int):
            stop.signal = 15 if n == steps + 1 else stop.signal
            return step(n)

        trainer.step = counted

    assert run(recipe, *overrides, change=change).state.step == steps


def without_speculation(folder: str) -> list[dict[str, object]]:
    records = timeless(Path(folder, "metrics.jsonl"))
    return [{name: value for name, value in one.items() if "speculation/" not in name} for one in records]


def test_all_of_them_are_settings_and_tried_or_only_logged() -> None:
    assert {one.key for one in settings()} >= set(WITHOUT_INFLUENCE)
    of_processes = {"model.shard", "model.shard_size", "ranks.sample", "ranks.train"}
    assert set(WITHOUT_INFLUENCE) == {*OTHERS, "output_dir", "log.wandb", "log.trackio", *of_processes}


@pytest.mark.parametrize("override", ["log.wandb={mode: offline}", "rollout.speculate=7", "log.completions.every=5"])
def test_a_section_goes_with_all_that_is_in_it(recipe: Path, override: str) -> None:
    run(recipe)
    notes = find_start(load_recipe(recipe, [override]), resume=True).notes
    assert [note for note in notes if note.startswith("changed")] == []


@pytest.mark.parametrize(
    ("override", "line"),
    [("log.kl=3", "log.kl: auto → 3"), ("rollout.max_concurrency=3", "rollout.max_concurrency: 64 → 3")],
)
def test_neighbors_of_theirs_still_count(recipe: Path, override: str, line: str) -> None:
    run(recipe)
    with pytest.raises(UserError, match=line):
        find_start(load_recipe(recipe, [override]), resume=True)
