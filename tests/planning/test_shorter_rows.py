"""Under a limit of memory micro-batches of shorter rows hold no more tokens than the planned ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planning.loads import workload
from planning.test_budget import choice
from training.test_packing import row
from training.test_update import recipe

from grpo.planning.choosing import Choice
from grpo.training.packing import Packing, pack

PROMPT, LENGTH = 24, 600


def chosen_by(limited: bool, shares: bool, tokens: int | str = "auto") -> Choice:
    cfg = recipe(
        rollout={"prompts_per_step": 4, "num_generations": 4, "max_completion_length": LENGTH},
        optim={"micro_batch_tokens": tokens, "gradient_checkpointing": False, "share_prompts": shares},
    )
    given = choice(2**40, limited=limited)
    machine = replace(given.machine, gpu=False, cuda=False)
    return replace(given, machine=machine, load=workload(cfg, PROMPT))


@pytest.mark.parametrize("shares", [True, False])
def test_shorter_rows_are_no_more_tokens_than_were_planned(shares: bool) -> None:
    given = chosen_by(True, shares)
    found = given.make()
    packing = Packing.of(found.optim, given.load.rollout, gpu=False)
    assert packing.tokens == packing.through(found.shape) < 4_096
    longest = [row(PROMPT, LENGTH, number // 4) for number in range(16)]
    shorter = [row(PROMPT, LENGTH // 2 - 40, number // 4) for number in range(16)]
    (_, shape), *_ = pack(longest, packing)
    assert shape.rows == found.shape.rows
    assert all(packing.through(shape) <= packing.through(found.shape) for _, shape in pack(shorter, packing))


@pytest.mark.parametrize(("limited", "tokens"), [(False, "auto"), (True, 4_096)])
def test_without_a_limit_or_with_the_recipes_own_number_tokens_are_as_said(limited: bool, tokens: int | str) -> None:
    assert chosen_by(limited, True, tokens).make().tokens == 4_096


def test_a_single_row_that_is_longer_leaves_the_tokens_as_they_are() -> None:
    given = chosen_by(True, True)
    long = given.load.rollout.model_copy(update={"max_completion_length": 9_000})
    found = replace(given, load=replace(given.load, rollout=long)).make()
    assert found.tokens in (4_096, 2_048, 1_024, 512, 256)
