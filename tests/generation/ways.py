"""Small models behind each way of decoding, and what tests of the engine do with them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import pytest

from grpo.generation.attention import Attention, FusedRowAttention, StockAttention
from grpo.generation.batchcaches import BatchCaches
from grpo.generation.blocks import read
from grpo.generation.buffers import cache_shapes
from grpo.generation.decoders import BlockDecoder, ModelDecoder
from grpo.generation.decoding import Decoding, SharedPrefix
from grpo.generation.engine import Engine
from grpo.generation.generator import Generator
from grpo.generation.rows import Row, Submission
from grpo.generation.sampling import Sampling

VOCABULARY = 128
STOPS = frozenset(range(8))
LONG = tuple(range(20, 45))
exact_buffers = pytest.mark.skipif(
    mx.cuda.is_available(), reason="CUDA's allocator makes buffers larger than asked for: up to twice, or 16 KiB more"
)
"""Of tests that count the bytes of single arrays."""


def held() -> int:
    """Bytes of all arrays, after what computes with them is done."""
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


class Numbers:
    """A tokenizer whose text is the tokens' numbers."""

    eos_token_ids = STOPS
    added_tokens_decoder: dict[int, object] = {}  # noqa: RUF012

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return " ".join(map(str, ids))


class Overlapping(StockAttention):
    """Stock operations in the order that kernels run in: right, though MLX copies the buffers then."""

    overlaps = True


def model_of(architecture: str, **changes: object) -> nn.Module:
    """A small model with random weights."""
    mx.random.seed(0)
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    config = {
        "model_type": architecture, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": False,
        **changes,
    }  # fmt: skip
    model = module.Model(module.ModelArgs.from_dict(config))
    model.freeze()
    mx.eval(model.parameters())
    return model


def qwen() -> nn.Module:
    return model_of("qwen3")


def sliding() -> nn.Module:
    return model_of("gemma3_text", sliding_window=8, sliding_window_pattern=2)


def recurrent() -> nn.Module:
    return model_of(
        "qwen3_next", linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, linear_conv_kernel_dim=4, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1,
        shared_expert_intermediate_size=16, mlp_only_layers=[], moe_intermediate_size=16, partial_rotary_factor=0.5,
        full_attention_interval=2,
    )  # fmt: skip


def latent() -> nn.Module:
    return model_of(
        "falcon_h1", head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
        mamba_d_conv=4, mamba_expand=1, mamba_chunk_size=16, mamba_conv_bias=True, mamba_proj_bias=False,
        mamba_norm_before_gate=False, mamba_rms_norm=False, mamba_use_mlp=True, attention_bias=False, mlp_bias=False,
        attention_in_multiplier=1.0, attention_out_multiplier=1.0, embedding_multiplier=1.0, key_multiplier=1.0,
        lm_head_multiplier=1.0, mlp_multipliers=[1.0, 1.0], ssm_in_multiplier=1.0, ssm_multipliers=[1.0] * 5,
        ssm_out_multiplier=1.0, projectors_bias=False,
    )  # fmt: skip


def shared(blocks: bool, attention: Attention) -> Callable[[nn.Module], Decoding]:
    def decoding(model: nn.Module) -> Decoding:
        decoder = BlockDecoder(read(model)) if blocks else ModelDecoder(model)
        return SharedPrefix(model, decoder, attention, cache_shapes(model), VOCABULARY, "")

    return decoding


def caches(joined: bool) -> Callable[[nn.Module], Decoding]:
    return lambda model: BatchCaches(model, VOCABULARY, joined)


WAYS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Decoding]]] = {
    "joined layers": (qwen, shared(True, StockAttention())),
    "joined layers, fused rows": (qwen, shared(True, FusedRowAttention())),
    "the model's layers": (qwen, shared(False, StockAttention())),
    "overlapping steps": (qwen, shared(False, Overlapping())),
    "batch caches": (qwen, caches(True)),
    "row by row": (lambda: model_of("gemma2", attn_logit_softcapping=50.0, query_pre_attn_scalar=16), caches(False)),
    "sliding windows": (sliding, caches(True)),
    "recurrent state": (recurrent, caches(True)),
    "both in a layer": (latent, caches(True)),
}


@cache
def _generator(way: str) -> Generator:
    make, decoding = WAYS[way]
    generator = Generator(make(), Numbers(), 1)
    generator.decoding = decoding(generator.model)
    return generator


def generator_of(way: str, slots: int) -> Generator:
    """The generator that decodes in one of the WAYS."""
    generator = _generator(way)
    generator.slots, generator.stop_ids, generator.kept_bytes, generator.lanes = slots, STOPS, None, 1
    return generator


def asked(prompt: Sequence[int], seed: int = 1, **changes: object) -> Submission:
    """A submission of which rows are kept, as most tests here want them."""
    sampling = changes.pop("sampling", Sampling(1.0, 60))
    return Submission(prompt, sampling, seed, **{"keep": True, **changes})  # type: ignore[arg-type]


def finish(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def sampled(rows: Sequence[Row]) -> list[tuple[list[int], str | None]]:
    """What must not depend on anything else: a row's tokens, and why it has ended."""
    return [(list(row.token_ids), row.finish_reason) for row in rows]


def fresh(generator: Generator, row: Row, prompt: Sequence[int]) -> Row:
    """A row from a fresh request with all up to the last injected token as its prompt, and the same draws."""
    cut, sampling = row.injected[-1].stop, row.stopping.sampling
    engine = generator.open()
    shorter = Sampling(**{**_fields(sampling), "max_tokens": row.longest - cut})
    (other,) = engine.submit(asked([*prompt, *row.token_ids[:cut]], sampling=shorter))
    other.key = row.key + mx.array([0, cut], mx.uint32)  # draws count tokens from the first prompt on
    finish(engine)
    return other


def _fields(sampling: Sampling) -> dict[str, object]:
    return {name: getattr(sampling, name) for name in sampling.__slots__}
