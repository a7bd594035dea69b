"""Errors of the command line name an override that works, and what a command leaves out is said."""

import shlex
from pathlib import Path

import pytest

from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.telemetry.jsonl import JsonlLogger
from grpo.telemetry.recorded import read_run, runs_table
from grpo.types import EvalMetrics


def ways_out(recipe: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        load_recipe(recipe, overrides)
    return str(refused.value)


def test_full_training_of_a_recipe_with_lora_settings(recipe) -> None:
    recipe.write_text(recipe.read_text() + "adapter: {rank: 4, scale: 3.0, layers: [0, 1]}\n")
    said = ways_out(recipe, "adapter.type=full")
    assert "adapter.rank does nothing with adapter.type: full" in said
    (override,) = shlex.split(said[said.index("'adapter=") :])
    adapter = load_recipe(recipe, [override]).adapter
    assert (adapter.type, adapter.layers, adapter.rank) == ("full", (0, 1), 16)


def test_a_function_in_the_place_of_a_files_source(recipe) -> None:
    Path("rows.py").write_text("def rows():\n    return [{'question': 'q'}]\n")
    said = ways_out(recipe, "data.use=rows.py")
    assert "data.source=null removes the recipe's source" in said
    assert load_recipe(recipe, ["data.use=rows.py", "data.source=null"]).data.source is None


def test_a_dry_run_ends_with_its_result(recipe, run_cli) -> None:
    ran = run_cli("train", recipe, "--dry-run")
    assert ran.out.splitlines()[-1] == "all checks passed; nothing was trained and nothing was written"
    Path("digits.py").write_text("def reward(completions, **_):\n    return [1.0]\n")
    failed = run_cli("train", recipe, "--dry-run")
    assert (failed.code, "all checks passed" in failed.out) == (2, False)
    assert "1 score for 4 completions; a reward returns one score per completion" in failed.err


def test_a_finished_run_that_is_resumed_says_how_to_train_further(recipe, run_cli) -> None:
    assert run_cli("train", recipe).code == 0
    again = run_cli("train", recipe, "--resume")
    assert again.code == 0
    assert "no steps left to train: optim.steps is 2, and" in again.out
    assert "raise optim.steps" in again.out
    assert "nothing was trained: the run had already finished after step 2\n" in again.out
    assert "resumes after" not in again.out
    further = run_cli("train", recipe, "optim.steps=3", "--resume-changed")
    assert "resumes after step 2 from" in further.out
    assert "finished after step 3\n" in further.out
    fewer = run_cli("train", recipe, "optim.steps=1", "--resume-changed")
    assert "no steps left to train: optim.steps is 1, and" in fewer.out
    assert "was written after step 3" in fewer.out


def test_best_is_step_0_where_no_adapter_was_as_good(recipe, run_cli) -> None:
    recipe.write_text(recipe.read_text() + "eval: {split: train, every: 9, prompts: 2, samples: 2}\n")
    assert run_cli("train", recipe, "optim.steps=1").code == 0
    folder = Path("runs/toy")
    for values, best in (((0.5, 0.25), 0), ((0.25, 0.5), 1), ((0.5, 0.5), 0)):
        (folder / "eval.jsonl").unlink()
        logger = JsonlLogger(folder)
        for step, value in enumerate(values):
            logger.log(EvalMetrics(step, 2, "digits", {"avg@2": value}, {"avg@2": (value, value)}, 0))
        assert read_run(folder).best.step == best
        (shown,) = runs_table([read_run(folder)]).columns[4].cells
        assert shown == f"avg@2 50.0% at step {best}"


def test_generate_says_what_was_meant(recipe, run_cli) -> None:
    assert run_cli("train", recipe, "optim.steps=1").code == 0
    bare = run_cli("generate", "toy", "What is 3+3?")
    assert (bare.code, "Did you mean runs/toy?" in bare.err) == (2, True), bare.err
    checkpoint = Path("runs/toy/checkpoints/step-000001")
    assert run_cli("generate", checkpoint, "What is 3+3?", "--max-tokens", "1").code == 0
    checkpoint.rename("kept")
    adapter = run_cli("generate", "kept", "What is 3+3?")
    assert (adapter.code, "kept is a saved adapter" in adapter.err, "--adapter kept" in adapter.err) == (2, True, True)
