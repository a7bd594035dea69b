"""What the README shows is true: its recipe loads, its reward runs, its map has every room."""

import re
from pathlib import Path

from grpo.recipes import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(language: str, holds: str = "") -> str:
    (found,) = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if holds in text]
    return found


def test_the_recipe_loads(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(block("yaml", "rewards:"))
    recipe = load_recipe(path)
    assert [reward.use for reward in recipe.rewards] == ["math_answer", "brevity.py:reward"]


def test_the_recipe_with_conversations_loads(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(block("yaml", "rewards:") + block("yaml", "environment:"))
    recipe = load_recipe(path)
    assert recipe.conversations[""].max_turns == 20
    assert [(tool.use, tool.timeout) for tool in recipe.tools] == [("tools.py:search", 30), ("calculator", 2)]


def test_the_reward_does_what_it_says() -> None:
    space: dict = {}
    exec(block("python", "def reward("), space)
    right, wrong, without, long = "The answer is 7.", "It is 8", "I do not know", "So " * 100 + "7"
    scores = space["reward"](completions=[right, wrong, without, long], answer=["7"] * 4, prompts=["?"] * 4)
    assert scores == [1.0, 0.0, None, 1 - (len(long) - 200) / 1000]


def test_the_reward_passes_its_cases(run_cli, tmp_path: Path) -> None:
    (tmp_path / "brevity.py").write_text(block("python", "def reward("))
    ran = run_cli("rewards", "test", tmp_path / "brevity.py")
    assert ran.code == 0, ran.err
    assert "cases  2 of 2 right" in ran.out


def test_the_map_has_every_room() -> None:
    there = [path for path in (ROOT / "grpo").iterdir() if path.is_dir() or path.suffix == ".py"]
    rooms = {path.name.removesuffix(".py") for path in there}
    for room in rooms - {"__init__", "__pycache__", "_bundled"}:
        assert re.search(rf"^  .*\b{room}(/|\.py)", README, re.MULTILINE), room


def test_every_variant_is_named() -> None:
    from grpo.presets import PRESETS

    assert all(f"`{name}`" in README for name in PRESETS)


def test_the_loop_is_25_lines_and_the_names_are_there() -> None:
    import grpo

    loop = block("python", "import grpo\n")
    assert len([line for line in loop.splitlines() if line.strip()]) <= 25
    assert set(re.findall(r"grpo\.(\w+)", loop + block("py"))) <= set(grpo.__all__)
