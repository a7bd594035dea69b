"""Ways of decoding: each agrees with the model's plain forward pass, and the right one is chosen."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from grpo.backend.random import derive_key
from grpo.generation import choice, seats
from grpo.generation.attention import FusedRowAttention, StockAttention
from grpo.generation.batchcaches import BatchCaches
from grpo.generation.blocks import read
from grpo.generation.buffers import cache_shapes
from grpo.generation.choice import find_decoding
from grpo.generation.decoders import BlockDecoder, ModelDecoder
from grpo.generation.decoding import SharedPrefix
from grpo.generation.generator import Generator, Request
from grpo.generation.joined import Unread
from grpo.generation.rows import Line, SharedPrompt, Submission
from grpo.generation.sampling import Sampling
from grpo.generation.slots import Size

KEY = derive_key(0, "test")
VOCABULARY = 64
PROMPTS = [[5, 6, 7, 8, 9], [11], list(range(20, 40))]


def made(module: str, **changes) -> nn.Module:
    """A small model of one of mlx-lm's architectures with random weights."""
    import importlib

    mx.random.seed(0)
    file = importlib.import_module(f"mlx_lm.models.{module}")
    common = {
        "model_type": module, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    model = file.Model(file.ModelArgs.from_dict({**common, **changes}))
    model.update({})
    # Norms and biases start as ones and zeros, which would hide that they are used.
    for _, array in tree_flatten(model.parameters()):
        if array.ndim == 1 and array.dtype == mx.float32:
            array[:] = array + 0.3 * mx.random.normal(array.shape)
    mx.eval(model.parameters())
    return model


LLAMA_LIKE = {
    "llama": made("llama"),
    "llama3 rope": made(
        "llama", rope_scaling={"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    ),
    "llama with biases": made("llama", attention_bias=True, mlp_bias=True),
    "llama, traditional rope": made("llama", rope_traditional=True),
    "qwen2": made("qwen2"),
    "qwen3": made("qwen3", head_dim=16),
    "qwen3, tied": made("qwen3", head_dim=16, tie_word_embeddings=True),
}
OTHERS = {
    "qwen3 moe": made(
        "qwen3_moe", head_dim=16, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[],
        moe_intermediate_size=16, norm_topk_prob=True,
    ),
    "granite": made(
        "granite", logits_scaling=2.0, attention_multiplier=0.2, embedding_multiplier=3.0, residual_multiplier=0.5,
        attention_bias=False, mlp_bias=False,
    ),
    "olmo2": made("olmo2"),
    "deepseek-v2, latent attention": made(
        "deepseek_v2", moe_intermediate_size=16, n_shared_experts=1, n_routed_experts=4, kv_lora_rank=16,
        q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8, num_experts_per_tok=2,
        first_k_dense_replace=1, n_group=1, topk_group=1, moe_layer_freq=1, topk_method="greedy",
        rope_scaling={"factor": 1, "mscale_all_dim": 0, "beta_fast": 32, "beta_slow": 1, "mscale": 1,
                      "original_max_position_embeddings": 512, "type": "yarn"},
    ),
}  # fmt: skip
FOREIGN = {
    "gemma3, sliding windows": made("gemma3_text", head_dim=16, sliding_window=8, sliding_window_pattern=2),
    "qwen3-next, recurrent state": made(
        "qwen3_next", head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, linear_conv_kernel_dim=4, num_experts=4, num_experts_per_tok=2,
        decoder_sparse_step=1, shared_expert_intermediate_size=16, mlp_only_layers=[], moe_intermediate_size=16,
        partial_rotary_factor=0.5, full_attention_interval=3,
    ),
    "mamba, a state that padding would change": made(
        "mamba", state_size=8, conv_kernel=4, use_bias=False, use_conv_bias=True, time_step_rank=4
    ),
    "falcon-h1, both kinds of cache in a layer": made(
        "falcon_h1", head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
        mamba_d_conv=4, mamba_expand=1, mamba_chunk_size=16, mamba_conv_bias=True, mamba_proj_bias=False,
        mamba_norm_before_gate=False, mamba_rms_norm=False, mamba_use_mlp=True, attention_bias=False, mlp_bias=False,
        attention_in_multiplier=1.0, attention_out_multiplier=1.0, embedding_multiplier=1.0, key_multiplier=1.0,
        lm_head_multiplier=1.0, mlp_multipliers=[1.0, 1.0], ssm_in_multiplier=1.0, ssm_multipliers=[1.0] * 5,
        ssm_out_multiplier=1.0, projectors_bias=False,
    ),
    "gemma2, no masks of several rows": made(
        "gemma2", head_dim=16, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=16
    ),
}  # fmt: skip


class Letters:
    eos_token_ids = frozenset({0, 1, 2, 3, 4})

    def decode(self, ids, **_kwargs) -> str:
        return " ".join(map(str, ids))


def worst_gap(model, generator, slots: int) -> float:
    """The largest difference from teacher forcing, with slots that are taken more than once."""
    generator.slots = slots
    groups = generator.generate([Request(ids, 3) for ids in PROMPTS], Sampling(1.0, 12), KEY)
    worst = 0.0
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            tokens = mx.array([[*prompt, *completion.token_ids]])
            logits = model(tokens[:, :-1])[0, len(prompt) - 1 :].astype(mx.float32)
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            forced = mx.take_along_axis(logprobs, tokens[0, len(prompt) :, None], axis=-1)[:, 0]
            worst = max(worst, mx.abs(forced - mx.array(completion.behaviour)).max().item())
    return worst


@pytest.mark.each_value
@pytest.mark.parametrize("name", LLAMA_LIKE)
@pytest.mark.parametrize("slots", [9, 2])
def test_llama_like_models_are_decoded_from_joined_layers(name: str, slots: int) -> None:
    generator = Generator(LLAMA_LIKE[name], Letters(), slots)
    assert generator.decoding.description == "joined layers, shared prompts, stock operations"
    assert worst_gap(LLAMA_LIKE[name], generator, slots) < 1e-4


@pytest.mark.each_value
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("slots", [9, 2])
def test_other_models_with_plain_caches_share_prompts_too(name: str, slots: int) -> None:
    generator = Generator(OTHERS[name], Letters(), slots)
    assert generator.decoding.description == "the model's layers, shared prompts, stock operations"
    assert worst_gap(OTHERS[name], generator, slots) < 1e-4


@pytest.mark.each_value
@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("slots", [9, 2])
def test_models_with_other_caches_go_through_mlx_lm_s(name: str, slots: int) -> None:
    generator = Generator(FOREIGN[name], Letters(), slots)
    assert isinstance(generator.decoding, BatchCaches)
    assert "mlx-lm's batch caches" in generator.decoding.description
    assert worst_gap(FOREIGN[name], generator, slots) < 1e-4


def test_rows_go_one_by_one_only_where_they_must() -> None:
    ways = {name.split(",")[0]: find_decoding(model) for name, model in FOREIGN.items()}
    assert [name for name, decoding in ways.items() if "row by row" in decoding.description] == ["gemma2"]


@pytest.mark.parametrize("name", FOREIGN)
def test_what_mlx_lm_s_caches_will_hold_is_known(name: str) -> None:
    """The caches' own size, of rows that are all of full length."""
    decoding = find_decoding(FOREIGN[name])
    prompts = [[5 + i] * 300 for i in range(2)]
    session = decoding.open(Size(slots=4, places=2, prefix=299, columns=300))
    first, second = (SharedPrompt(prompt, 2) for prompt in prompts)
    session.admit([0, 1, 2, 3], [Line(first), Line(first), Line(second), Line(second)])
    held = sum(cache.nbytes for batch in session._batches for cache in batch.caches)
    planned = decoding.memory(4, 2, 300, 1)
    assert held <= planned < 5 * held  # a sliding window is wider while a prompt goes in


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models(bits: int) -> None:
    model = made("qwen3", head_dim=16)
    nn.quantize(
        model,
        group_size=32,
        bits=bits,
        class_predicate=lambda _, m: isinstance(m, nn.Linear) and m.weight.shape[1] % 32 == 0,
    )
    generator = Generator(model, Letters(), 2)
    assert generator.decoding.description.startswith("joined layers")
    assert worst_gap(model, generator, 2) < 1e-4


def test_layers_quantised_differently_are_not_joined() -> None:
    model = made("qwen3", head_dim=16)
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda path, m: path.endswith("q_proj"))
    generator = Generator(model, Letters(), 2)
    assert generator.decoding.description.startswith("the model's layers")
    assert worst_gap(model, generator, 2) < 1e-4


def test_a_model_that_only_looks_like_llama_is_found_out() -> None:
    """The parts have the names of Llama's, but the layer does something else with them."""
    model = made("llama")

    class Doubled(type(model.layers[0])):
        def __call__(self, x, mask=None, cache=None):
            return 2 * super().__call__(x, mask, cache)

    model.layers[1].__class__ = Doubled
    assert read(model).layers
    generator = Generator(model, Letters(), 4)
    assert generator.decoding.description.startswith("the model's layers")
    assert worst_gap(model, generator, 4) < 1e-4


def test_a_part_that_is_not_known_is_not_read() -> None:
    model = made("llama")
    model.layers[0].mlp.extra = nn.Linear(4, 4)
    with pytest.raises(Unread, match=r"parts that Llama does not have: mlp\.extra\.bias, mlp\.extra\.weight"):
        read(model)


def test_attention_that_does_not_go_through_mlx_lm_s_function_falls_back(monkeypatch) -> None:
    model = made("olmo2")
    monkeypatch.setattr(choice, "_fault", lambda *_: "said so")
    decoding = find_decoding(model)
    assert isinstance(decoding, BatchCaches)
    assert "stock operations: said so" in decoding.description


def test_the_original_attention_is_back_after_a_step() -> None:
    from mlx_lm.models import base, olmo2

    worst_gap(OTHERS["olmo2"], Generator(OTHERS["olmo2"], Letters(), 3), 3)
    assert olmo2.scaled_dot_product_attention is base.scaled_dot_product_attention


@pytest.mark.each_value
@pytest.mark.parametrize("decoder", [BlockDecoder, ModelDecoder])
@pytest.mark.parametrize("attention", [StockAttention, FusedRowAttention])
@pytest.mark.parametrize("slots", [4, 1])
def test_every_decoder_and_attention_serves_the_same_model(decoder, attention, slots: int) -> None:
    model = LLAMA_LIKE["qwen3"]
    inner = read(model) if decoder is BlockDecoder else model
    decoding = SharedPrefix(model, decoder(inner), attention(), cache_shapes(model), VOCABULARY, "")
    generator = Generator(model, Letters(), slots)
    generator.decoding = decoding
    assert worst_gap(model, generator, slots) < 1e-4


@pytest.mark.slow
def test_prompts_are_not_repeated_for_their_rows() -> None:
    """Eight rows of a long prompt hold it once: the peak says so."""
    model = LLAMA_LIKE["llama"]
    generator = Generator(model, Letters(), 8)
    prompt = [5 + i % 50 for i in range(4000)]
    once = sum(shape.bytes_per_token for shape in cache_shapes(model)) * len(prompt)

    def peak(n: int) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        generator.generate([Request(prompt, n)], Sampling(1.0, 4), KEY)
        return mx.get_peak_memory() - before

    peak(1)
    assert peak(8) - peak(1) < 2 * once  # seven copies more would be seven times


def test_buffers_are_written_in_place(monkeypatch) -> None:
    """The peak of many steps is the buffers' own size: no step makes a copy of any of them, however large they are."""
    monkeypatch.setattr(seats, "columns_for", lambda _, longest: longest)
    model = made("llama", num_hidden_layers=2)
    generator = Generator(model, Letters(), 8)
    generator.stop_ids = frozenset()
    ring = 160_000
    own = sum(shape.bytes_per_token for shape in cache_shapes(model)) * ring
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    engine = generator.open()
    (row,) = engine.submit(Submission([5, 6, 7], Sampling(1.0, ring), seed=3))
    while len(row.token_ids) < 12:
        engine.step()
    assert own < mx.get_peak_memory() - before < 1.1 * own
    engine.close()
