"""Weights in small floating point numbers: loaded, computed with in the model's dtype, trained on, and taken back."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import COMMON, ZOO, make_model, shaken
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from grpo.benchmark.models import write_weights
from grpo.config import AdapterConfig, ModelConfig
from grpo.errors import UserError
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.model.adapters import Adapters
from grpo.model.drawn import NoTokenizer
from grpo.model.load import cast, load
from grpo.model.merging import merge
from grpo.model.mlxlm import QuantizedSwitchLinear, new_model, quantize
from grpo.model.outline import costs_of, costs_of_config
from grpo.model.quantized import FORMATS, check_computes, dequantized, quantization, quantized_like
from grpo.model.widehead import wide_head

TOKENS = mx.array([[5, 6, 7, 8], [9, 10, 11, 12]])
NAMES = list(FORMATS)
WIDE_EXPERTS = {"moe_intermediate_size": 64}


def stored(folder: Path, kind: str, name: str | None = None) -> Path:
    """A model's folder, quantised before it was written if a format is given."""
    own = ZOO[kind][1] | (WIDE_EXPERTS if kind == "moe" else {})
    model = make_model(kind, **own)
    config = {**COMMON, "model_type": ZOO[kind][0], **own}
    if name is not None:
        model, config = quantize(model, config, **FORMATS[name].config)
    write_weights(model, config, folder)
    return folder


@pytest.mark.each_value
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["tied", "untied", "moe"])
def test_loaded_and_computed_in_the_models_dtype(tmp_path, name: str, dtype: str, kind: str) -> None:
    plain, quantised = stored(tmp_path / "plain", kind), stored(tmp_path / "quantised", kind, name)
    how = {"dtype": dtype} if dtype == "float32" else {"dtype": dtype, "head_dtype": "model"}
    model, _ = load(ModelConfig(name=str(plain), quantize=name, **how))
    layer = model.layers[0].self_attn.q_proj
    assert (layer.mode, layer.bits, layer.group_size) == (name, FORMATS[name].bits, FORMATS[name].group_size)
    assert model.model(TOKENS).dtype == model(TOKENS).dtype == getattr(mx, dtype)
    same, _ = load(ModelConfig(name=str(quantised), **how))
    assert same.model(TOKENS).dtype == same(TOKENS).dtype == getattr(mx, dtype)
    if dtype == "float32":  # else what was quantised here had been rounded before
        assert mx.allclose(same(TOKENS), model(TOKENS), atol=1e-5)
    assert mx.abs(model(TOKENS) - load(ModelConfig(name=str(plain)))[0](TOKENS)).mean() < 1.0


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_heads_are_widened(tmp_path, kind: str) -> None:
    model, _ = load(ModelConfig(name=str(stored(tmp_path / "m", kind, "mxfp4")), dtype="bfloat16"))
    assert model(TOKENS).dtype == mx.float32
    assert model.model(TOKENS).dtype == mx.bfloat16
    assert wide_head(model) is not None


@pytest.mark.each_value
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("kind", "adapter"), [("tied", "lora"), ("tied", "dora"), ("moe", "lora")])
def test_an_adapter_trains_decodes_and_merges(tmp_path, name: str, kind: str, adapter: str) -> None:
    model, _ = load(ModelConfig(name=str(stored(tmp_path / "m", kind)), quantize=name))
    before = model(TOKENS)
    adapters = Adapters(model, AdapterConfig(type=adapter, rank=4), mx.random.key(0))
    assert mx.allclose(model(TOKENS), before, atol=1e-5)
    adapters.load_state(shaken(adapters.state()))
    slopes = nn.value_and_grad(model, lambda: nn.losses.cross_entropy(model(TOKENS), TOKENS).sum())()[1]
    assert all(array.any().item() for _, array in tree_flatten(slopes))
    generator = Generator(model, NoTokenizer(), 4)
    assert ("joined layers" in generator.decoding.description) == (kind == "tied" and adapter == "lora")
    (rows,) = generator.generate([Request([5, 6, 7], 3)], Sampling(max_tokens=6), mx.random.key(0))
    for row in rows:
        tokens = mx.array([[5, 6, 7, *row.token_ids]])
        forced = nn.log_softmax(model(tokens[:, :-1])[0, 2:], axis=-1)
        found = mx.take_along_axis(forced, tokens[0, 3:, None], axis=-1)[:, 0]
        assert mx.allclose(found, mx.array(row.behaviour), atol=1e-4)
    adapted = model(TOKENS)
    assert mx.abs(adapted - before).max() > 0.01
    assert mx.allclose(merge(model, dequantize=True)(TOKENS), adapted, atol=1e-4)


GPT_OSS = {
    **COMMON, "model_type": "gpt_oss", "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                     "original_max_position_embeddings": 4096},
}  # fmt: skip


def test_experts_that_are_stored_in_mxfp4_train(tmp_path) -> None:
    """As OpenAI stores gpt-oss: the config names the way as transformers does, and only experts are quantised."""
    model = new_model(GPT_OSS)
    nn.quantize(model, mode="mxfp4", class_predicate=lambda path, m: "experts" in path and hasattr(m, "to_quantized"))
    write_weights(model, {**GPT_OSS, "quantization_config": {"quant_method": "mxfp4"}}, tmp_path / "m")
    loaded, _ = load(ModelConfig(name=str(tmp_path / "m")))
    assert {type(module) for module in loaded.modules() if "scales" in module} == {QuantizedSwitchLinear}
    assert mx.allclose(loaded(TOKENS), model(TOKENS), atol=1e-4)
    adapters = Adapters(loaded, AdapterConfig(rank=4), mx.random.key(0))
    adapters.load_state(shaken(adapters.state()))
    slopes = nn.value_and_grad(loaded, lambda: nn.losses.cross_entropy(loaded(TOKENS), TOKENS).sum())()[1]
    assert all(array.any().item() for _, array in tree_flatten(slopes))
    adapted = loaded(TOKENS)
    assert mx.allclose(merge(loaded, dequantize=True)(TOKENS), adapted, atol=1e-4)


def test_merging_keeps_the_format(tmp_path) -> None:
    model, _ = load(ModelConfig(name=str(stored(tmp_path / "m", "moe", "mxfp8"))))
    adapters = Adapters(model, AdapterConfig(rank=4), mx.random.key(0))
    adapters.load_state(shaken(adapters.state()))
    adapted = model(TOKENS)
    merged = adapters.merge()
    layer, experts = merged.layers[0].self_attn.q_proj, merged.layers[0].mlp.switch_mlp.up_proj
    assert (type(layer), layer.mode) == (nn.QuantizedLinear, "mxfp8")
    assert (type(experts), experts.mode) == (QuantizedSwitchLinear, "mxfp8")
    assert 0 < mx.abs(merged(TOKENS) - adapted).max() < 0.3


def test_experts_with_a_scale_of_their_own_go_back_and_forth() -> None:
    plain = make_model("moe", **WIDE_EXPERTS).layers[0].mlp.switch_mlp.up_proj
    former = plain.to_quantized(16, 4, "nvfp4", global_scale=True)
    whole = dequantized(former, mx.float32)
    assert 0 < mx.abs(whole.weight - plain.weight).mean() < 0.1 * mx.abs(plain.weight).mean()
    again = quantized_like(whole, former)
    assert mx.allclose(again.global_scale, former.global_scale, rtol=1e-3)
    assert mx.allclose(dequantized(again, mx.float32).weight, whole.weight, atol=1e-4)


def test_scales_of_experts_stay_in_float32() -> None:
    """MLX takes them in no other dtype."""
    model = make_model("moe", **WIDE_EXPERTS)
    quantize_model(model, {}, 16, 4, "nvfp4", global_scale=True)
    cast(model, mx.bfloat16)
    layer = model.layers[0]
    assert layer.mlp.switch_mlp.up_proj.global_scale.dtype == mx.float32
    assert layer.input_layernorm.weight.dtype == mx.bfloat16
    experts = layer.mlp.switch_mlp.up_proj
    again = quantized_like(dequantized(experts, mx.bfloat16), experts)
    assert again.global_scale.dtype == mx.float32


def test_experts_with_a_scale_of_their_own_need_a_gpu() -> None:
    model = make_model("moe", **WIDE_EXPERTS)
    quantize_model(model, {}, 16, 4, "nvfp4", global_scale=True)
    with pytest.raises(UserError, match=r"cannot compute with weights in nvfp4: .*only supported on the GPU"):
        check_computes(model, "toy", mx.float32)


@pytest.mark.parametrize("asked", [4, *NAMES])
def test_the_outline_weighs_what_is_loaded(tmp_path, asked: int | str) -> None:
    folder = stored(tmp_path / "m", "untied")
    config = json.loads((folder / "config.json").read_text())
    model, _ = load(ModelConfig(name=str(folder), quantize=asked))
    reckoned = costs_of_config({**config, "quantization": quantization(asked).config}, dtype=mx.float32)
    assert reckoned == costs_of(model)
    assert reckoned.parameters == costs_of_config(config).parameters


def test_a_machine_that_cannot_compute_says_why(tmp_path, monkeypatch) -> None:
    folder = stored(tmp_path / "m", "tied", "nvfp4")

    def missing(*_, **__):
        raise RuntimeError("[QuantizedMatmul] no kernel for nvfp4 here")

    monkeypatch.setattr(mx, "quantized_matmul", missing)
    with pytest.raises(
        UserError, match=r"cannot compute with weights in nvfp4: \[QuantizedMatmul\] no kernel for nvfp4"
    ):
        load(ModelConfig(name=str(folder)))


@pytest.mark.parametrize("bits", [3, 6])
def test_dora_where_mlx_lm_miscounts_the_inputs(toy_folder, bits: int) -> None:
    model, _ = load(ModelConfig(name=str(toy_folder), quantize=bits))
    with pytest.raises(UserError, match=f"weights have {bits} bits: use lora, or a model with 2, 4 or 8 bits"):
        Adapters(model, AdapterConfig(type="dora", rank=4), mx.random.key(0))
