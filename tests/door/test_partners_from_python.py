"""Environments and tools as Python objects: they live in this process, and a run with them is a run like any other."""

import os
import random
from pathlib import Path

import pytest
from runs.conversing import calls_first_tool, talker

import grpo
from grpo.environments.chat import Chat
from grpo.runs.completions import read_completions, stored_steps

LIVED: list[int] = []


class Game:
    """A game of one move."""

    def reset(self, **row):
        LIVED.append(os.getpid())
        self.score = 0.0

    def move(self, where: str) -> grpo.Step:
        """
        Moves.

        Args:
            where: Where to.
        """
        self.score = random.random()
        return grpo.Step("moved", reward=self.score, done=True)

    def get_reward(self):
        return 1.0


class Doubts:
    """Answers as the user does."""

    def step(self, text):
        return "Sure?"


def look(query: str) -> str:
    """
    Looks something up.

    Args:
        query: What.
    """
    return f"found {query}"


class Own:
    """Makes trajectories by itself."""

    async def rollout(self, task, sampler):
        return await sampler.sample(task.prompt_ids, sampler.n)


def best(completions, environments, **columns):
    return [environment.score for environment in environments]


@pytest.fixture
def talking(recipe: Path, toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    talker(toy_folder, Path("talker"))
    monkeypatch.setattr(Chat, "parse", calls_first_tool)
    Path("digits.py").write_text(
        "def reward(completions, **_):\n    return [float(len(str(c))) for c in completions]\n"
    )
    recipe.write_text(recipe.read_text().replace(str(toy_folder), "talker").replace("length: 8", "length: 48"))
    return recipe


def conversations(folder: str = "runs/toy") -> list:
    groups = [group for path in stored_steps(Path(folder) / "completions") for group in read_completions(path)[1]]
    return [rollout for group in groups for rollout in group.rollouts]


def test_a_class_and_a_reward_that_takes_environments(talking: Path) -> None:
    LIVED.clear()
    with grpo.Trainer(talking, environment={"use": Game, "max_turns": 2}, rewards=[best], quiet=True) as trainer:
        assert trainer.train().why == "finished"
    assert set(LIVED) == {os.getpid()}
    rows = conversations()
    moved = [row for row in rows if row.trajectory.conversation.calls]
    assert moved
    for row in moved:
        talk = row.trajectory.conversation
        assert row.trajectory.finish_reason == "done"
        assert row.scores["Game"] == pytest.approx(talk.turn_rewards[-1] + 1)
        assert row.scores["best"] == talk.turn_rewards[-1]
    assert "rewards/Game/mean" in trainer.history[0]


def test_tools_alone_and_beside_an_environment(talking: Path) -> None:
    cfg = grpo.recipe(talking, output_dir="alone", steps=1, max_completion_length=160)
    with grpo.Trainer(cfg, tools=[look], quiet=True) as trainer:
        trainer.train()
    said = [message for row in conversations("alone") for message in row.trajectory.conversation.messages]
    assert {message["content"] for message in said if message["role"] == "tool"} == {"found 1"}
    cfg = grpo.recipe(talking, output_dir="beside", steps=1)
    with grpo.Trainer(
        cfg, environment=Doubts, tools=[{"use": look, "timeout": 2}, "calculator"], quiet=True
    ) as trainer:
        assert [tool.timeout for tool in trainer.recipe.tools] == [2, 30]
        trainer.train()


def test_several_by_the_column(talking: Path) -> None:
    rows = [{"question": f"{i}?", "environment": "game" if i % 2 else "doubts"} for i in range(4)]
    environments = {"game": Game, "doubts": {"use": Doubts, "max_turns": 2}}
    with grpo.Trainer(talking, data=rows, environments=environments, quiet=True) as trainer:
        trainer.train()
    assert {row.trajectory.conversation.environment for row in conversations()} == {"Game", "Doubts"}


def test_an_object_that_samples_by_itself(talking: Path) -> None:
    Path("digits.py").write_text(
        "def reward(completions, **_):\n    return [float(len(str(c))) for c in completions]\n"
    )
    for given in (Own, Own()):
        with grpo.Trainer(talking, environment=given, quiet=True) as trainer:
            trainer.train(overwrite=True)
        assert trainer.history[-1]["step"] == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"environment": object()}, r"grpo.Trainer: environment: expected a class, a function .*got an object"),
        ({"environment": Doubts()}, r"environment: expected a class, a function .*got a Doubts"),
        (
            {"environment": {"max_turns": 3}},
            "environment: expected a dict with use, as in a recipe, got one with m",
        ),
        ({"environments": [Game]}, "environments: expected a dict of classes by name, got a list"),
        ({"environment": Game, "environments": {"a": Game}}, "environment does nothing with environments"),
        ({"tools": look}, "tools: expected a list of functions, classes and names, got a function"),
        ({"tools": [3]}, 'tools: expected a function, a class, or a name such as "file.py:name", got an int'),
        ({"environment": {"use": Game, "max_turn": 3}}, "unknown key environment.max_turn. Did you mean"),
    ],
)
def test_what_is_no_environment_and_no_tool(talking: Path, given: dict, said: str) -> None:
    with pytest.raises(grpo.UserError, match=said):
        grpo.Trainer(talking, **given)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rewards=[]", "rewards: the run needs a reward with a weight: the"),
        ("advantage.turns=turn", "turn does nothing: the env"),
    ],
)
def test_a_rollout_of_one_s_own_gives_no_rewards(talking: Path, run_cli, override: str, said: str) -> None:
    Path("own.py").write_text("from test_partners_from_python import Own\n")
    ran = run_cli("train", talking, "environment.use=own.py:Own", override)
    assert (ran.code, said in ran.err) == (2, True)


def test_what_other_processes_can_try_is_told_at_the_end_and_nothing_else(talking: Path, capsys) -> None:
    """`grpo generate` has no objects of this session; a class that it can import it has."""
    cfg = grpo.recipe(talking, steps=1)
    own = type("Mine", (Game,), {"__module__": "__main__"})
    row = {"question": "1?"}
    for given, said in (({"environment": Game}, True), ({"environment": own}, False), ({"data": [row] * 4}, False)):
        with grpo.Trainer(cfg, **({"environment": Game} | given)) as trainer:
            trainer.train(overwrite=True)
        told = capsys.readouterr().out
        assert "adapter  runs/toy" in told
        assert ("try it   grpo generate runs/toy --row 0" in told) == said
        assert ("try it" in told) == said
