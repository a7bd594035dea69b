"""Rollouts of agents: what they were answered is what is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from agency import QUESTION, Agency, Client, agency

from grpo.types import Group, Trajectory


@pytest.fixture(scope="module")
def office(toy_folder: Path) -> Iterator[Agency]:
    with agency(toy_folder) as found:
        yield found


def parts_of(group: Group) -> list[tuple[tuple[int, ...], Trajectory]]:
    """Each row's prompt and what was sampled after it, by rollout."""
    shared = group.task.prompt_ids
    found = []
    for rollout in group.rollouts:
        for part in rollout.trajectory.parts:
            own = part.trained.index(True)
            found.append(((*shared, *part.token_ids[:own]), part))
    return found


def worst_gap(model: Any, groups: list[Group]) -> float:
    """The largest difference of a trained token's logprob from what a plain forward pass over the row says."""
    gaps = []
    for group in groups:
        shared = group.task.prompt_ids
        for rollout in group.rollouts:
            for row in rollout.trajectory.parts:
                logits = model(mx.array([[*shared, *row.token_ids]]))[0, len(shared) - 1 : -1].astype(mx.float32)
                forced = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                own = mx.take_along_axis(forced, mx.array(row.token_ids)[:, None], axis=1)[:, 0]
                gaps.append((mx.abs(own - mx.array(row.behaviour)) * mx.array(row.trained)).max().item())
    return max(gaps)


def asks_once(client: Client) -> float:
    client.chat(QUESTION)
    return 1.0


def turns(client: Client, count: int = 3, most: int = 5) -> float:
    """Each turn follows from all before, by tokens."""
    ids = client.tokens(client_prompt(client), max_tokens=most)
    for turn in range(count - 1):
        before = [*ids["prompt_token_ids"], *ids["choices"][0]["token_ids"]]
        ids = client.tokens([*before, 20 + turn, 21], max_tokens=most)
    return 0.5


def begins(whole: list[int], part: list[int]) -> bool:
    return whole[: len(part)] == part


def client_prompt(client: Client) -> list[int]:
    return [11, 12, 13, 14 + client.columns["place"]]


def test_what_was_answered_is_what_is_trained_on(office: Agency) -> None:
    host = office.host(asks_once)
    groups = office.roll(host, n=3, tasks=2)
    rollouts = [rollout.trajectory for group in groups for rollout in group.rollouts]
    answers = [client.answers[0] for client in host.clients]
    told = sorted((answer["prompt_token_ids"], answer["choices"][0]["token_ids"]) for answer in answers)
    assert told == sorted((list(office.prompt), list(one.token_ids)) for one in rollouts)
    logprobs = {
        tuple(answer["choices"][0]["token_ids"]): [t["logprob"] for t in answer["choices"][0]["logprobs"]["content"]]
        for answer in answers
    }
    for one in rollouts:
        assert list(one.behaviour) == logprobs[one.token_ids]
        assert all(one.trained)
        assert one.conversation.reward == 1.0
        assert one.conversation.prompt == tuple(QUESTION)
        assert [message["role"] for message in one.conversation.messages] == ["assistant"]
    assert {group.task.prompt_ids for group in groups} == {office.prompt}
    assert worst_gap(office.model, groups) < 1e-4
    assert all(seat.released == 1 for seat in host.all)


def test_turns_that_extend_are_one_row(office: Agency) -> None:
    host = office.host(turns)
    groups = office.roll(host, n=2, tasks=2)
    assert worst_gap(office.model, groups) < 1e-4
    for group in groups:
        for rollout in group.rollouts:
            one = rollout.trajectory
            assert one.begins == ()
            assert one.turns == 3
            whole = [*group.task.prompt_ids, *one.token_ids]
            (client,) = [c for c in host.clients if begins(whole, c.answers[-1]["prompt_token_ids"])]
            assert whole == [*client.answers[-1]["prompt_token_ids"], *client.answers[-1]["choices"][0]["token_ids"]]
            untrained = [token for token, trained in zip(one.token_ids, one.trained, strict=True) if not trained]
            assert untrained == [20, 21, 21, 21]
            told = [t["logprob"] for a in client.answers for t in a["choices"][0]["logprobs"]["content"]]
            assert one.of_trained(one.behaviour) == told
