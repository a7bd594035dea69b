"""The page about reproducing the curves has the published numbers, and names scripts and options that there are."""

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from docs.pagerun import PAGES

ROOT = Path(__file__).parents[2]
PAGE = (PAGES / "reproducing.md").read_text(encoding="utf-8")
LOSSES = ["grpo", "dapo", "dr_grpo", "gspo", "cispo"]


def test_the_table_is_that_of_the_published_runs() -> None:
    runs = json.loads((ROOT / "scripts/benchmarks/learning.json").read_text(encoding="utf-8"))
    for task in ("arithmetic", "countdown", "sorting", "format"):
        mine = [run for run in runs if run["task"] == task]
        after = [[run["sampled"][-1] for run in mine if run["loss"] == loss] for loss in LOSSES]
        means = [fmean(run["sampled"][0] for run in mine), *map(fmean, after)]
        (row,) = re.findall(rf"^\| {task} \| (.+) \|$", PAGE, re.MULTILINE)
        assert [float(cell) for cell in row.split(" | ")] == pytest.approx([100 * mean for mean in means], abs=0.06)


def test_its_scripts_recipes_and_options_exist() -> None:
    assert all((ROOT / path).is_file() for path in re.findall(r"scripts/[\w/]+\.\w+|recipes/[\w/]+\.yaml", PAGE))
    asked = [sys.executable, ROOT / "scripts/benchmarks/learning.py", "--help"]
    told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    options = set(re.findall(r"--(?:tasks|losses|seeds|steps|into|jobs)\b", PAGE))
    assert len(options) == 6
    assert all(option in told for option in options)
