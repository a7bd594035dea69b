"""Conversations of a policy with an adapter, as they are sampled, through batches to the gradient."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import mlx.core as mx
import pytest
from environments.conversing import Host, Numbers
from training.sections import make_batches, updater, with_advantages
from training.test_update import recipe as sections

from grpo.environments.chat import Chat
from grpo.environments.conversations import Conversations
from grpo.environments.play import Table
from grpo.environments.seats import ConversationLimits, Reply
from grpo.generation.sampling import Sampling
from grpo.planning.parity import _forced
from grpo.rollout import RolloutEngine
from grpo.types import Group, Task

STOPS = frozenset(range(90))
TASKS = [
    Task(0, [{"role": "user", "content": "120 121 122"}], (11, 120, 121, 122), {}),
    Task(1, [{"role": "user", "content": "130"}], (11, 130), {}),
]


def opens(seat, columns, seed) -> str | None:
    return " 140 141" * seat.number or None


def answers(seat, message) -> Reply:
    return Reply(value=" ".join(str(150 + i + seat.number) for i in range(1 + 2 * len(seat.asked))))


def conversations() -> Conversations:
    host = Host("messages", reset=opens, step=answers)
    return Conversations({"": Table(host, Numbers(ends=STOPS), ConversationLimits(max_turns=4))}, 0, 64)


def sampled(toy, n: int = 3, slots: int = 2, kept_bytes: int | None = 5_000) -> list[Group]:
    """With few slots, and little memory for rows that wait."""
    toy.generator.stop_ids, toy.generator.slots, toy.generator.kept_bytes = STOPS, slots, kept_bytes
    engine = RolloutEngine(toy.generator, Sampling(1.0, 40), conversations())
    groups = engine.rollout(TASKS, n, 1.0, mx.random.key(1))
    assert sum(len(r.trajectory.conversation.turn_rewards) for g in groups for r in g.rollouts) > 2 * n * len(TASKS)
    return groups


def gaps(toy, groups: list[Group]) -> list[float]:
    forced = _forced(toy.policy, groups, None)
    behaviour = [x for g in groups for r in g.rollouts for x in r.trajectory.of_trained(r.trajectory.behaviour)]
    return [abs(here - there) for here, there in zip(forced, behaviour, strict=True)]


@pytest.mark.parametrize("shares", [True, False])
def test_the_update_computes_what_was_sampled(make_policy, shares: bool) -> None:
    """Under an adapter that is not zero, with prompts that go through the model once for their group, and without."""
    toy = make_policy()
    groups = sampled(toy)
    toy.policy.share_prompts = shares
    found = gaps(toy, groups)
    assert len(found) > 60
    assert max(found) < 1e-4


def test_another_target_of_an_untrained_token_changes_no_gradient(make_policy, monkeypatch) -> None:
    """To the bit; and another target of a trained one does."""
    toy = make_policy()
    cfg = sections(optim={"micro_batch_tokens": 9999})
    groups = [
        replace(
            group, rollouts=tuple(replace(r, scores={"r": i}, reward=float(i)) for i, r in enumerate(group.rollouts))
        )
        for group in sampled(toy)
    ]
    (batch,) = make_batches(with_advantages(groups, cfg), cfg)
    assert 0 < (batch.trained * batch.weights > 0).sum().item() < batch.trained.size
    projected = toy.policy._projected

    def gradient(where: mx.array) -> dict[str, mx.array]:
        def changed(hidden, tokens, *rest):
            return projected(hidden, mx.where(where, (tokens + 1) % 200, tokens), *rest)

        monkeypatch.setattr(toy.policy, "_projected", changed)
        return updater(toy.policy, cfg).gradient([batch]).arrays

    nowhere, untrained = mx.zeros(batch.trained.shape, mx.bool_), batch.trained == 0
    expected, found = gradient(nowhere), gradient(untrained)
    assert max(mx.abs(array).max().item() for array in expected.values()) > 1e-3
    assert all(mx.array_equal(found[path], array) for path, array in expected.items())
    first = int(batch.trained[0].argmax().item())
    one = mx.array([[row == 0 and t == first for t in range(nowhere.shape[1])] for row in range(nowhere.shape[0])])
    other = gradient(one)
    assert not all(mx.array_equal(other[path], array) for path, array in expected.items())


def test_the_tokens_are_those_of_the_chat_template(make_policy) -> None:
    """The real chat: prompt, turns and answers as the template writes them, joined without encoding them again."""
    toy = make_policy()
    chat = Chat.of(toy.tokenizer, answers=True)
    host = Host("messages", reset=lambda seat, *_: f" {seat.number}+{seat.number}?", step=lambda *_: "Sure?")
    task = Task(0, [{"role": "user", "content": "What is"}], chat.prompt_ids("What is"), {})
    engine = RolloutEngine(
        toy.generator,
        Sampling(1.0, 60),
        Conversations({"": Table(host, chat, ConversationLimits(max_turns=3))}, 0, 200),
    )
    (group,) = engine.rollout([task], 6, 1.0, mx.random.key(0))
    turns = 0
    for number, rollout in enumerate(group.rollouts):
        row, said = rollout.trajectory, iter(rollout.trajectory.token_ids)
        spans = [[next(said) for _ in span] for _, span in groupby(row.trained)]
        opening, *others = [toy.tokenizer.decode(span) for span in spans]
        begun = toy.tokenizer.decode(group.task.prompt_ids) + opening
        assert begun == f"<|im_start|>user\nWhat is {number}+{number}?<|im_end|>\n<|im_start|>assistant\n"
        assert set(others[1::2]) <= {"\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"}
        assert all(span[-1] == toy.tokenizer.eos_token_id for span in spans[1:-1:2])
        assert [m["content"] for m in row.conversation.messages[::2]] == [
            toy.tokenizer.decode(span, skip_special_tokens=True) for span in spans[1::2]
        ]
        turns += len(spans) // 2
    assert turns > len(group.rollouts)
    assert max(gaps(toy, [group])) < 1e-4
