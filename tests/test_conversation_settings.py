"""How a recipe says whom the model talks to, and what it may call."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo.errors import UserError
from grpo.recipes import dump_recipe, load_recipe, with_settings

HEAD = "model: {name: some/model}\ndata: {source: some/data}\noptim: {steps: 1}\n"


def load(folder: Path, text: str, *overrides: str):
    path = folder / "mine.yaml"
    path.write_text(HEAD + text)
    return load_recipe(path, overrides)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(folder, text, *overrides)
    return str(error.value)


ALL = """environments:
  chess: {use: "room.py:Chess", max_turns: 9}
  cards: {use: "package.cards:Cards"}
tools: ["tools.py:search", {use: calculator, timeout: 2}]
"""


def test_code_is_found_beside_the_recipe(tmp_path: Path) -> None:
    for name in ("room.py", "tools.py"):
        (tmp_path / name).write_text("")
    cfg = load(tmp_path, ALL)
    assert {name: one.use for name, one in cfg.environments.items()} == {
        "chess": f"{tmp_path}/room.py:Chess",
        "cards": "package.cards:Cards",
    }
    assert [tool.use for tool in cfg.tools] == [f"{tmp_path}/tools.py:search", "calculator"]
    assert cfg.uses == [f"{tmp_path}/room.py:Chess", "package.cards:Cards", f"{tmp_path}/tools.py:search", "calculator"]
    alone = load(tmp_path, 'environment: {use: "room.py:Chess"}\n')
    assert alone.conversations[""].use == f"{tmp_path}/room.py:Chess"


def test_a_resolved_recipe_reads_back(tmp_path: Path) -> None:
    cfg = load(tmp_path, ALL)
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(cfg))
    assert load_recipe(again) == cfg


def test_a_text_is_a_tool_by_its_use_wherever_it_stands(tmp_path: Path) -> None:
    """In the file, on the command line, under a setting of its own, and from Python."""
    plain = load(tmp_path, "rewards: [{use: exact}]\n")
    cfg = load(tmp_path, "rewards: [{use: exact}]\n", "tools=[calculator, python]", "tools.1.timeout=5")
    assert [(tool.use, tool.timeout) for tool in cfg.tools] == [("calculator", 30.0), ("python", 5.0)]
    assert with_settings(plain, {"tools": ["calculator"]}).tools == cfg.tools[:1]
    assert "tools.2.timeout in the recipe: the list has only the items 0 to 1" in refusal(
        tmp_path, "rewards: [{use: exact}]\n", "tools=[calculator, python]", "tools.2.timeout=5"
    )


def test_limits_on_the_command_line(tmp_path: Path) -> None:
    text = "rewards: [{use: exact}]\ntools: [calculator]\n"
    cfg = load(tmp_path, text, "environment.max_turns=5")
    assert cfg.conversations[""].max_turns == 5
    assert load(tmp_path, ALL, "environments.cards.max_turns=5").environments["cards"].max_turns == 5


@pytest.mark.parametrize(
    ("text", "override", "said"),
    [
        (
            "rewards: [{use: exact}]\n",
            "environment.max_turns=5",
            "environment.use is missing: name a class, or add tools",
        ),
        (
            "environment: game.py:Game\n",
            "seed=1",
            'environment: expected keys and values, got "game.py:Game". Write {u',
        ),
        ("tools: calculator\n", "seed=1", 'tools: expected a list, got "calculator". Write tools: ["calculator"]'),
        ("rewards: [{use: exact}]\ntools: [3]\n", "seed=1", "tools.0: expected keys and values, got 3."),
        (ALL, "environment={use: a.py:A}", "environment does nothing with environments"),
        (ALL, "environments.chess.use=null", "environments.chess: name a class with `use`"),
        (ALL, "environments.chess.max_turns=0", "environments.chess.max_turns: expected greater than 0, got 0"),
        (ALL, "environments.chess.turns=3", "unknown key environments.chess.turns. Did you mean"),
        (ALL, "rollout.environment=a.py:A", "It is now environment.use: write environment: {use:"),
        ("rewards: [{use: exact}]\ntools: [python]\n", "environment.kwargs={a: 1}", "kwargs does nothing without use"),
        ("rewards: [{use: exact}]\n", "advantage.turns=turn", "advantage.turns: turn does nothing without environment"),
        ("tools: [python]\n", "seed=1", "rewards: a run needs at least one"),
    ],
)
def test_what_does_nothing_or_is_misspelt_is_refused(tmp_path: Path, text: str, override: str, said: str) -> None:
    assert said in refusal(tmp_path, text, override)


def test_recipes_of_earlier_runs_are_read(tmp_path: Path) -> None:
    """Each run has its recipe written out, and `rollout.environment: single_turn` was a setting."""
    old = "rewards: [{use: exact}]\nrollout: {environment: single_turn, top_k: 3}\n"
    assert load(tmp_path, old) == load(tmp_path, "rewards: [{use: exact}]\nrollout: {top_k: 3}\n")
    assert "mine.yaml:5: unknown key rollout.environment. It is now environment.use" in refusal(
        tmp_path, 'rewards: [{use: exact}]\nrollout: {environment: "room.py:Room"}\n'
    )


AGENT = 'environment: {agent: "play.py:run"}\n'


def test_an_agent_and_a_command_are_found_beside_the_recipe(tmp_path: Path) -> None:
    for name in ("play.py", "play.js", "python", "-x.py"):
        (tmp_path / name).write_text("")
    (alone,) = load(tmp_path, AGENT).conversations.values()
    assert (alone.agent, alone.called, alone.is_agent) == (f"{tmp_path}/play.py:run", "play", True)
    cfg = load(tmp_path, 'environments: {a: {command: [python, play.js, "-x.py", gone.js]}, b: {agent: "m.n:go"}}\n')
    assert cfg.environments["a"].command == ("python", f"{tmp_path}/play.js", "-x.py", "gone.js")
    assert [one.called for one in cfg.environments.values()] == ["play", "go"]
    assert cfg.uses == [f"{tmp_path}/play.js", "gone.js", "m.n:go"]
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(cfg))
    assert load_recipe(again) == cfg


def test_a_link_in_a_command_keeps_its_name(tmp_path: Path) -> None:
    """The Python of a virtual environment is one, and knows by its name where the packages are."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to("/bin/sh")
    cfg = load(tmp_path, "environment: {command: [bin/python, ../x.py]}\n")
    assert cfg.environment.command == (f"{tmp_path}/bin/python", "../x.py")


@pytest.mark.parametrize(
    ("section", "called"),
    [
        ('{agent: "pkg.play:run"}', "play"),
        ('{agent: "play.py"}', "play"),
        ('{agent: "pkg.play:go"}', "go"),
        ('{agent: "pkg.play:go", name: mine}', "mine"),
        ("{command: [python, -m, play]}", "python"),
        ("{command: [./solve, row.json]}", "row"),
        ("{command: [./solve]}", "solve"),
    ],
)
def test_what_agents_go_by(tmp_path: Path, section: str, called: str) -> None:
    assert load(tmp_path, f"environment: {section}\n").conversations[""].called == called


def test_thinking_is_dropped_with_agents_unless_they_say_otherwise(tmp_path: Path) -> None:
    """As at every endpoint; environments keep it. What is written down is read back."""
    agent = load(tmp_path, AGENT)
    assert agent.conversations[""].thinking == "drop"
    assert load(tmp_path, AGENT, "environment.env=[A]", "environment.thinking=keep").environment.thinking == "keep"
    assert load(tmp_path, 'environment: {use: "a.py:A"}\n').conversations[""].thinking == "keep"
    assert with_settings(agent, {"environment.max_turns": 3}).environment.thinking == "drop"


def test_agents_have_an_hour(tmp_path: Path) -> None:
    assert load(tmp_path, AGENT).environment.agent_seconds == 3600.0
    assert load(tmp_path, AGENT, "environment.rollout_timeout=5").environment.agent_seconds == 5.0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("environment.use=a.py:A", "use and agent each name an environment"),
        ("environment.command=[a]", "agent and command each name an environment"),
        ("environment={command: []}", "command: name a program"),
        ("environment={command: ['']}", "command: name a program"),
        ("environment={command: [a], kwargs: {b: 1}}", "kwargs does nothing with command"),
        ("environment.max_tool_calls=1", "max_tool_calls does nothing with agent: an agent runs its tools itself"),
        ("environment.timeout=1", "timeout does nothing with agent: an agent is called once"),
        ("environment.reset_timeout=1", "reset_timeout does nothing with agent: an agent has no reset"),
        ("environment.sandbox=true", "sandbox does nothing with agent: the sandbox has no network"),
        ("tools=[calculator]", "tools do nothing with environment: an agent has its own tools"),
        ("advantage.turns=turn", "advantage.turns: turn does nothing with an agent"),
        ("environment.weight=0", "environment.weight: every reward has weight 0"),
        ("environment.agent=3", "environment.agent: expected a valid string, got 3"),
    ],
)
def test_what_does_nothing_with_agents_is_refused(tmp_path: Path, override: str, said: str) -> None:
    assert said in refusal(tmp_path, AGENT, override)


def test_agents_and_other_environments_do_not_mix(tmp_path: Path) -> None:
    both = 'environments: {a: {agent: "a.py:run"}, b: {use: "b.py:B"}}\n'
    assert "environments.a is an agent, and another environment is not" in refusal(tmp_path, both)
