"""One process of several that spread a model's weights, for test_fsdp.py: `OUT`, what to make there, and
how to spread: `plain` for not at all, `spread` over all, or `groups` of two."""

import grpo  # noqa: F401  before mlx, so that the BLAS is in place

# isort: split

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import standin_groups
from conftest import make_model
from mlx.utils import tree_flatten
from training.sections import make_batches, updater, with_advantages, with_anchor, with_reference
from training.shards_worker import SIZES, shaken
from training.test_update import groups, recipe

from grpo.backend.ranks import Ranks
from grpo.config import AdapterConfig
from grpo.model import parts
from grpo.model.adapters import Adapters
from grpo.model.fsdp import Spread
from grpo.model.joined import Joined, write_joined
from grpo.model.parts import LEAST
from grpo.model.policy import Policy
from grpo.training import batches as batches_room
from grpo.training.packing import Packing, Sample, Shape, pack

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "lora": ("tied", {}, {}, {}),
    "full": ("tied", {}, {"type": "full"}, {}),
    "untied": ("untied", {}, {"type": "full"}, {}),
    "blocks": ("tied", {}, {"type": "full", "layers": (1, 2)}, {}),
    "dora": ("tied", {}, {"type": "dora"}, {}),
    "quantised": ("quantised", {}, {}, {}),
    "experts": ("moe", {"moe_intermediate_size": 64}, {"type": "full"}, {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {"type": "full"}, {}),
    "dropout": ("tied", {}, {"dropout": 0.3}, {}),
    "packed": ("tied", {}, {"type": "full"}, {"moments": "int8"}),
    "odd": ("tied", {"intermediate_size": 101, "vocab_size": 197}, {"type": "full"}, {}),
    "no head": ("gemma2", {}, {"type": "full"}, {}),
    "few": ("tied", {}, {"type": "full"}, {"micro_batch_tokens": 10_000}),
    "mixed": ("tied", {}, {"type": "full"}, {}),
}
"""A model of the zoo, what differs in it, in the adapter, and in the optimizer's section."""


def make_policy(case: str, ranks: Ranks, spreads: str) -> Policy:
    """The policy of a case, whose weights `ranks` spread, if it `spreads` them: among all, or in `groups` of two."""
    parts.LEAST = 2**9 if case == "quantised" else LEAST  # eight numbers of 4 bits lie in one
    kind, changes, adapter, _ = CASES[case]
    model, full = make_model(kind, **{**(SIZES if kind != "gemma2" else {}), **changes}), adapter.get("type") == "full"
    adapters = Adapters(model, AdapterConfig(**({} if full else {"rank": 4}), **adapter), mx.random.key(0))
    if not full:
        shaken(adapters)
    policy = Policy(model, adapters, 1.0)
    if spreads != "plain":
        divided = ranks.divided(2 if spreads == "groups" else None)
        policy.spread = Spread(model, adapters, policy.split and policy.split[1], divided.shard, divided)
    return policy


def one_alone(rows: Sequence[Sample], packing: Packing) -> list[tuple[list[int], Shape]]:
    """Micro-batches as a GPU has them beside a long completion: that in a line of its own, and others in rows."""
    others = [([1 + row for row in held], shape) for held, shape in pack(rows[1:], packing)]
    return [([0], packing.shape_of_rows(1, 32)), *others]


def made(case: str, ranks: Ranks, out: Path, spreads: str = "plain") -> None:
    """Write all of one case: a gradient, and two updates, whole."""
    policy, rank = make_policy(case, ranks, spreads), ranks.rank
    whole = sum(array.nbytes for _, array in tree_flatten(policy.model.parameters()))
    before = dict(tree_flatten(policy.model.parameters()))

    def write(name: str, arrays: dict[str, mx.array]) -> None:
        mx.save_safetensors(str(out / f"{case}-{name}-{rank}.safetensors"), arrays)

    loss, dropout = {"type": "grpo", "beta": 0.1}, {"dropout": 0.3} if case == "dropout" else {}
    batches_room.pack = one_alone if case == "mixed" else pack
    cfg = recipe(loss=loss, optim=CASES[case][3], adapter=dropout)
    batches = with_reference(make_batches(with_advantages(groups(policy), cfg), cfg), policy, cfg)
    if case == "dropout":
        (batches,) = with_anchor([batches], policy, cfg)
    mine = ranks.share(batches)
    update = updater(policy, cfg, ranks=ranks)
    key = mx.random.key(7) if case == "dropout" else None
    with policy.spreading():
        held = sum(array.nbytes for _, array in tree_flatten(policy.model.parameters()))
        found = update.gradient(mine, key)
    write("gradient", policy.shards.whole(found.arrays))
    for path, array in tree_flatten(policy.model.parameters()):
        assert mx.array_equal(array, before[path]), path
    del before
    norm = update._norm(found.arrays).item()
    results = [update([mine], step) for step in (1, 2)]
    write("policy", policy.adapters.state())
    joined = Joined(policy.shards, tree_flatten(update.optimizer.state, destination={}))
    write_joined(out / f"{case}-optimizer-{rank}.safetensors", joined)
    assert not joined.unread
    facts = {
        "loss": found.loss,
        "norm": norm,
        "norms": [result.grad_norm for result in results],
        "delta": policy.adapters.delta(),
    }
    notes = {"bytes": whole, "held": held, "batches": len(batches)}
    (out / f"{case}-{rank}.json").write_text(json.dumps({"facts": facts, "notes": notes}))


if __name__ == "__main__":
    if sys.argv[3] == "groups":
        standin_groups.install()
    ranks = Ranks.launched()
    for case in sys.argv[2].split(","):
        made(case, ranks, Path(sys.argv[1]), sys.argv[3])
