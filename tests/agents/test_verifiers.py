"""An environment of verifiers with its own training client, where the package is installed: it trains as ours does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("verifiers", reason="verifiers is not installed")

from agency import Client
from twins import Twins, check_same, make_student

from grpo.environments.loops import run_in_thread, stop
from grpo.generation.sampling import Sampling
from grpo.types import Rollout


def test_its_rollouts_are_those_of_our_environment(tmp_path: Path) -> None:
    import number_game

    make_student(tmp_path)
    twins, seen = Twins(tmp_path), []
    loop, thread = run_in_thread("verifiers")  # it shares renderers among the games of a loop

    def plays(client: Client) -> float:
        number = client.columns["number"]
        game = number_game.played(number, client.base_url, client.api_key, str(tmp_path))
        seen.append(asyncio.run_coroutine_threadsafe(game, loop).result(60))
        return seen[-1].reward

    sampling = Sampling(1.0, 200)
    ours = twins.by_the_environment(sampling, n=2)
    try:
        theirs = twins.by_the_agent(plays, sampling, n=2)
    finally:
        stop(loop, thread)
    for one, other in zip(ours, theirs, strict=True):
        if in_characters(one):
            check_same([one], [other], messages=False)  # it asks by tokens
        else:
            check_begun_anew(one, other)
    assert any(map(in_characters, ours))
    traced = [tuple(branch.token_ids) for trace in seen for branch in trace.branches]
    for one in filter(in_characters, ours):
        ids = one.trajectory.token_ids
        assert any(trace[-len(ids) :] == ids for trace in traced)


def in_characters(rollout: Rollout) -> bool:
    """Whether all that was said is text. Of a template that it does not know verifiers renders the whole conversation
    for each turn, and bytes that are no character are not what they were then."""
    assert rollout.trajectory.conversation is not None
    return not any("\ufffd" in message["content"] for message in rollout.trajectory.conversation.messages[:-1])


def check_begun_anew(ours: Rollout, theirs: Rollout) -> None:
    """What was said up to there is the same row, and what was said after it is in a row of its own."""
    mine, agents = ours.trajectory, theirs.trajectory
    assert agents.begins
    first = agents.begins[0]
    assert (agents.token_ids[:first], agents.trained[:first]) == (mine.token_ids[:first], mine.trained[:first])
    assert not agents.trained[first]
