"""One plan for all processes: micro-batches are the same everywhere, slots and the head's logits each one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from grpo.config import OptimConfig
from grpo.planning.plan import Plan
from grpo.recipes import load_recipe
from grpo.runs.prepare import prepare
from grpo.runs.processes import one_plan


def test_each_process_keeps_its_own_slots_and_logits_and_none_computes_two_micro_batches_where_one_cannot(
    recipe: Path,
) -> None:
    prepared = prepare(load_recipe(recipe))
    policy, optim = prepared.trainer.policy, OptimConfig(steps=1)
    plan = replace(prepared.plan, micro_batch=512, slots=4, logits=2**25, lanes=2, alone=False)
    short = replace(plan, slots=2, logits=2**23, lanes=1, alone=True)
    prepared.opened.close()

    def agreed(mine: Plan, theirs: Plan, together: int = 1) -> Plan:
        everyone = SimpleNamespace(gather=lambda one: [(theirs, optim), one])
        ranks = SimpleNamespace(everyone=everyone, shard=SimpleNamespace(size=together))
        return one_plan(ranks, policy, mine, optim)[0]

    for mine, theirs in ((plan, short), (short, plan)):
        made = agreed(mine, theirs)
        assert (made.slots, made.logits, policy.logits) == (mine.slots, mine.logits, mine.logits)
        assert (made.lanes, made.alone) == (1, True)
        made = agreed(mine, theirs, together=2)  # processes that hold a model together decode together
        assert (made.slots, made.logits, policy.logits) == (2, 2**23, 2**23)
    fewer = replace(short, micro_batch=256, checkpointing=True)
    made = agreed(plan, fewer)
    assert (made.micro_batch, made.checkpointing, policy.gradient_checkpointing) == (256, True, True)
    assert made.logits == plan.logits
