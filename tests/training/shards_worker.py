"""One process of several that hold a model together, for test_shards.py: `OUT`, and what to make there."""

import grpo  # noqa: F401  before mlx, so that the BLAS is in place

# isort: split

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from architectures.small import COMMON, SMALL
from conftest import make_model
from mlx.utils import tree_flatten
from training.sections import make_batches, updater, with_advantages, with_anchor
from training.test_update import groups, recipe

from grpo.backend.ranks import Ranks
from grpo.config import AdapterConfig
from grpo.errors import UserError
from grpo.generation.choice import find_decoding
from grpo.generation.rows import Line, SharedPrompt
from grpo.generation.slots import Size
from grpo.model import tensor
from grpo.model.adapters import Adapters
from grpo.model.mlxlm import new_model
from grpo.model.policy import Policy
from grpo.model.tensor import TRAINED, divide
from grpo.model.trial import check_divided
from grpo.planning import parity

SIZES = {
    "vocab_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "head_dim": 32,
}
"""What two and four processes can divide, and what quantised rows can be divided into whole groups of 64."""

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("tied", {}, {}),
    "dora": ("tied", {}, {"type": "dora"}),
    "quantised": ("quantised", {}, {}),
    "quantised-dora": ("quantised", {}, {"type": "dora"}),
    "experts": ("moe", {"moe_intermediate_size": 64}, {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {"type": "dora"}),
    "some": ("untied", {}, {"targets": ("q_proj", "down_proj"), "layers": (1, 2)}),
    "dropout": ("tied", {}, {"dropout": 0.3}),
}
"""A model of the zoo, what differs in it, and what differs in the adapter."""
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "router": ("moe", {"moe_intermediate_size": 64}, {"targets": ("mlp.gate", "q_proj")}),
    "latent": ("DeepSeek-V3, Kimi K2", {}, {}),
}
CASES |= REFUSED
FAMILIES = "Qwen2.5", "Qwen3", "Qwen3-MoE (30B-A3B)", "GLM-4.5-Air", "Llama 3", "Mistral", "gpt-oss", "Ministral 3"
CASES |= {name: (name, {}, {}) for name in FAMILIES}
MINISTRAL = {
    "model_type": "ministral3",
    "head_dim": 32,
    "rope_parameters": {
        "rope_theta": 1e4,
        "rope_type": "default",
        "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 64,
    },
}


def shaken(adapters: Adapters) -> None:
    """Draw all that trains anew, the same in any number of processes, with B that is not zero."""
    shards = adapters.shards
    state = {path: mx.zeros(shards.shape(path, array)) for path, array in adapters.state().items()}
    keys = mx.random.split(mx.random.key(1), len(state))
    drawn = {
        path: 0.05 * mx.random.normal(array.shape, key=key) + (1.0 if path.endswith(".m") else 0.0)
        for (path, array), key in zip(state.items(), keys, strict=True)
    }
    adapters.load_state(shards.part(drawn))


def make_policy(case: str, ranks: Ranks, **more: Any) -> Policy:
    """The policy of a case, of which `ranks.shard` hold the model together."""
    kind, changes, adapter = CASES[case]
    if case == "latent":  # as if nobody had looked
        tensor.TRAINED = (*TRAINED, "deepseek_v3")
    model = small_model(kind) if kind in (*FAMILIES, *SMALL) else make_model(kind, **SIZES, **changes)
    if "bias" in str([path for path, _ in tree_flatten(model.parameters())]) and kind == "llama":
        model.apply_to_modules(_draw_biases)
    divide(model, ranks.shard)
    mx.eval(model.parameters())
    adapters = Adapters(model, AdapterConfig(rank=4, **adapter), mx.random.key(0), ranks=ranks.shard)
    check_divided(model, ranks.shard)
    return Policy(model, adapters, 1.0, **more)


def small_model(name: str) -> nn.Module:
    """One of the architectures that people train."""
    mx.random.seed(0)
    model = new_model({**COMMON, **SMALL.get(name, MINISTRAL)})
    model.freeze()
    mx.eval(model.parameters())
    return model


def _draw_biases(path: str, module: nn.Module) -> None:
    """Those of a fresh model are small."""
    if "bias" in module:
        module.bias = mx.random.normal(module.bias.shape, key=mx.random.key(len(path)))


def decoded(policy: Policy) -> tuple[str, list[list[float]]]:
    """How the policy is decoded, and the logits behind a few tokens that are fed by that way."""
    decoding = find_decoding(policy.model)
    session = decoding.open(Size(slots=2, places=2, prefix=4, columns=3))
    session.admit([0, 1], [Line(SharedPrompt(prompt)) for prompt in ([1, 2, 3], [4, 5, 6, 7])])
    logits = [session.logits(mx.array(tokens)).astype(mx.float32) for tokens in ([3, 7], [9, 11])]
    mx.eval(logits)
    decoding.close(session)
    return decoding.description, [row for step in logits for row in step.tolist()]


def made(case: str, ranks: Ranks, out: Path) -> None:
    """Write all of one case: what a fresh adapter is, the logprobs, a gradient, and two updates, whole."""
    policy = make_policy(case, ranks, gradient_checkpointing=case == "some")
    adapters = policy.adapters
    rank = ranks.everyone.rank

    def write(name: str, arrays: dict[str, mx.array]) -> None:
        mx.save_safetensors(str(out / f"{case}-{name}-{rank}.safetensors"), arrays)

    write("fresh", adapters.whole_state())
    with parity._moved(policy, 0, 0.05):
        write("tried", adapters.whole_state())
    shaken(adapters)
    way, logits = decoded(policy)
    dropout = CASES[case][2].get("dropout", 0.0)
    cfg = recipe(loss={"type": "grpo"}, adapter={"dropout": dropout})
    batches = make_batches(with_advantages(groups(policy), cfg), cfg)
    if dropout:
        (batches,) = with_anchor([batches], policy, cfg)
    mine = ranks.share(batches)
    update = updater(policy, cfg, ranks=ranks)
    key = mx.random.key(7) if dropout else None
    found = update.gradient(mine, key)
    write("gradient", adapters.shards.whole(found.arrays))
    norm = update._norm(found.arrays).item()
    results = [update([mine], step) for step in (1, 2)]
    write("policy", adapters.whole_state())
    write("optimizer", adapters.shards.whole(tree_flatten(update.optimizer.state, destination={})))
    behaviour = [batch.behaviour.tolist() for batch in batches]
    facts = {
        "loss": found.loss,
        "norm": norm,
        "norms": [result.grad_norm for result in results],
        "delta": adapters.delta(),
        "logits": logits,
        "behaviour": behaviour,
    }
    bytes_here = sum(array.nbytes for _, array in tree_flatten(policy.model.parameters()))
    notes = {"way": way, "slow": policy.slow, "bytes": bytes_here}
    (out / f"{case}-{rank}.json").write_text(json.dumps({"facts": facts, "notes": notes}))


def refused(case: str, ranks: Ranks, out: Path) -> None:
    """Write why a case is refused."""
    with suppress(UserError):
        try:
            make_policy(case, ranks)
        except UserError as error:
            (out / f"{case}-{ranks.everyone.rank}.txt").write_text(str(error))
            raise


if __name__ == "__main__":
    ranks = Ranks.launched().divided(None)
    for case in sys.argv[2].split(","):
        (refused if case in REFUSED else made)(case, ranks, Path(sys.argv[1]))
