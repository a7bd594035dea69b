"""What work costs at least, worked out by hand for a model that fits on a page."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from grpo.config import AdapterConfig
from grpo.errors import UserError
from grpo.model.adapters import Adapters
from grpo.model.costs import Demand, Product
from grpo.model.outline import costs_of, costs_of_config

QWEN3 = {
    "model_type": "qwen3", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 4, "intermediate_size": 16, "vocab_size": 32, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "max_position_embeddings": 64, "torch_dtype": "bfloat16",
}  # fmt: skip
"""A block's products: q and o 8 × 8, k and v 8 × 4, gate, up and down 8 × 16: 576 weights; its norms 8 + 8 + 4 + 4."""
BLOCK, NORMS, EMBEDDING = 576, 24, 8 * 32


def test_parameters_and_bytes() -> None:
    costs = costs_of_config(QWEN3)
    assert costs.parameters == 2 * (BLOCK + NORMS) + 8 + EMBEDDING == 1464
    assert costs.weight_bytes == 2 * 1464
    assert costs.trained == 0
    assert costs.kv_bytes_per_token == 2 * 2 * 1 * 4 * 2  # keys and values, layers, heads, numbers, bytes
    untied = costs_of_config({**QWEN3, "tie_word_embeddings": False})
    assert untied.parameters == 1464 + EMBEDDING
    assert untied.other_bytes == costs.other_bytes == 2 * (2 * NORMS + 8)


def test_a_decoding_step() -> None:
    costs = costs_of_config(QWEN3)
    # 3 rows: twice the products and the head, and 4 for each pair of tokens, head and number in it, in 2 layers.
    flops = 3 * 2 * (2 * BLOCK + EMBEDDING) + 3 * 5 * 4 * 2 * 2 * 4
    assert costs.decode(3, 5) == Demand(flops, 2 * 1464 + 3 * 5 * 32)
    # 4 of the 5 tokens shared by all: read once.
    assert costs.decode(3, 5, shared=4) == Demand(flops, 2 * 1464 + (4 + 3) * 32)
    assert costs.decode(4, 5, shared=4, groups=2).bytes == 2 * 1464 + (2 * 4 + 4) * 32


def test_a_prefill_has_no_head_and_half_the_pairs() -> None:
    found = costs_of_config(QWEN3).prefill(2, 3)
    assert found.flops == 2 * 3 * 2 * 2 * BLOCK + 2 * (1 + 2 + 3) * 64
    assert found.bytes == 2 * (1464 - EMBEDDING) + 2 * 3 * 32


def test_an_update_of_an_adapter_and_of_all_weights() -> None:
    # 1 prompt of 3 tokens and 2 completions of 2: 7 tokens, 4 of them predicted; pairs 6 + 2 × (2 × 3 + 3) = 24.
    rank = 2  # A and B of a block: 7 layers, inputs + outputs 16 + 12 + 12 + 16 + 3 × 24 = 128
    lora = 2 * 128 * rank
    costs = costs_of_config(QWEN3, AdapterConfig(rank=rank))
    assert costs.trained == lora
    frozen = 2 * 2 * (7 * 2 * BLOCK + 4 * EMBEDDING)  # forward, and back to the inputs
    attention = 3 * 24 * 64
    kept = 2 * 2 * 7 * 8 * 2  # read and written, layers, tokens, numbers, bytes
    update = costs.update(1, 3, 2, 2)
    assert update.flops == frozen + 3 * 2 * 7 * lora + attention
    assert update.bytes == 2 * 2 * (1464 + lora) + kept + lora * 2 * (2 + 2 + 8)
    full = costs_of_config(QWEN3, AdapterConfig(type="full")).update(1, 3, 2, 2)
    assert full.flops == frozen * 3 // 2 + attention
    assert full.bytes == 2 * 2 * 1464 + kept + 1464 * 2 * (2 + 2 + 8)


def test_logprobs_are_a_forward_pass_whose_head_meets_completions_alone() -> None:
    costs = costs_of_config(QWEN3)  # 7 tokens, 4 predicted, 24 pairs: as above
    forward = Demand(7 * 2 * 2 * BLOCK + 24 * 64, 2 * (1464 - EMBEDDING))
    assert costs.forward(1, 3, 2, 2) == forward
    assert costs.logprobs(1, 3, 2, 2) == forward + Demand(4 * 2 * EMBEDDING, 2 * EMBEDDING)


def test_quantised_weights_count_as_numbers_and_weigh_their_bits() -> None:
    wide = {**QWEN3, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 16}
    plain = costs_of_config(wide)
    quantised = costs_of_config({**wide, "quantization": {"group_size": 64, "bits": 4}})
    assert quantised.parameters == plain.parameters
    assert [p.flops for p in quantised.products] == [p.flops for p in plain.products]
    # 4 bits a weight, and of each 64 a scale and an offset of 16 bits: 4.5.
    assert quantised.head.nbytes == 32 * 64 * 4.5 / 8
    kept = costs_of_config({**wide, "quantization": {"group_size": 64, "bits": 4, "model.embed_tokens": False}})
    assert kept.head.nbytes == 32 * 64 * 2


def test_experts_are_read_as_they_are_met() -> None:
    moe = {
        **QWEN3, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "moe_intermediate_size": 16, "norm_topk_prob": True,
    }  # fmt: skip
    costs = costs_of_config(moe)
    attention, expert, router = 192, 384, 32
    assert costs.parameters == 2 * (attention + 4 * expert + router + NORMS) + 8 + EMBEDDING
    one, two = costs.decode(1, 1), costs.decode(2, 1)
    assert one.flops == 2 * (2 * (attention + router + 2 * expert) + EMBEDDING) + 64
    # One token meets half of the experts; of two, each expert is missed by both with probability a quarter.
    rest = 2 * (2 * (attention + router + NORMS) + 8 + EMBEDDING)
    assert one.bytes == rest + 2 * 2 * 4 * expert * 0.5 + 32
    assert two.bytes == rest + 2 * 2 * 4 * expert * 0.75 + 2 * 32
    lora = costs_of_config(moe, AdapterConfig(rank=2))
    adapted = [p for p in lora.products if p.trains and p.experts == 4]
    assert {(p.inputs, p.outputs, p.used) for p in adapted} == {(8, 2, 2), (2, 16, 2), (16, 2, 2), (2, 8, 2)}


def test_the_slower_of_bytes_and_operations_counts() -> None:
    work = Demand(flops=100, bytes=10) + Demand(flops=100, bytes=0)
    assert work.seconds(flops_per_second=100, bytes_per_second=10) == 2
    assert (work * 2).seconds(flops_per_second=1000, bytes_per_second=10) == 2
    assert Product(2, 3, nbytes=12).read(5) == 12


@pytest.mark.parametrize("kind", ["tied", "untied", "dense", "llama", "quantised", "moe", "gemma2", "gemma3_text"])
def test_a_model_that_is_there_is_counted_as_it_is(zoo, kind: str) -> None:
    model = zoo(kind)
    Adapters(model, AdapterConfig(rank=2), mx.random.key(0))
    costs, arrays = costs_of(model), tree_flatten(model.parameters())
    assert costs.weight_bytes == sum(a.nbytes for _, a in arrays)
    if kind != "quantised":
        assert costs.parameters == sum(a.size for _, a in arrays)
    assert costs.trained == sum(a.size for _, a in tree_flatten(model.trainable_parameters()))


def test_nothing_is_computed_for_a_config() -> None:
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    wide = {**QWEN3, "hidden_size": 4096, "intermediate_size": 16384, "vocab_size": 100_000}
    assert costs_of_config(wide).parameters > 10**9 * 0.5
    assert mx.get_peak_memory() - before < 2**20


def test_a_config_that_mlx_lm_does_not_know() -> None:
    with pytest.raises(UserError, match="mlx-lm cannot build a model from it"):
        costs_of_config({**QWEN3, "model_type": "nope"})
