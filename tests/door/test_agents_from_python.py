"""Agents as Python functions: they run in this process, and a run with them is a run like any other."""

import os
from pathlib import Path

import pytest
from openai import AsyncOpenAI
from runs.agents import asking  # noqa: F401

import grpo
from grpo.runs.completions import read_completions, stored_steps

LIVED: list[int] = []


async def run(data, base_url, api_key, question):
    LIVED.append(os.getpid())
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        asked = [{"role": "user", "content": question}]
        answer = await client.chat.completions.create(model="policy", messages=asked)
    return {"reward": len(answer.choices[0].message.content) / 10, "asked": 1}


def conversations(folder: str) -> list:
    groups = [group for path in stored_steps(Path(folder) / "completions") for group in read_completions(path)[1]]
    return [rollout.trajectory.conversation for group in groups for rollout in group.rollouts]


def test_a_function_in_the_place_of_what_the_recipe_names(asking: Path) -> None:  # noqa: F811
    LIVED.clear()
    cfg = grpo.recipe(asking, output_dir="run", steps=1, environment={"agent": "play.py:run"})
    with grpo.Trainer(cfg, environment={"agent": run, "name": "asker", "max_turns": 3}, quiet=True) as trainer:
        assert trainer.recipe.environment.max_turns == 3
        assert trainer.train().why == "finished"
    assert set(LIVED) == {os.getpid()}
    talks = conversations("run")
    assert all(talk.failure is None and len(talk.messages) == 1 for talk in talks)
    assert trainer.history[0]["environment/asker/asked"] == 1.0
    assert "rewards/asker/mean" in trainer.history[0]


def test_names_and_programs_from_python(asking: Path) -> None:  # noqa: F811
    named = grpo.Trainer(asking, environment={"agent": "play.py:once"}, quiet=True).recipe.environment
    assert named.agent == "play.py:once"
    program = grpo.Trainer(asking, environment={"command": ["python", "play.py"]}, quiet=True).recipe.environment
    assert (program.agent, program.command) == (None, ("python", "play.py"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"agent": object()}, "environment: expected a class, a function"),
        ({"agent": run, "workers": 2}, "environment.workers does nothing for Python objects"),
        ({"agent": run, "sandbox": True}, "sandbox does nothing with agent"),
    ],
)
def test_what_does_nothing_is_refused(asking: Path, given: dict, said: str) -> None:  # noqa: F811
    with pytest.raises(grpo.UserError, match=said), grpo.Trainer(asking, environment=given, quiet=True) as trainer:
        trainer.train()
