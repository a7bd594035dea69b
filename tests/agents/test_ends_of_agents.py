"""How rollouts of agents end: by themselves, at limits, by failures; and what is refused when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from agency import QUESTION, SAMPLING, Agency, Client, agency, at_once

from grpo.agents.agents import Agents
from grpo.agents.outcome import ENDPOINT
from grpo.environments.seats import ConversationLimits, Reply
from grpo.generation.sampling import Sampling
from grpo.rollout import RolloutEngine
from grpo.types import Failure

PROMPT = [30, 31, 32]


@pytest.fixture(scope="module")
def office(toy_folder: Path) -> Iterator[Agency]:
    with agency(toy_folder) as found:
        yield found


def whole(told: Any) -> list[int]:
    """A prompt and its answer."""
    return [*told["prompt_token_ids"], *told["choices"][0]["token_ids"]]


def after(told: Any, *more: int) -> list[int]:
    return [*whole(told), *more]


def asks(then: Callable[[Client], Any]) -> Callable[[Client], Any]:
    """An agent that asks once, and then does this."""

    def agent(client: Client) -> Any:
        client.tokens(PROMPT, max_tokens=4)
        return then(client)

    return agent


def raises(client: Client) -> None:
    raise ValueError("no board")


@pytest.mark.parametrize(
    ("agent", "failure", "reason"),
    [
        (asks(raises), Failure("error", "ValueError: no board"), "failed"),
        (asks(lambda _: Reply("crash", error="killed")), Failure("crash", "killed"), "failed"),
        (asks(lambda _: Reply("timeout", error="too late")), Failure("timeout", "too late"), "rollout_timeout"),
        (
            asks(lambda _: Reply(value='{"reward": "much"}')),
            Failure("error", 'its process sent an invalid result: \'{"reward": "much"}\''),
            "failed",
        ),
        (
            lambda _: 1.0,
            Failure("error", f"it got no answer from the model: {ENDPOINT}"),
            "failed",
        ),
    ],
)
def test_failures(office: Agency, agent: Any, failure: Failure, reason: str) -> None:
    one = office.one(agent)
    assert one.conversation.failure == failure
    assert one.conversation.reward is None
    assert one.finish_reason == reason
    assert bool(one.token_ids) is (agent.__name__ == "agent")
    assert one.truncated


def test_an_agent_that_cannot_begin_is_a_failure_and_is_not_run(office: Agency) -> None:
    host = office.host(asks(lambda _: 1.0))
    host.reset = lambda seat: Reply("error", error="no") if seat.number == 1 else Reply()
    (group,) = office.roll(host, n=3)
    assert [r.trajectory.conversation.failure for r in group.rollouts] == [None, Failure("error", "no"), None]
    assert group.rollouts[1].trajectory.token_ids == ()
    assert group.rollouts[1].trajectory.columns == {"behaviour": ()}
    assert len(host.clients) == 2
    assert all(seat.released == 1 for seat in host.all)


def test_no_reward_and_metrics(office: Agency) -> None:
    one = office.one(asks(lambda _: (None, {"moves": 3.0})))
    assert (one.conversation.reward, one.conversation.failure, one.finish_reason) == (None, None, "done")
    assert one.conversation.metrics == {"moves": 3.0}


def test_max_turns(office: Agency) -> None:
    refused = []

    def agent(client: Client) -> float:
        told = client.tokens(PROMPT, max_tokens=3)
        told = client.tokens(after(told, 40), max_tokens=3)
        refused.append(client.refused(after(told, 41)))
        return 1.0

    one = office.one(agent, limits=ConversationLimits(max_turns=2))
    assert refused == [(403, "max_turns")]
    assert (one.turns, one.finish_reason, one.conversation.reward) == (2, "max_turns", 1.0)
    assert one.truncated


def test_max_turn_tokens(office: Agency) -> None:
    lengths = []

    def agent(client: Client) -> float:
        told = client.tokens(PROMPT, max_tokens=2)
        lengths.append(len(told["choices"][0]["token_ids"]))
        told = client.tokens(after(told, 40), max_tokens=20, min_tokens=20)
        lengths.append(len(told["choices"][0]["token_ids"]))
        assert told["choices"][0]["finish_reason"] == "length"
        return 1.0

    one = office.one(agent, limits=ConversationLimits(max_turn_tokens=5))
    assert lengths == [2, 5]
    assert one.finish_reason == "max_turn_tokens"


def test_tokens_that_the_agent_did_not_want_cut_nothing_off(office: Agency) -> None:
    assert office.one(asks(lambda _: 1.0)).finish_reason == "done"


def test_a_row_has_its_limit(office: Agency) -> None:
    """Of 24 tokens after the prompt; what does not fit with an answer is refused, and so are its further turns."""
    refused, lengths = [], []

    def agent(client: Client) -> float:
        told = client.tokens(PROMPT, max_tokens=4)
        long = after(told, *range(40, 59))
        refused.append(client.refused([*long, 20]))
        refused.append(client.refused([*long, *range(20, 100)]))
        told = client.tokens(long)
        lengths.append(len(told["choices"][0]["token_ids"]))
        refused.append(client.refused(after(told, 20)))
        return 1.0

    one = office.one(agent)
    assert refused == [(400, "context_length_exceeded")] * 3
    assert lengths == [1]
    assert len(one.token_ids) == 24
    assert (one.finish_reason, one.conversation.reward) == ("length", 1.0)


def test_the_limit_stays_where_a_row_was_let_go(office: Agency) -> None:
    """Others have begun since, so that it waits no more: its conversation goes on in a new row, with what was left."""
    refused, lengths = [], []

    def agent(client: Client) -> float:
        told = client.tokens(PROMPT, max_tokens=4)
        for other in range(6):
            client.tokens([30, 50 + other], max_tokens=2)
        again = client.tokens(after(told, *range(40, 50)))
        lengths.append(len(again["choices"][0]["token_ids"]))
        refused.append(client.refused(after(told, *range(40, 60))))
        return 1.0

    one = office.one(agent)
    assert len(one.parts) == 8
    assert lengths[0] <= 10
    assert refused == [(400, "context_length_exceeded")]


def test_a_prompt_beyond_all_limits_cuts_a_rollout_off_too(office: Agency) -> None:
    one = office.one(asks(lambda client: client.refused([30, *range(40, 128)]) and 1.0))
    assert (one.finish_reason, one.conversation.reward) == ("length", 1.0)


def test_prompts_have_limits(office: Agency) -> None:
    """The first may be as long as the data's; what a later one has beyond that takes from the answer."""
    refused, lengths = [], []

    def agent(client: Client) -> float:
        refused.append(client.refused(range(30, 39)))
        client.tokens(range(30, 38), max_tokens=2)
        told = client.tokens([30, *range(50, 77)])  # 20 more than 8, of 24
        lengths.append(len(told["choices"][0]["token_ids"]))
        refused.append(client.refused([30, *range(60, 91)]))
        return 1.0

    one = office.one(agent, longest=8)
    assert refused == [(400, "context_length_exceeded")] * 2
    assert lengths[0] <= 4
    assert (len(one.parts), one.finish_reason) == (2, "length")


def test_too_long_a_first_prompt_alone_is_nothing_asked(office: Agency) -> None:
    one = office.one(lambda client: client.refused(range(30, 39)) and 1.0, longest=8)
    assert one.conversation.failure.error == (
        "it got no answer from the model: the first prompt has 9 tokens, but data.max_prompt_length is 8: "
        "raise it, or begin with a shorter prompt"
    )


@pytest.mark.parametrize(
    ("again", "limits", "reason"),
    [
        ([40], ConversationLimits(max_turns=1), "max_turns"),
        (range(40, 90), ConversationLimits(), "length"),
    ],
)
def test_an_agent_that_a_limit_stops_has_lost(office: Agency, again: Any, limits: Any, reason: str) -> None:
    """It is a rollout as any other: its group's baseline counts it, and what was sampled is trained."""

    def agent(client: Client) -> float:
        told = client.tokens(PROMPT, max_tokens=4)
        client.tokens(after(told, *again))  # raises, as OpenAI's client does
        return 1.0

    one = office.one(agent, limits=limits)
    assert (one.conversation.reward, one.conversation.failure, one.finish_reason) == (0.0, None, reason)
    assert one.trained_tokens > 0


@pytest.mark.parametrize("kind", ["timeout", "crash"])
def test_an_agent_that_hangs_or_dies_at_a_limit_has_failed(office: Agency, kind: Any) -> None:
    def agent(client: Client) -> Reply:
        client.refused(after(client.tokens(PROMPT, max_tokens=4), 40))
        return Reply(kind, error="gone")

    one = office.one(agent, limits=ConversationLimits(max_turns=1))
    assert one.conversation.failure == Failure(kind, "gone")


def test_what_an_agent_raises_after_it_knew_of_the_limit_is_its_failure(office: Agency) -> None:
    def agent(client: Client) -> float:
        told = client.tokens(PROMPT, max_tokens=4)
        client.refused(after(told, *range(40, 90)))
        client.tokens(after(told, 40), max_tokens=2)
        raise ValueError("no board")

    one = office.one(agent)
    assert one.conversation.failure == Failure("error", "ValueError: no board")
    assert one.finish_reason == "failed"


def test_prompts_that_share_nothing_fail_and_say_so(office: Agency) -> None:
    numbers = iter(range(9))
    (group,) = office.roll(lambda client: client.tokens([40 + next(numbers), 31], max_tokens=2) and 1.0, n=2)
    for rollout in group.rollouts:
        assert "begin with different tokens" in rollout.trajectory.conversation.failure.error
        assert rollout.trajectory.token_ids == ()
    assert group.task.prompt_ids == office.prompt


def test_a_failed_rollout_s_prompt_is_no_matter_to_the_others(office: Agency) -> None:
    first = threading.Event()

    def agent(client: Client) -> float:
        if first.is_set():
            client.tokens(PROMPT, max_tokens=2)
            return 1.0
        first.set()
        client.tokens([50, 51], max_tokens=2)
        raise ValueError("no")

    (group,) = office.roll(agent, n=3)
    failed = [rollout.trajectory for rollout in group.rollouts if rollout.trajectory.conversation.failure]
    assert [one.token_ids for one in failed] == [()]
    assert group.task.prompt_ids == tuple(PROMPT)


def test_a_session_that_is_over_is_refused(office: Agency) -> None:
    host = office.host(asks(lambda _: 1.0))
    office.one(host)
    (client,) = host.clients
    status, told = client.post("/v1/chat/completions", {"messages": QUESTION})
    assert (status, told["error"]["code"]) == (404, "session_over")
    client.api_key = "another"
    status, told = client.post("/v1/chat/completions", {"messages": QUESTION})
    assert status == 401
    assert told["error"]["message"].startswith("wrong API key: use the api_key that run() gets, or in a program ")


def test_what_an_agent_does_not_wait_for_is_refused_and_not_trained(office: Agency) -> None:
    """It returns while a request of its own decodes, which is told that all is over."""
    late: list[Any] = []

    def agent(client: Client) -> float:
        client.tokens(PROMPT, max_tokens=2)
        body = {"token_ids": [30, 40], "sampling_params": {"max_tokens": 90_000, "min_tokens": 90_000}}
        thread = threading.Thread(target=lambda: late.append(client.post("/inference/v1/generate", body)))
        thread.start()
        time.sleep(0.2)
        return 1.0

    one = office.one(agent, sampling=Sampling(1.0, 100_000))
    deadline = time.monotonic() + 10
    while not late and time.monotonic() < deadline:
        time.sleep(0.01)
    ((status, told),) = late
    assert (status, told["error"]["code"]) == (404, "session_over")
    assert len(one.parts) == 1


def test_a_request_whose_client_goes_away_stops_and_does_not_count(office: Agency) -> None:
    """Of a row that goes on the turns before stay, and the conversation can go on in another row."""

    def agent(client: Client) -> float:
        told = client.tokens(PROMPT, max_tokens=3)
        body = {"token_ids": after(told, 40), "sampling_params": {"max_tokens": 90_000}}
        connection = client.begun("/inference/v1/generate", body)
        time.sleep(0.1)
        connection.close()
        client.tokens(after(told, 40), max_tokens=2)
        client.tokens([30, 50], max_tokens=2)
        return 1.0

    sampling = Sampling(1.0, 100_000, min_tokens=90_000)
    one = office.one(agent, sampling=sampling, limits=ConversationLimits(max_turns=3))
    assert [part.trained_tokens for part in one.parts] == [3, 2, 2]
    assert one.finish_reason == "done"


def test_requests_at_once_decode_at_once(office: Agency) -> None:
    steps = []

    def agent(client: Client) -> float:
        at_once(*(lambda k=k: client.tokens([30, 40 + k], max_tokens=20, min_tokens=20) for k in range(4)))
        return 1.0

    engine = office.generator.open
    try:
        office.generator.open = lambda: _counted(engine(), steps)  # type: ignore[method-assign]
        one = office.one(agent, sampling=Sampling(1.0, 20))
    finally:
        del office.generator.open
    assert len(one.parts) == 4
    assert max(steps) == 4
    assert len(steps) < 2 * 20


def _counted(engine: Any, steps: list[int]) -> Any:
    step = engine.step

    def counting() -> Any:
        events = step()
        steps.append(sum(row is not None for row in events.rows))
        return events

    engine.step = counting
    return engine


def test_a_rollout_that_breaks_off_refuses_what_waits(office: Agency) -> None:
    """Another row's environment raises: the agents are told that the server ends, and the seats are given back."""
    told = []

    def agent(client: Client) -> float:
        told.append(client.refused(PROMPT, max_tokens=90_000, min_tokens=90_000))
        return 1.0

    host = office.host(agent)
    environment = Agents(host, office.frontend, ConversationLimits(), 7, 64, SAMPLING)  # type: ignore[arg-type]

    class Breaks:
        async def rollout(self, task: Any, sampler: Any) -> Any:
            if task.index == 0:
                return await environment.rollout(task, sampler)
            await sampler.outside(office.threads.submit(time.sleep, 1.0))
            raise RuntimeError("broken")

    office.speaker.longest = 100_000
    engine = RolloutEngine(office.generator, Sampling(1.0, 100_000), Breaks())
    with pytest.raises(RuntimeError, match="broken"):
        engine.rollout(office.tasks(2), 2, 1.0, mx.random.key(0))
    deadline = time.monotonic() + 10
    while len(told) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert told == [(503, "shutting_down")] * 2
    assert all(seat.released == 1 for seat in host.all)
    assert office.one(asks(lambda _: 1.0)).conversation.reward == 1.0  # and the next rollout is as ever
