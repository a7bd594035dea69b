"""What the README shows is true: its recipe loads, its reward passes its cases, and it is short."""

import re
from pathlib import Path

import pytest
from docs.pagerun import blocks

from grpo.recipes import load_recipe

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 150


def test_the_recipe_loads(tmp_path: Path) -> None:
    path = tmp_path / "math.yaml"
    (recipe,) = (block.body for block in blocks(README) if block.language == "yaml")
    path.write_text(recipe)
    loaded = load_recipe(path)
    assert [reward.use for reward in loaded.rewards] == ["math_answer", "brevity.py:reward"]


def test_the_reward_passes_its_cases(run_cli, tmp_path: Path) -> None:
    (reward,) = (block for block in blocks(README) if block.title == "brevity.py")
    (tmp_path / "brevity.py").write_text(reward.body)
    ran = run_cli("rewards", "test", tmp_path / "brevity.py")
    assert ran.code == 0, ran.err
    assert "cases  2 of 2 right" in ran.out


def test_it_names_the_number_of_variants() -> None:
    from grpo.presets import PRESETS

    assert f"one of {len(PRESETS)} published variants" in TEXT


MEASURED = {
    "6.7 ×": "6.7 ×",
    "8.1 ×": "8.1 ×",
    "3.0 ×": "3.00 ×",
    "2.1 ×": "2.08 ×",
    "5.7 ×": "5.73 ×",
    "11.5 ×": "11.5 ×",
}
"""The README's ratios, and how they stand among the measurements."""


@pytest.mark.parametrize("figure", MEASURED)
def test_its_figures_are_among_the_measurements(figure: str) -> None:
    assert figure in TEXT
    assert MEASURED[figure] in (ROOT / "scripts/benchmarks/RESULTS.md").read_text(encoding="utf-8")


def test_every_ratio_is_held_against_a_measurement() -> None:
    assert {f"{number} ×" for number in re.findall(r"\b(\d+\.\d) ×", TEXT)} == set(MEASURED)
