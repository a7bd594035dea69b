"""What the manual's pages show is true: recipes load, rewards score, every variant and every room is named."""

import re
from pathlib import Path

import pytest
from docs.pagerun import PAGES, block

from grpo.recipes import load_recipe


def text(page: str) -> str:
    return (PAGES / page).read_text(encoding="utf-8")


def without(section: str, recipe: str) -> str:
    """A recipe's text without a section."""
    return re.sub(rf"(?m)^{section}: *.*\n(?: .*\n)*", "", recipe)


def test_the_recipe_loads(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(block("recipe.md", "yaml"))
    recipe = load_recipe(path)
    assert [reward.use for reward in recipe.rewards] == ["math_answer", "brevity.py:reward"]


def test_the_recipe_with_conversations_loads(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(block("recipe.md", "yaml") + block("environments.md", "yaml", "environment:"))
    recipe = load_recipe(path)
    assert recipe.conversations[""].max_turns == 20
    assert [(tool.use, tool.timeout) for tool in recipe.tools] == [("tools.py:search", 30), ("calculator", 2)]


@pytest.mark.parametrize(
    ("page", "holds", "section"),
    [("data.md", "sources:", "data"), ("data.md", "mine.py:rows", "data"), ("rewards.md", "model:Skywork", "rewards")],
)
def test_a_part_of_a_recipe_loads(page: str, holds: str, section: str, tmp_path: Path) -> None:
    whole = re.sub(rf"(?m)^{section}: *.*\n(?: .*\n)*", "", block("recipe.md", "yaml"))
    path = tmp_path / "mine.yaml"
    more = "rewards: [{use: math_answer}, {use: python_tests}]\n" if section == "data" else ""
    path.write_text(
        (re.sub(r"(?m)^rewards: *.*\n(?: .*\n)*", "", whole) if more else whole) + more + block(page, "yaml", holds)
    )
    assert load_recipe(path)


def test_the_reward_does_what_it_says() -> None:
    space: dict = {}
    exec(block("rewards.md", "python", "def reward("), space)
    right, wrong, without, long = "The answer is 7.", "It is 8", "I do not know", "So " * 100 + "7"
    scores = space["reward"](completions=[right, wrong, without, long], answer=["7"] * 4, prompts=["?"] * 4)
    assert scores == [1.0, 0.0, None, 1 - (len(long) - 200) / 1000]


def test_the_reward_passes_its_cases(run_cli, tmp_path: Path) -> None:
    (tmp_path / "brevity.py").write_text(block("rewards.md", "python", "def reward("))
    ran = run_cli("rewards", "test", tmp_path / "brevity.py")
    assert ran.code == 0, ran.err
    assert "cases  2 of 2 right" in ran.out


def test_every_bundled_reward_and_tool_is_named() -> None:
    from grpo.plugins import bundled_names

    assert {name for name in bundled_names("rewards", ".py") if f"`{name}`" not in text("rewards.md")} == set()


def test_the_map_has_every_room() -> None:
    package = Path(__file__).parents[2] / "grpo"
    there = [path for path in package.iterdir() if path.is_dir() or path.suffix == ".py"]
    rooms = {path.name.removesuffix(".py") for path in there}
    for room in rooms - {"__init__", "__pycache__", "_bundled"}:
        assert re.search(rf"^  .*\b{room}(/|\.py)", text("contributing/architecture.md"), re.MULTILINE), room


def test_every_variant_is_named() -> None:
    from grpo.presets import PRESETS

    assert {name for name in PRESETS if f"`{name}`" not in text("loss.md")} == set()


def test_the_loop_is_25_lines_and_the_names_are_there() -> None:
    import grpo

    loop = block("python.md", "python", "import grpo\n")
    assert len([line for line in loop.splitlines() if line.strip()]) <= 25
    assert set(re.findall(r"grpo\.(\w+)", loop + block("python.md", "py"))) <= set(grpo.__all__)
