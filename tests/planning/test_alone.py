"""Micro-batches go one after the other where two in parallel do not fit."""

from __future__ import annotations

from dataclasses import replace

from planning.loads import workload
from training.test_update import recipe as settings

from grpo.planning.choosing import Choice, Chosen
from grpo.planning.footprint import Footprint
from grpo.planning.machines import Machine
from grpo.recipes import load_recipe
from grpo.runs.prepare import prepare


def chosen(room: int, **optim) -> Chosen:
    """By hand: a token takes 9,000 bytes, or 6,000 with its layers checkpointed, on a CPU with two lanes."""
    rollout = {"prompts_per_step": 8, "num_generations": 8, "max_completion_length": 125}
    cfg = settings(rollout=rollout, optim={"micro_batch_tokens": "auto", **optim})

    def footprint(checkpointing: bool) -> Footprint:
        return Footprint(0, 6_000 if checkpointing else 9_000, 0.0, 0, 1, True, checkpointing)

    load = replace(workload(cfg, 250), parts=2)
    machine = Machine(2**33, False, False, limited=True)
    return Choice(machine, load, room, 8, footprint, lanes=lambda _, parts: min(2, parts)).make()


def test_two_lanes_count_twice_and_one_is_taken_where_two_do_not_fit() -> None:
    ample = chosen(2**40)
    assert (ample.lanes, ample.alone, ample.checkpointing) == (2, False, False)
    assert ample.bytes == 2 * 9_000 * ample.shape.tokens
    # The smallest that pays, a prompt with two completions, does not fit twice: better one alone than two checkpointed.
    short = chosen(2 * 9_000 * 500 - 1)
    assert (short.lanes, short.alone, short.checkpointing) == (1, True, False)
    assert short.bytes == 9_000 * short.shape.tokens < 2 * 9_000 * 500


def test_one_lane_is_the_last_resort_where_checkpointing_is_asked_for() -> None:
    row = 250 + 125
    twice = chosen(2 * 6_000 * row, gradient_checkpointing=True, micro_batch_tokens=row)
    assert (twice.lanes, twice.alone, twice.bytes) == (2, False, 2 * 6_000 * row)
    once = chosen(2 * 6_000 * row - 1, gradient_checkpointing=True, micro_batch_tokens=row)
    assert (once.lanes, once.alone, once.bytes) == (1, True, 6_000 * row)


def test_what_fits_nowhere_is_told_with_the_least_that_is_needed() -> None:
    assert chosen(1_000).bytes == 6_000 * (250 + 125)
    assert chosen(1_000).alone


def test_a_run_heeds_its_plan(recipe, monkeypatch) -> None:
    assert not prepare(load_recipe(recipe)).trainer.update.gradients.alone
    genuine = Choice.make
    monkeypatch.setattr(Choice, "make", lambda self: replace(genuine(self), lanes=1, alone=True))
    run = prepare(load_recipe(recipe))
    assert run.plan.alone
    assert run.trainer.update.gradients.alone
    assert any(line.endswith(", one after the other: two in parallel do not fit") for line in run.plan.lines())
