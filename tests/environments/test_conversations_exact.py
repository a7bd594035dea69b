"""Conversations by every way of decoding: what is sampled is what the model would say, whenever others answer."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import pytest
from environments.conversing import Host, LastTwo, Numbers, at_once, later
from generation.ways import STOPS, WAYS, generator_of

from grpo.environments.conversations import Conversations
from grpo.environments.play import Table
from grpo.environments.seats import ConversationLimits, Reply
from grpo.generation.sampling import Sampling
from grpo.rollout import RolloutEngine
from grpo.types import Group, Task, Trajectory

KEY = mx.random.key(3)
SAMPLING = Sampling(1.0, 90)
TASKS = [
    Task(0, [{"role": "user", "content": "20 21 22 23"}], (11, 20, 21, 22, 23), {}),
    Task(1, [{"role": "user", "content": "30"}], (11, 30), {}),
]
FAST = {"joined layers", "batch caches"}
EVERY = [pytest.param(way, marks=() if way in FAST else pytest.mark.slow) for way in WAYS]


def opens(seat, columns, seed) -> str | None:
    """Some rows' prompts are longer than others', and one is as the dataset has it."""
    return None if seat.number == 0 else " " + " ".join(str(40 + i + seat.number) for i in range(7 * seat.number))


def answers(seat, message) -> Reply:
    """Each time something else, of another length."""
    said = len(seat.asked)
    return Reply(value=" ".join(str(20 + (3 * said + i + seat.number) % 40) for i in range(1 + 5 * (said % 4))))


def calls(seat, name, arguments) -> Reply:
    return answers(seat, None)


def played(
    way: str,
    run: Callable = at_once,
    slots: int = 64,
    kept_bytes: int | None = None,
    sampling: Sampling = SAMPLING,
    limits: ConversationLimits = ConversationLimits(max_turns=6),  # noqa: B008
    kind: str = "messages",
    n: int = 4,
    drops: bool = False,
) -> list[Group]:
    generator = generator_of(way, slots)
    generator.kept_bytes = kept_bytes
    host = Host(kind, run, reset=opens, step=answers, tool=calls)
    chat = Numbers(ends=STOPS)
    table = Table(host, chat, limits, anew=LastTwo(chat) if drops else None)  # type: ignore[arg-type]
    conversations = Conversations({"": table}, 0, 64)
    return RolloutEngine(generator, sampling, conversations).rollout(TASKS, n, sampling.temperature, KEY)


def trajectories(groups: list[Group]) -> list[Trajectory]:
    return [rollout.trajectory for group in groups for rollout in group.rollouts]


def sampled(groups: list[Group]) -> list[tuple]:
    return [(one.token_ids, one.trained, one.finish_reason, one.conversation.messages) for one in trajectories(groups)]


def worst_gap(model, groups: list[Group], temperature: float = 1.0) -> float:
    """The largest difference of a trained token's logprob from what a plain forward pass over the row says."""
    gaps = []
    for group in groups:
        for row in (part for rollout in group.rollouts for part in rollout.trajectory.parts):
            prompt = group.task.prompt_ids
            logits = model(mx.array([[*prompt, *row.token_ids]]))[0, len(prompt) - 1 : -1].astype(mx.float32)
            logits = logits / temperature
            forced = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            own = mx.take_along_axis(forced, mx.array(row.token_ids)[:, None], axis=1)[:, 0]
            gap = mx.abs(own - mx.array(row.behaviour)) * mx.array(row.trained)
            gaps.append(gap.max().item())
    return max(gaps)


@pytest.mark.parametrize("way", EVERY)
def test_sampled_logprobs_are_those_of_teacher_forcing(way: str) -> None:
    """With openings, answers, few slots, and keys and values that are dropped for want of memory."""
    for slots, kept_bytes in ((64, None), (3, 20_000), (3, 0)):
        groups = played(way, slots=slots, kept_bytes=kept_bytes)
        rows = trajectories(groups)
        turns = [len(row.conversation.turn_rewards) for row in rows]
        assert sum(turns) > 2 * len(rows)
        assert worst_gap(generator_of(way, 1).model, groups) < 1e-4


@pytest.mark.parametrize("way", EVERY)
def test_so_they_are_in_rows_that_begin_anew(way: str) -> None:
    for slots, kept_bytes in ((64, None), (3, 0)):
        groups = played(way, slots=slots, kept_bytes=kept_bytes, drops=True)
        assert sum(len(row.begins) for row in trajectories(groups)) >= 4
        assert worst_gap(generator_of(way, 1).model, groups) < 1e-4


@pytest.mark.parametrize("way", EVERY)
def test_a_row_that_was_parked_samples_what_it_would_have_sampled(way: str) -> None:
    """Whoever answers first, with fewer slots than rows and no memory for those that wait."""
    expected = sampled(played(way))
    draw = random.Random(0)

    def slowly(function, *given):
        time.sleep(draw.random() * 0.01)
        return function(*given)

    with ThreadPoolExecutor(8) as threads:
        run = later(threads)
        for slots, kept_bytes in ((2, 0), (3, 20_000), (64, None)):
            found = played(way, lambda function, *given: run(slowly, function, *given), slots, kept_bytes)
            assert sampled(found) == expected


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7, 60, top_k=20, min_p=0.01),
        Sampling(1.0, 60, repetition_penalty=1.3, min_tokens=30),
        Sampling(1.0, 60, max_repeats=3, stop=("33", "21 2")),
    ],
)
def test_ways_of_sampling_hold_in_conversations(sampling: Sampling) -> None:
    groups, few = (played("joined layers", slots=slots, sampling=sampling) for slots in (64, 3))
    assert sampled(groups) == sampled(few)
    assert worst_gap(generator_of("joined layers", 1).model, groups, sampling.temperature) < 1e-4
    assert all((row.sampler is not None) == sampling.reshaped for row in trajectories(groups))
    early = [  # the least is counted after what is the row's own of the prompt
        token
        for group in groups
        for number, rollout in enumerate(group.rollouts)
        for token in rollout.trajectory.token_ids[7 * number :][: max(0, sampling.min_tokens - 1)]
    ]
    assert not STOPS & set(early)


def test_the_first_prompt_is_shared_and_the_rest_is_the_row_s_own() -> None:
    groups = played("joined layers")
    for task, group in zip(TASKS, groups, strict=True):
        assert group.task == replace(task, prompt_ids=task.prompt_ids)  # one row had nothing added
        for number, rollout in enumerate(group.rollouts):
            row = rollout.trajectory
            own = [40 + i + number for i in range(7 * number)]
            assert list(row.token_ids[: len(own)]) == own
            assert not any(row.trained[: len(own)])
            assert row.trained[len(own)]
            prompt = row.conversation.prompt
            assert prompt[-1]["content"].split() == [*task.prompt[0]["content"].split(), *map(str, own)]
            assert len(row.token_ids) - len(own) <= SAMPLING.max_tokens
    assert any(row.finish_reason == "length" for row in trajectories(groups))


def test_without_logprobs_and_greedy() -> None:
    generator = generator_of("joined layers", 3)
    host = Host("messages", reset=opens, step=answers)
    conversations = Conversations({"": Table(host, Numbers(ends=STOPS), ConversationLimits(max_turns=3))}, 0, 64)
    groups = RolloutEngine(generator, SAMPLING, conversations).rollout(TASKS, 3, 0.0, [4, 5], logprobs=False)
    for group in groups:
        for rollout in group.rollouts:
            row, prompt = rollout.trajectory, group.task.prompt_ids
            logits = generator.model(mx.array([[*prompt, *row.token_ids]]))[0, len(prompt) - 1 : -1]
            assert row.of_trained(logits.argmax(axis=-1).tolist()) == row.of_trained(row.token_ids)
            assert row.behaviour is None
