"""What the plan says of moments in 8 bits: bytes by hand, the table's line, and the way out of too little memory."""

from __future__ import annotations

import mlx.core as mx
import pytest
from conftest import make_model
from mlx.utils import tree_flatten, tree_map
from planning.loads import workload
from planning.test_plan import planned
from training.test_update import recipe

from grpo.backend.device import on_gpu
from grpo.config import AdapterConfig, OptimConfig
from grpo.planning.held import what_stays
from grpo.planning.plan import ways_out
from grpo.planning.table import table
from grpo.training.optimizer import bytes_of_a_group


@pytest.mark.parametrize(("dtype", "copies"), [(mx.float32, 0), (mx.bfloat16, 4)])
def test_the_bytes_of_packed_moments_are_exact(dtype: mx.Dtype, copies: int) -> None:
    model = make_model("untied")
    model.unfreeze()
    model.update(tree_map(lambda array: array.astype(dtype), model.parameters()))
    sizes = [array.size for _, array in tree_flatten(model.trainable_parameters())]
    large, small = [n for n in sizes if n >= 4096], [n for n in sizes if n < 4096]
    assert len(large) > 3 < len(small)
    assert all(n % 256 == 0 for n in large)
    step_and_rate = 8 + 4
    by_hand = sum(2 * n + 2 * 4 * n // 256 for n in large) + sum(8 * n for n in small) + step_and_rate
    stays = what_stays(OptimConfig(steps=1, moments="int8"), AdapterConfig(type="full"), model, 0)
    assert stays["optimizer"] == by_hand + copies * sum(sizes)


def test_the_plan_counts_what_packing_takes() -> None:
    policy, cfg, plan = planned("untied", "full", moments="int8")
    at_work = bytes_of_a_group(cfg.optim, policy.model.trainable_parameters(), on_gpu())
    assert plan.phases["optimizer's step"] == 4 * plan.trained + at_work
    assert any("moments in 8 bits" in line for line in table(plan, workload(cfg, 16)))


@pytest.mark.parametrize(
    ("settings", "there"),
    [({}, True), ({"moments": "int8"}, False), ({"optimizer": "sgd"}, False), ({"optimizer": "adafactor"}, False)],
)
def test_moments_in_8_bits_are_a_way_out_of_too_little_memory(settings: dict, there: bool) -> None:
    _, _, plan = planned("untied", "full", **settings)
    full, lora = (recipe(adapter={"type": kind}, optim=settings) for kind in ("full", "lora"))
    assert ("optim.moments: int8" in ways_out(plan, workload(full, 16))) == there
    assert "optim.moments: int8" not in ways_out(plan, workload(lora, 16))
