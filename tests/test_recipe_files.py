"""The Python files beside the recipes: a game, a search, and what is made of them."""

import asyncio
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo.builtin.tasks import rows
from grpo.config import EnvironmentConfig, Recipe
from grpo.environments.making import make_host
from grpo.plugins import bundled, find_function
from grpo.recipes import load_recipe

RECIPES = bundled("recipes")
GUIDE = bundled("docs/pages/tutorials") / "environments.md"


def loaded(use: str):
    return find_function(str(RECIPES / use), "file", True)


def schemas(cfg: Recipe) -> list[str]:
    """The names of the tools that a recipe's model is told of."""
    (conversation,) = cfg.conversations.values()
    given = None if conversation.use is None else find_function(conversation.use, "environment", True)
    functions = [find_function(tool.use, "tool", True) if ".py" in tool.use else None for tool in cfg.tools]
    host = make_host(conversation, cfg.tools, given=given, functions=functions)
    try:
        return [tool["function"]["name"] for tool in host.description.tools]
    finally:
        host.close()


@pytest.mark.parametrize(("name", "tools"), [("qwen3-2048", ["move"]), ("search-files", ["search"])])
def test_the_model_is_told_of_the_tools(name: str, tools: list[str]) -> None:
    assert schemas(load_recipe(RECIPES / f"{name}.yaml")) == tools


def test_2048_by_hand() -> None:
    game = loaded("game_2048.py:Game2048")()
    assert re.fullmatch(r"\n\n([.2 4]{7}\n){3}[.2 4]{7}", game.reset(board_seed=3, prompt=[]))
    game._board = [[2, 2, 4, 0], [4, 0, 4, 2], [2, 2, 2, 2], [0, 0, 0, 0]]
    assert game._moved("left") == [[4, 4, 0, 0], [8, 2, 0, 0], [4, 4, 0, 0], [0, 0, 0, 0]]
    assert game._moved("right") == [[0, 0, 4, 4], [0, 0, 8, 2], [0, 0, 4, 4], [0, 0, 0, 0]]
    assert game._moved("up") == [[2, 4, 8, 4], [4, 0, 2, 0], [2, 0, 0, 0], [0, 0, 0, 0]]
    assert game._moved("down") == [[0, 0, 0, 0], [2, 0, 0, 0], [4, 0, 8, 0], [2, 4, 2, 4]]
    assert game.get_reward() == 4 / 64
    game._board = [[32, 32, 0, 0], [0] * 4, [0] * 4, [0] * 4]
    assert "You have won" in game.move("left")
    assert game.get_reward() == 1.0
    game._board = [[64, 2, 0, 0], [0] * 4, [0] * 4, [0] * 4]
    with pytest.raises(ValueError, match="Nothing can slide left"):
        game.move("left")
    with pytest.raises(ValueError, match="no direction 'north'"):
        game.move("north")
    game._board = [[2, 4, 8, 0], [4, 8, 16, 2], [2, 4, 8, 16], [4, 8, 16, 2]]
    game._add = lambda: game._board[0].__setitem__(0, 16)
    assert game.move("right").startswith("16 2 4 8\n4 8 16 2\n")
    assert game.get_reward() == 0.25
    game._board[0] = [2, 4, 8, 0]
    assert game.move("right").endswith("The game is over.")


def test_games_of_a_row_begin_alike_and_those_held_out_are_others() -> None:
    boards, game = loaded("game_2048.py:boards"), loaded("game_2048.py:Game2048")()
    train, test = boards("train"), boards("test")
    assert game.reset(**train[5]) == game.reset(**train[5]) != game.reset(**train[6])
    assert not {row["board_seed"] for row in train} & {row["board_seed"] for row in test}


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A folder with files to search."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.md").write_text("# Head\n\nThe yellow house stands behind seven linden trees.\n")
    (tmp_path / "b.md").write_text("".join(f"Number {n} of many similar lines follows another.\n" for n in range(20)))
    (tmp_path / "c.txt").write_text("The yellow house is elsewhere.")
    return tmp_path


def test_the_search_finds_what_questions_ask(notes: Path) -> None:
    files = loaded("search_files.py:Files")(str(notes))
    assert files.search("House YELLOW") == "a.md:3: The yellow house stands behind seven linden trees."
    assert files.search("similar").endswith("(15 more)")
    assert files.search("blue house") == "nothing"
    with pytest.raises(ValueError, match="no words"):
        files.search("  ")
    questions = loaded("search_files.py:questions")
    train, test = questions("train", str(notes)), questions("test", str(notes))
    assert train
    assert test
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    for row in [*train, *test]:
        line = re.search(r"____:\n\n(.+)\n", row["prompt"])[1]
        found = files.search(" ".join(word for word in line.split() if "____" not in word))
        assert line.replace("____", row["answer"]) in found


def test_the_recipes_have_enough_to_ask() -> None:
    questions = loaded("search_files.py:questions")
    assert len(questions("train", pattern="*.yaml")) > 100
    assert len(questions("test", pattern="*.yaml")) > 16


def test_the_guides_recipe_and_environment_are_what_it_says(tmp_path: Path) -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    code, recipe = (re.search(rf"```{kind}[^\n]*\n(.+?)```", guide, re.DOTALL)[1] for kind in ("python", "yaml"))
    (tmp_path / "shop.py").write_text(code)
    (tmp_path / "shop.yaml").write_text(recipe)
    assert schemas(load_recipe(tmp_path / "shop.yaml")) == ["calculator", "price"]
    learning = load_recipe(RECIPES / "learning" / "shop.yaml")
    assert load_recipe(tmp_path / "shop.yaml").optim == learning.optim


@pytest.mark.parametrize("task", ["guess", "shop", "walk"])
def test_the_guide_names_the_columns_of_the_built_in_tasks(task: str) -> None:
    guide = " ".join(GUIDE.read_text(encoding="utf-8").split())
    columns = [f"`{name}`" for name in rows(f"builtin:{task}", "test")[0] if name != "question"]
    named = " and ".join(filter(None, [", ".join(columns[:-1]), columns[-1]]))
    assert f"`builtin:{task}` {named}" in guide


def test_the_agent_plays_as_the_environment_lets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a client that always moves to the left, then says that it has had enough."""
    agent = loaded("agent_2048.py:run")
    module = sys.modules[agent.__module__]
    row = loaded("game_2048.py:boards")("train")[3]
    asked = []

    class Client:
        def __init__(self, **_) -> None:
            self.chat = SimpleNamespace(completions=self)

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_) -> None: ...

        async def create(self, messages, tools, **_):
            asked.append(list(messages))
            called = SimpleNamespace(name="move", arguments='{"direction": "left"}')
            calls = [SimpleNamespace(id="1", function=called)] if len(asked) < 4 else None
            message = SimpleNamespace(tool_calls=calls, model_dump=lambda **_: {"role": "assistant"})
            return SimpleNamespace(choices=[SimpleNamespace(message=message)])

    monkeypatch.setattr(module.openai, "AsyncOpenAI", Client)
    played = asyncio.run(agent(row, "", ""))
    game = loaded("game_2048.py:Game2048")()
    first = row["prompt"][-1]["content"] + game.reset(**row)
    assert asked[0] == [{"role": "user", "content": first}]
    said = [message["content"] for message in asked[-1] if message["role"] == "tool"]
    assert said[0] == module.played(game, SimpleNamespace(name="move", arguments='{"direction": "left"}'))
    assert played["moves"] == 3
    assert played["reward"] > 0
    wrong = SimpleNamespace(name="move", arguments='{"way": 1}')
    assert "error" in module.played(game, wrong)


def test_the_guides_agent_takes_what_it_is_given(tmp_path: Path) -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    (tmp_path / "agent.py").write_text(re.findall(r"```python[^\n]*\n(.+?)```", guide, re.DOTALL)[1])
    host = make_host(EnvironmentConfig(agent=f"{tmp_path}/agent.py:run"))
    try:
        assert host.problem(["prompt", "question", "answer"]) is None
        assert "missing a required argument: 'answer'" in host.problem(["prompt", "question"])
    finally:
        host.close()
