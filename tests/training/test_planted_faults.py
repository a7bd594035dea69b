"""What the tests of conversations would not see would be of no use: faults that are planted, and seen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import mlx.core as mx
import pytest
from training.test_conversations_in_a_step import gaps, sampled

from grpo.environments import sampler
from grpo.generation import batchsession, caches, shared
from grpo.generation.batchcaches import BatchCaches
from grpo.generation.rows import Row
from grpo.generation.slots import View

SEEN = 1e-2
"""A gap in nats; without a fault it is below 1e-4."""


@pytest.fixture(params=["own layers", "batch caches"])
def toy(request, make_policy):
    toy = make_policy()
    if request.param == "batch caches":
        toy.generator.decoding = BatchCaches(toy.policy.model, toy.generator.decoding.vocabulary)
    return toy


def worst(toy) -> float:
    return max(gaps(toy, sampled(toy, kept_bytes=None)))


def test_without_a_fault(toy) -> None:
    assert worst(toy) < 1e-4


def test_a_mask_that_is_shifted(toy, monkeypatch) -> None:
    trained = Row.trained.fget
    monkeypatch.setattr(Row, "trained", property(lambda row: [False, *trained(row)[:-1]]))
    assert worst(toy) > SEEN


def test_injected_tokens_that_are_counted(toy, monkeypatch) -> None:
    monkeypatch.setattr(Row, "trained", property(lambda row: [True] * len(row.token_ids)))
    assert worst(toy) > SEEN


def test_a_stop_token_that_is_dropped(toy, monkeypatch) -> None:
    """From what is trained on, but not from what was decoded."""
    made = sampler.trajectory_of

    def dropped(row, *reason):
        end = row.injected[0].start - 1 if row.injected and row.injected[0].start else None
        if end is not None:
            row.injected = [range(span.start - 1, span.stop - 1) for span in row.injected]
            del row.token_ids[end], row.logprobs[end]
        return made(row, *reason)

    monkeypatch.setattr("grpo.environments.play.trajectory_of", dropped)
    assert worst(toy) > SEEN


def wrapped(monkeypatch, change: Callable) -> None:
    """Let `change(extended, model, rows, token_ids, together)` be what feeds tokens that were not sampled."""
    extended = caches.extended
    for module in (shared, batchsession):
        monkeypatch.setattr(module, "extended", lambda *given: change(extended, *given))


def test_positions_that_are_off_by_one_after_an_extension(toy, monkeypatch) -> None:
    def off(extended, model, rows, token_ids, together):
        more = [[ids[0], *ids] if ids else ids for ids in token_ids]  # one more before them, which is cut out again
        found = extended(model, rows, more, False)
        for row, ids in zip(found, token_ids, strict=True):
            for cache in row if ids else ():
                keys, values = cache.keys_and_values()
                cut = keys.shape[2] - len(ids)
                cache.keys = mx.concatenate([keys[:, :, : cut - 1], keys[:, :, cut:]], axis=2)
                cache.values = mx.concatenate([values[:, :, : cut - 1], values[:, :, cut:]], axis=2)
                cache.offset = cut - 1 + len(ids)
        return found

    wrapped(monkeypatch, off)
    assert worst(toy) > SEEN


def test_positions_of_sampled_tokens_that_are_off_by_one(make_policy, monkeypatch) -> None:
    toy, positions = make_policy(), View.positions.func
    monkeypatch.setattr(View, "positions", property(lambda view: positions(view) + (view.decoded > 8)))
    assert worst(toy) > SEEN


def test_answers_that_are_read_without_the_adapter(toy, monkeypatch) -> None:
    adapters = toy.policy.adapters

    @contextmanager
    def without():
        state = adapters.state()
        adapters.load_state({path: mx.zeros_like(array) for path, array in state.items()})
        try:
            yield
        finally:
            adapters.load_state(state)

    def bare(extended, *given):
        with without():
            found = extended(*given)
            mx.eval([cache.state for row in found for cache in row])
            return found

    wrapped(monkeypatch, bare)
    assert worst(toy) > SEEN
