"""The index of papers: its recipe lines load, its tests exist, and every paper that the code names is in it."""

import ast
import re
from pathlib import Path

import pytest
from docs.pagerun import PAGES

from grpo.plugins import bundled_names, find_recipe
from grpo.recipes import load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (PAGES / "papers.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| paper")
]
LINES = [row[1].strip("`") for row in ROWS if "=" in row[1]]
OWN = {"2104.09864", "2307.08691", "2309.17453"}
"""Of how models compute: no method that a recipe chooses."""


def papers(text: str) -> set[str]:
    return set(re.findall(r"arXiv (\d{4}\.\d{5})", text))


@pytest.mark.parametrize("line", LINES)
def test_the_recipe_lines_load(line: str) -> None:
    load_recipe(find_recipe("quickstart"), re.split(r" (?=[a-z_]+(?:\.[a-z0-9_]+)*=)", line))


def test_every_row_of_a_method_has_lines_and_a_test() -> None:
    methods = [row for row in ROWS if len(row) == 3]
    assert len(LINES) == len(methods) > 40
    assert all(re.search(r"::test_|oracle|the same", row[2]) for row in methods)


def test_every_test_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 30
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (file, name)


def test_every_recipe_exists() -> None:
    named = {name for row in ROWS if len(row) == 2 for name in re.findall(r"`([\w.-]+)`", row[1])}
    assert named - set(bundled_names("recipes", ".yaml")) == set()


def test_every_paper_that_is_named_is_in_the_index() -> None:
    sources = [*(ROOT / "grpo").rglob("*.py"), *(ROOT / "recipes").rglob("*.yaml")]
    named = set().union(*(papers(path.read_text(encoding="utf-8")) for path in sources))
    assert named - OWN - papers(PAGE) == set(), "each needs a row in docs/pages/papers.md"
