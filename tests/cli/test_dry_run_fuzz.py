"""A fuzzer over whole dry runs: every setting of a recipe written out, some of them made something else."""

from __future__ import annotations

import random
import re
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from grpo.planning import planner
from grpo.planning.footprint import measure_footprint
from grpo.recipes import dump_recipe, load_recipe

SECTIONS = """
eval: {split: train, prompts: 2, samples: 2}
log: {wandb: {mode: offline}, tensorboard: true}
"""
VALUES = [
    *("null", "true", "false", "0", "1", "2", "3", "7", "100", "8192", "1000000", "-1", "0.5", "1.0", "1e-9", "1e6"),
    *("[]", "{}", "''", "x", "a/b", "./x", "[0, 1]", "[1]", "['a']", "{a: 1}", "{a: {b: [1]}}", "'{x}'", "'{'", "all"),
    *("none", "auto", "never", "always", "loss", "reward", "sgd", "lion", "cosine", "gspo", "vespo", "dppo", "full"),
    *("dora", "float16", "group", "batch", "gdpo", "process", "inline", "step", "completion", "token_mask", "greedy"),
    *("builtin:sorting", "builtin:none", "train.jsonl", "question", "digits.py", "digits.py:nope", "nope.py:f", "é😀"),
    *("a" * 300, "../" * 50, "~nobody/x", "~/x", "C:\\x", "file:///x", "' '", "\"\\t\"", "1970-01-01", ".inf", ".nan"),
]  # fmt: skip


def mutant(text: str, random_: random.Random) -> str:
    """The recipe with up to three values replaced, or exchanged."""
    lines = text.splitlines()
    places = [n for n, line in enumerate(lines) if re.match(r"\s*(- )?[a-zA-Z_]+: \S", line)]
    for _ in range(random_.choice((1, 1, 2, 3))):
        place, other = random_.choice(places), random_.choice(places)
        value = random_.choice([*VALUES, lines[other].partition(": ")[2]])
        lines[place] = f"{lines[place].partition(': ')[0]}: {value}"
    return "\n".join(lines) + "\n"


def try_mutants(run_cli: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch, count: int, seed: int) -> int:
    """How many of the mutants are runs that may start, as the recipe itself is. Only messages end the others."""
    recipe.write_text(
        recipe.read_text().replace('"digits.py:reward"', '"digits.py:reward", isolation: inline') + SECTIONS
    )
    whole = dump_recipe(load_recipe(recipe))
    footprints: dict[bool, Any] = {}

    def measured(policy: Any, checkpointing: bool, memory: int) -> Any:
        if checkpointing not in footprints:
            footprints[checkpointing] = measure_footprint(policy, checkpointing, memory)
        return footprints[checkpointing]

    monkeypatch.setattr(planner, "measure_footprint", measured)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    random_, good, wrong = random.Random(seed), 0, []
    before = {path.name for path in Path().iterdir()}
    Path("mutant.yaml").write_text(whole)
    assert run_cli("train", "mutant.yaml", "--dry-run").code == 0
    for _ in range(count):
        text = mutant(whole, random_)
        Path("mutant.yaml").write_text(text)
        begun = time.process_time()
        try:
            ran = run_cli("train", "mutant.yaml", "--dry-run")
        except Exception:
            wrong.append(f"{traceback.format_exc()[-600:]}\n{_difference(whole, text)}")
            continue
        good += ran.code == 0
        if (ran.code == 2 and not ran.err.startswith("grpo: ")) or time.process_time() - begun > 5:
            wrong.append(f"{time.process_time() - begun:.1f} s {ran.err[-300:]}\n{_difference(whole, text)}")
    assert wrong == []
    assert {path.name for path in Path().iterdir()} - before <= {"mutant.yaml", "__pycache__"}
    return good


def _difference(text: str, other: str) -> str:
    pairs = zip(text.splitlines(), other.splitlines(), strict=True)
    return "; ".join(now for was, now in pairs if was != now)


def test_mutants_start_or_are_explained(run_cli, recipe, monkeypatch) -> None:
    assert try_mutants(run_cli, recipe, monkeypatch, 20, seed=0) < 20


@pytest.mark.slow
def test_a_thousand_mutants_start_or_are_explained(run_cli, recipe, monkeypatch) -> None:
    assert 0 < try_mutants(run_cli, recipe, monkeypatch, 1_000, seed=1) < 1_000
