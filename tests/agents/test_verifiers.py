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
    check_same(ours, theirs, messages=False)  # it asks by tokens
    traced = {(*branch.token_ids,) for trace in seen for branch in trace.branches}
    assert len(traced) == len(ours)
    for one in ours:
        assert any(ids[-len(one.trajectory.token_ids) :] == one.trajectory.token_ids for ids in traced)
