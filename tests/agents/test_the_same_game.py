"""Built-in tasks by their environments and by agents with OpenAI's client: the same rollouts, token for token."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("openai")

from agency import Client
from twins import Twins, check_same, make_student

from grpo.builtin import models
from grpo.builtin.playing import tools_of
from grpo.builtin.shop import SHOP
from grpo.generation.sampling import Sampling
from grpo.model.mlxlm import new_model
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


@pytest.mark.slow
def test_an_agent_with_tools_makes_the_rollouts_of_its_environment(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shop, whose student calls tools, and goes on with their results."""
    import openai

    monkeypatch.setenv("GRPO_CACHE", str(cache))
    rows = [SHOP.row(problem) for problem in SHOP.problems("test")[:3]]
    twins = Twins(models.folder("builtin:shop-student", new_model), "shop", rows)

    def buys(client: Client) -> None:
        assert SHOP.environment is not None
        shop = SHOP.environment()
        shop.reset(**client.columns)
        tools, messages = tools_of(shop, SHOP.tools), [{"role": "user", "content": client.columns["question"]}]
        with openai.OpenAI(base_url=client.base_url, api_key=client.api_key) as asking:
            while True:
                answer = asking.chat.completions.create(model="policy", messages=messages, tools=twins.tools)
                message = answer.choices[0].message
                messages.append(message.model_dump())
                if not message.tool_calls:
                    return
                for call in message.tool_calls:
                    result = tools[call.function.name](**json.loads(call.function.arguments))
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})

    sampling = Sampling(1.0, 160)
    ours, theirs = twins.by_the_environment(sampling), twins.by_the_agent(buys, sampling)
    ends = []
    for one, other in zip(ours, theirs, strict=True):
        mine, agents = one.trajectory, other.trajectory
        assert mine.conversation is not None
        if mine.conversation.failed_calls or mine.finish_reason != "stop":
            continue  # tools that fail are told of in words that this agent does not have
        assert agents.conversation is not None
        assert agents.conversation.failure is None, agents.conversation.failure
        assert (agents.token_ids, agents.trained) == (mine.token_ids, mine.trained)
        assert agents.behaviour == pytest.approx(mine.behaviour, abs=1e-5)
        ends.append(mine.conversation.calls)
    assert len(ends) > 15
    assert {1, 2} <= set(ends)
