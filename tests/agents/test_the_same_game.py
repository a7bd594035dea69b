"""A game as an environment and as an agent by OpenAI's client: the same rollouts, token for token."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("openai")

from agency import Client
from twins import Twins, check_same, make_student

from grpo.generation.sampling import Sampling
from grpo.plugins import bundled, find_function

run = find_function(f"{bundled('recipes')}/learning/guess_agent.py:run", "agent", True)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    folder = tmp_path_factory.mktemp("guess")
    make_student(folder)
    return Twins(folder)


def plays(client: Client) -> float:
    return asyncio.run(run(client.columns, client.base_url, client.api_key))


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_the_agent_makes_the_rollouts_of_its_environment(twins: Twins, temperature: float) -> None:
    """With few tokens for each, so that some turns are cut, and some conversations have no room to go on."""
    sampling = Sampling(1.0, 48)
    ours = twins.by_the_environment(sampling, temperature)
    check_same(ours, twins.by_the_agent(plays, sampling, temperature))
    ends = [one.trajectory.finish_reason for one in ours]
    assert set(ends) == ({"done", "length"} if temperature else {"done"})
