"""What agents are answered depends on the run, the row, the sample and what they ask: not on when they ask it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from agency import QUESTION, SAMPLING, Agency, Client, agency, at_once

from grpo.environments import scheduler
from grpo.generation.sampling import Sampling
from grpo.rollout import RolloutEngine
from grpo.types import Group


@pytest.fixture(scope="module")
def office(toy_folder: Path) -> Iterator[Agency]:
    with agency(toy_folder) as found:
        yield found


def sampled(groups: list[Group]) -> list[tuple]:
    return [
        (group.task.prompt_ids, r.trajectory.token_ids, r.trajectory.trained, r.trajectory.begins)
        for group in groups
        for r in group.rollouts
    ]


def talks(client: Client) -> float:
    """Two requests at once, of which one goes on; and a further conversation."""
    told = at_once(*(lambda k=k: client.tokens([30, 40 + k], max_tokens=4) for k in (1, 0, 2)))
    first = next(one for one in told if one["prompt_token_ids"] == [30, 40])
    client.tokens([*first["prompt_token_ids"], *first["choices"][0]["token_ids"], 50], max_tokens=4)
    client.tokens([30, 40], max_tokens=4)
    return 1.0


def test_whenever_they_ask(office: Agency, monkeypatch: pytest.MonkeyPatch) -> None:
    """With little patience, few slots, and no memory for rows that wait."""
    expected = sampled(office.roll(talks, n=3, tasks=2))
    monkeypatch.setattr(scheduler, "GRACE", 0.0)
    draw = random.Random(0)

    def slowly(client: Client) -> float:
        time.sleep(draw.random() * 0.03)
        post = client.post

        def late(*given: Any) -> Any:
            time.sleep(draw.random() * 0.01)
            return post(*given)

        client.post = late  # type: ignore[method-assign]
        return talks(client)

    try:
        office.generator.slots, office.generator.kept_bytes = 3, 0
        again = sampled(office.roll(slowly, n=3, tasks=2))
    finally:
        office.generator.slots, office.generator.kept_bytes = 16, None
    rows = lambda found: [(prompt, sorted(rows_of(ids, begins))) for prompt, ids, _, begins in found]  # noqa: E731
    assert rows(again) == rows(expected)
    assert len({ids for _, ids, _, _ in expected}) == 6


def rows_of(ids: tuple[int, ...], begins: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [ids[begin:end] for begin, end in zip((0, *begins), (*begins, len(ids)), strict=True)]


def test_the_same_prompt_again_draws_something_else(office: Agency) -> None:
    one = office.one(lambda client: [client.tokens([30, 31], max_tokens=8) for _ in range(3)] and 1.0)
    assert len({part.token_ids for part in one.parts}) == 3


def test_a_prompt_that_is_the_row_s_own_is_answered_as_without_agents(office: Agency) -> None:
    """To the bit, in training and at other temperatures."""
    for temperature in (1.0, 0.5):
        groups = office.roll(lambda client: client.chat(QUESTION) and 1.0, n=3, tasks=2, temperature=temperature)
        plain = RolloutEngine(office.generator, SAMPLING).rollout(office.tasks(2), 3, temperature, mx.random.key(3))
        assert sampled(groups) == sampled(plain)
        assert [r.trajectory.behaviour for g in groups for r in g.rollouts] == [
            r.trajectory.behaviour for g in plain for r in g.rollouts
        ]


def test_a_game_of_several_turns_is_the_environment_s_to_the_bit(office: Agency) -> None:
    class Game:
        """Says 20 and the number of the turn."""

        async def rollout(self, task: Any, sampler: Any) -> Any:
            async def one(row: Any) -> Any:
                await sampler.ended(row)
                for turn in range(3):
                    await sampler.extend(row, [20, 30 + turn])
                return await sampler.ended(row)

            return await sampler.gather(*map(one, sampler.begin(task.prompt_ids, sampler.n, keep=True)))

    def agent(client: Client) -> float:
        told = client.chat(QUESTION, max_tokens=4)
        for turn in range(3):
            before = [*told["prompt_token_ids"], *told["choices"][0]["token_ids"]]
            told = client.tokens([*before, 20, 30 + turn], max_tokens=4)
        return 1.0

    sampling = Sampling(1.0, 60, max_turn_tokens=4)
    groups = office.roll(agent, n=3, tasks=2, sampling=sampling)
    plain = RolloutEngine(office.generator, sampling, Game()).rollout(office.tasks(2), 3, 1.0, mx.random.key(3))
    assert sampled(groups) == sampled(plain)


def test_an_evaluation_samples_in_its_own_way_whatever_the_recipe_says(office: Agency) -> None:
    """The agent asks for the recipe's temperature, as in training. Logprobs are there for who asks for them."""

    def agent(client: Client) -> float:
        told = client.chat(QUESTION, temperature=1.0, max_tokens=6)
        again = client.tokens([office.prompt[0], 31], max_tokens=2)
        whole = [*again["prompt_token_ids"], *again["choices"][0]["token_ids"]]
        client.chat(QUESTION, logprobs=False)
        assert len(told["choices"][0]["logprobs"]["content"]) == len(told["choices"][0]["token_ids"])
        client.tokens([*whole, 32], max_tokens=2)
        return 1.0

    (group,) = office.roll(agent, n=1, temperature=0.0, logprobs=False)
    assert group.rollouts[0].trajectory.conversation.failure is None
    first, second, third = group.rollouts[0].trajectory.parts
    assert first.columns == {}
    assert (second.turns, first.trained_tokens <= 6) == (2, True)
    plain = RolloutEngine(office.generator, SAMPLING).rollout(office.tasks(), 1, 0.0, mx.random.key(3), logprobs=False)
    greedy = plain[0].rollouts[0].trajectory.token_ids
    assert third.of_trained(third.token_ids) == list(greedy)
    refused = []
    office.one(lambda client: refused.append(client.refused([30], temperature=0.5)))
    assert refused == [(400, "session_decides")]


def test_logprobs_that_a_row_does_not_have_begin_another(office: Agency) -> None:
    def agent(client: Client) -> float:
        told = client.tokens([30, 31], max_tokens=3, logprobs=None)
        again = client.tokens([*told["prompt_token_ids"], *told["choices"][0]["token_ids"], 32], max_tokens=3)[
            "choices"
        ][0]
        return float(len(again["logprobs"]["content"]) == len(again["token_ids"]))

    one = office.one(agent, temperature=0.0, logprobs=False)
    assert (len(one.parts), one.conversation.reward) == (2, 1.0)
    assert office.one(agent).begins == ()  # in training all rows have them


def test_rows_that_record_what_they_were_drawn_from_record_it_for_all_turns(office: Agency) -> None:
    """Filters are the recipe's, for all rows; a minimum of tokens is of a turn, and begins a row where there was none.
    It holds, though half of all tokens would end the turn."""
    lengths = []

    def agent(client: Client) -> float:
        told = client.tokens([30, 31, 32], max_tokens=3)
        before = [*told["prompt_token_ids"], *told["choices"][0]["token_ids"]]
        told = client.tokens([*before, 20], max_tokens=9, min_tokens=7)
        before = [*told["prompt_token_ids"], *told["choices"][0]["token_ids"]]
        lengths.append(len(told["choices"][0]["token_ids"]))
        told = client.tokens([*before, 20], max_tokens=6, min_tokens=6, stop_token_ids=list(range(8, 140)))
        lengths.append(len(told["choices"][0]["token_ids"]))
        return 1.0

    one = office.one(agent)
    assert lengths[0] >= 7
    assert lengths[1] == 6
    assert [part.turns for part in one.parts] == [1, 2]
    assert set(one.columns) == {"behaviour", "sampler"}
    filtered = office.one(agent, sampling=Sampling(1.0, 40, top_p=0.9))
    assert [part.turns for part in filtered.parts] == [3]
    assert set(filtered.columns) == {"behaviour", "sampler"}
    assert any(a != b for a, b in zip(filtered.behaviour, filtered.sampler, strict=True))


def test_seeds_of_agents_are_small_and_differ(office: Agency) -> None:
    """Environments, and the random numbers of Python and NumPy, keep the whole seed."""
    host = office.host(lambda client: client.tokens([30, 31], max_tokens=2) and 1.0)
    office.roll(host, n=8)
    seeds = [client.seed for client in host.clients]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sorted(seat.given % 2**31 for seat in host.all) == sorted(seeds)
    assert any(seat.given >= 2**32 for seat in host.all)
