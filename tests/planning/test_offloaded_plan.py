"""`optim.offload_activations` in a plan: layers are checkpointed, and their inputs are not counted on the device."""

from __future__ import annotations

import mlx.core as mx
import pytest
from model.vaults import Emptied
from planning.loads import workload
from planning.test_budget import policy_of
from training.test_update import recipe

from grpo.planning.choosing import Checkpointing, Choice
from grpo.planning.footprint import Footprint, measure_body
from grpo.planning.machines import Machine
from grpo.training.packing import Shape


@pytest.mark.parametrize(
    ("offloads", "limited", "layers"), [(True, False, True), (True, True, 1), (False, False, False)]
)
def test_auto_checkpoints_layers_where_their_inputs_are_offloaded(
    offloads: bool, limited: bool, layers: Checkpointing
) -> None:
    """With a limit as few of the eight as fit, which with all this room is one."""
    cfg = recipe(optim={"micro_batch_tokens": "auto", "offload_activations": offloads})

    def footprint(checkpointing: bool) -> Footprint:
        return Footprint(0, 1_000 if checkpointing else 9_000, 0.0, 0, 1, True, checkpointing)

    found = Choice(Machine(2**40, True, True, limited), workload(cfg, 128), 2**40, 8, footprint).make()
    assert repr(found.checkpointing) == repr(layers)  # True is 1
    assert found.optim.gradient_checkpointing == layers


def test_what_is_measured_leaves_layers_inputs_out() -> None:
    policy, shape = policy_of(16, hidden_size=64, intermediate_size=64), Shape(1, 24, 8, 60)
    (held,) = measure_body(policy, True, [shape])
    policy.vault = Emptied()
    (offloaded,) = measure_body(policy, True, [shape])
    inputs = 16 * shape.tokens * 64 * mx.float32.size
    assert held - offloaded > inputs / 2
