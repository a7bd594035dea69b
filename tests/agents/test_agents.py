"""Rollouts of agents: what they were answered is what is trained on."""

from __future__ import annotations

import json
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


def test_any_other_prompt_begins_a_row(office: Agency) -> None:
    """A second conversation, an answer that is rewritten; and then the first conversation goes on."""

    def agent(client: Client) -> float:
        first = client.tokens([30, 31, 32], max_tokens=4)
        whole = [*first["prompt_token_ids"], *first["choices"][0]["token_ids"]]
        client.tokens([30, 40], max_tokens=4)
        client.tokens([*whole[:-1], 50, 51], max_tokens=4)
        client.tokens([*whole, 52], max_tokens=4)
        return 1.0

    host = office.host(agent)
    (group,) = office.roll(host, n=2)
    assert group.task.prompt_ids == (30,)
    assert worst_gap(office.model, [group]) < 1e-4
    told = {tuple(c.answers[0]["choices"][0]["token_ids"]): c.answers for c in host.clients}
    for rollout in group.rollouts:
        first, second, third = (part for part in rollout.trajectory.parts)
        assert (first.turns, second.turns, third.turns) == (2, 1, 1)
        answers = next(told[ids] for ids in told if first.token_ids[2:][: len(ids)] == ids)
        for part, last in ((first, answers[3]), (second, answers[1]), (third, answers[2])):
            assert [30, *part.token_ids] == [*last["prompt_token_ids"], *last["choices"][0]["token_ids"]]
        assert [part.trained_tokens for part in (second, third)] == [
            len(answers[at]["choices"][0]["token_ids"]) for at in (1, 2)
        ]


def test_several_choices_are_a_row_each(office: Agency) -> None:
    def agent(client: Client) -> float:
        told = client.tokens([30, 31, 32], n=3, max_tokens=4)
        chosen = told["choices"][1]["token_ids"]
        client.tokens([30, 31, 32, *chosen, 40], max_tokens=4)
        return 1.0

    host = office.host(agent)
    one = office.one(host)
    (client,) = host.clients
    choices, last = [choice["token_ids"] for choice in client.answers[0]["choices"]], client.answers[1]
    assert len({tuple(ids) for ids in choices}) == 3
    rows = [list(part.token_ids) for part in one.parts]
    assert sorted(rows) == sorted([choices[0], [*choices[1], 40, *last["choices"][0]["token_ids"]], choices[2]])


def test_a_chat_of_an_openai_client(office: Agency) -> None:
    """Its turns chain as far as the model ends them, and all is told by messages."""

    def agent(client: Client) -> float:
        messages = list(QUESTION)
        for number in range(3):
            told = client.chat(messages, max_tokens=6, stop=["9"])["choices"][0]["message"]
            messages += [
                {"role": "assistant", "content": told["content"]},
                {"role": "user", "content": f"And {number}?"},
            ]
        return 0.25

    (group,) = office.roll(agent, n=3)
    assert worst_gap(office.model, [group]) < 1e-4
    for rollout in group.rollouts:
        talk = rollout.trajectory.conversation
        assert [message["role"] for message in talk.messages] == ["assistant", "user", "assistant", "user", "assistant"]
        assert [m["content"] for m in talk.messages if m["role"] == "user"] == ["And 0?", "And 1?"]
        assert talk.prompt == tuple(QUESTION)


def test_a_stream_tells_tokens_as_they_come(office: Agency) -> None:
    events: list[dict[str, Any]] = []

    def agent(client: Client) -> float:
        body = {"messages": QUESTION, "stream": True, "return_token_ids": True, "logprobs": True, "max_tokens": 20}
        connection = client.begun("/v1/chat/completions", body)
        lines = connection.getresponse().read().decode().split("\n\n")
        events.extend(json.loads(line.removeprefix("data: ")) for line in lines if line and not line.endswith("[DONE]"))
        connection.close()
        return 1.0

    one = office.one(agent)
    told = [event["choices"][0] for event in events if event["choices"][0].get("token_ids")]
    assert [token for choice in told for token in choice["token_ids"]] == list(one.token_ids)
    assert [t["logprob"] for choice in told for t in choice["logprobs"]["content"]] == list(one.behaviour)
    assert len(told) > 1
    assert one.conversation.messages[0]["role"] == "assistant"
