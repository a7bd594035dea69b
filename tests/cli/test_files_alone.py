"""`file.py` alone in the place of `file.py:function`, in every setting that names code."""

from __future__ import annotations

import shutil
from pathlib import Path


def test_rows_losses_loggers_and_rewards_go_by_their_file(recipe, run_cli) -> None:
    Path("rows.py").write_text(
        "def questions(split):\n    return [{'question': f'{split} {i}+{i}?'} for i in range(4)]\n"
    )
    Path("lossy.py").write_text("def mine(logprobs, batch, cfg):\n    return -logprobs * batch.advantages\n")
    Path("told.py").write_text(
        "def told(record):\n    with open('told.txt', 'a') as file:\n        print(record.step, file=file)\n"
    )
    settings = ["data={use: rows.py, prompt: '{question}'}", "loss={use: lossy.py}", "log.use=[told.py]"]
    settings += ["rewards=[{use: digits.py}]", "eval={prompts: 2, samples: 1, every: 2}"]
    ran = run_cli("train", recipe, *settings)
    assert ran.code == 0, ran.err
    assert "2" in Path("told.txt").read_text().split()
    shutil.rmtree("runs/toy/checkpoints/step-000002")
    assert run_cli("train", recipe, *settings, "--resume").code == 0
    Path("lossy.py").write_text(Path("lossy.py").read_text() + "\n# changed\n")
    ran = run_cli("train", recipe, *settings, "--resume")
    assert "code of " in ran.err
    assert "lossy.py: " in ran.err
