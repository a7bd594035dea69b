"""`grpo eval RUN` says when the held-out rows are no longer those that the run was trained beside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def test_a_changed_file_is_named(recipe, run_cli) -> None:
    def write(name: str, numbers: range) -> None:
        rows = [{"question": f"What is {i}+{i}?", "answer": str(2 * i)} for i in numbers]
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("held_out.jsonl", range(5, 8))
    held_out = "eval={source: held_out.jsonl, split: train, prompts: 2, samples: 1, every: 2}"
    assert run_cli("train", recipe, held_out).code == 0
    said = "held_out.jsonl has changed since the run was trained: these numbers cannot be compared"

    def told(*args: str) -> bool:
        ran = run_cli("eval", "runs/toy", *args)
        assert ran.code == 0, ran.err
        return said in ran.out

    assert not told()
    write("train.jsonl", range(2, 9))  # nothing is evaluated on these
    assert not told()
    write("held_out.jsonl", range(6, 9))
    assert told()
    assert told("--checkpoint", "2", "--samples", "2", "rollout.temperature=0.5")
    shutil.copytree("runs/toy/checkpoints/step-000002", "bare")
    Path("bare/state.json").unlink()
    assert told("--adapter", "bare")
    assert not told("--data", "train.jsonl")
    write("held_out.jsonl", range(5, 8))
    assert not told()


def test_a_run_without_held_out_rows_has_nothing_to_say(recipe, run_cli) -> None:
    assert run_cli("train", recipe, "optim.steps=1").code == 0
    ran = run_cli("eval", "runs/toy", "--data", "train.jsonl", "--samples", "1", "--prompts", "1")
    assert ran.code == 0, ran.err
    assert "warning" not in ran.out
