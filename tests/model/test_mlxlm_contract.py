"""What grpo relies on in mlx-lm's models, loaders, tokenizers and adapters, held by what it does to toy models.

`test_mlxlm_caches.py` has its caches and its attention. `scripts/newest` runs both with the newest releases.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
import test_mlxlm_caches  # noqa: F401  its tests hold names too
from architectures.small import COMMON as LARGER
from architectures.small import SMALL
from conftest import COMMON, make_model
from contract import HELD, NEEDED, holds
from mlx.utils import tree_flatten

from grpo.errors import UserError
from grpo.model import mlxlm

TOKENS = mx.array([[5, 6, 7, 8]])


def test_every_name_has_a_test_and_a_part_that_needs_it() -> None:
    assert set(NEEDED) == HELD == set(mlxlm.__all__)


@holds("new_model")
def test_a_model_is_made_of_its_config_and_names_its_parts() -> None:
    config = {**COMMON, "model_type": "qwen3", "tie_word_embeddings": False}
    mx.random.seed(3)
    model = mlxlm.new_model(config)
    mx.random.seed(3)
    again = mlxlm.new_model(config)
    assert mx.array_equal(model(TOKENS), again(TOKENS))
    assert model(TOKENS).shape == (1, 4, 128)
    assert (len(model.layers), model.args.num_attention_heads, model.args.model_type) == (3, 4, "qwen3")
    hidden = model.model(TOKENS, cache=None)  # the body by itself, model/head
    assert mx.allclose(model.lm_head(hidden), model(TOKENS))
    with pytest.raises(ValueError, match="nope"):
        mlxlm.new_model({**config, "model_type": "nope"})


@holds("new_model")
@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_llama_s_layers_have_the_parts_that_joined_layers_read(kind: str) -> None:
    """generation/blocks computes these layers itself."""
    layer = make_model(kind).layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    assert (attention.n_heads, attention.n_kv_heads, attention.scale) == (4, 2, 16**-0.5)
    assert (attention.rope.dims, attention.rope.base, attention.rope.scale) == (16, 1e4, 1.0)
    assert isinstance(attention.rope, nn.RoPE)
    assert ("q_norm" in attention) == (kind == "tied")
    x = mx.random.normal((1, 3, 64))
    assert mx.allclose(mlp(x), mlp.down_proj(nn.silu(mlp.gate_proj(x)) * mlp.up_proj(x)), atol=1e-5)
    normed = layer.input_layernorm(x)
    middle = x + attention(normed, mask="causal")
    whole = middle + mlp(layer.post_attention_layernorm(middle))
    assert mx.allclose(layer(x, mask="causal"), whole, atol=1e-5)


@holds("new_model")
def test_what_keeps_its_dtype_is_told_by_cast_predicate() -> None:
    model = mlxlm.new_model({**LARGER, **SMALL["GLM-4.5-Air"]})
    kept = {path.rpartition(".")[2] for path, _ in tree_flatten(model.parameters()) if not model.cast_predicate(path)}
    assert kept == {"e_score_correction_bias"}


@holds("model_classes", "load_model")
def test_a_model_may_be_loaded_as_another_class(toy_folder: Path) -> None:
    base, arguments = mlxlm.model_classes(mlxlm.load_config(toy_folder))

    class Mine(base):
        def sanitize(self, weights: dict) -> dict:
            return {name: 0 * array for name, array in super().sanitize(weights).items()}

    model, _ = mlxlm.load_model(toy_folder, lazy=True, get_model_classes=lambda config: (Mine, arguments))
    assert isinstance(model, Mine)
    assert not any(array.any().item() for _, array in tree_flatten(model.parameters()))


@holds("load_model", "load_config", "save_model")
def test_a_folder_is_loaded_and_saved(toy_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(toy_folder, source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    model, config = mlxlm.load_model(source, lazy=True)
    assert isinstance(model, nn.Module)
    assert config["model_type"] == "qwen3"
    assert config["eos_token_id"] == mlxlm.load_config(source)["eos_token_id"] == [1, 2]  # as generation_config has it
    tokenizer = mlxlm.load_tokenizer(source, eos_token_ids=[1, 2])
    mlxlm.save_model(tmp_path / "copy", source, model, tokenizer, config, donate_model=False)
    again, _ = mlxlm.load_model(tmp_path / "copy")
    assert mx.array_equal(model(TOKENS), again(TOKENS))


@holds("load_tokenizer", "TokenizerWrapper")
def test_the_tokenizer_has_what_prompts_and_streams_need(toy_folder: Path) -> None:
    tokenizer = mlxlm.load_tokenizer(toy_folder, eos_token_ids=[0, 2])
    assert isinstance(tokenizer, mlxlm.TokenizerWrapper)
    assert set(tokenizer.eos_token_ids) == {0, 2}
    text = "What is 5+6+9+1? naïve € "
    ids = tokenizer.encode(text)
    assert all(isinstance(token, int) for token in ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    stream = tokenizer.detokenizer
    stream.reset()
    said = ""
    for token in ids:
        stream.add_token(token)
        said += stream.last_segment
    assert said.rstrip() == text.rstrip()  # the blank at the end waits for what follows
    stream.finalize()
    assert said + stream.last_segment == text
    assert tokenizer.has_chat_template
    asked = list(tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True))
    assert tokenizer.decode(asked) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    assert tokenizer.encode("<|im_end|>")[0] in special
    assert tokenizer.backend_tokenizer.get_vocab_size() > 0


@holds("load_tokenizer", "TokenizerWrapper")
def test_tools_and_thinking_are_found_in_a_template_and_a_vocabulary(toy_folder: Path, tmp_path: Path) -> None:
    """environments/readback and environments/thinking."""
    plain = mlxlm.load_tokenizer(toy_folder)
    assert not plain.has_tool_calling
    assert not plain.has_thinking
    template = (
        "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{{ messages[0].content }}"
        "{% for tool_call in messages[-1].tool_calls or [] %}<tool_call>{{ tool_call.name }}</tool_call>{% endfor %}"
    )
    source = shutil.copytree(toy_folder, tmp_path / "tools")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    written = json.loads((source / "tokenizer.json").read_text())
    for text in ("<think>", "</think>"):
        added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        written["added_tokens"].append({"id": 1000 + len(text), "content": text, **added})
        written["model"]["vocab"][text] = 1000 + len(text)
    (source / "tokenizer.json").write_text(json.dumps(written))
    tokenizer = mlxlm.load_tokenizer(source)
    assert (tokenizer.tool_call_start, tokenizer.tool_call_end) == ("<tool_call>", "</tool_call>")
    call = {"name": "f", "arguments": {"x": 1}}
    assert tokenizer.tool_parser(json.dumps(call), [{"function": {"name": "f"}}]) == call
    assert (tokenizer.has_thinking, tokenizer.think_start, tokenizer.think_end) == (True, "<think>", "</think>")
    shown = {"tools": [{"type": "function", "function": {"name": "f"}}], "add_generation_prompt": True}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, **shown) == "f hi"


@holds("BPEStreamingDetokenizer", "TokenizerWrapper")
def test_a_tokenizer_of_one_s_own_is_wrapped() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE({"ab": 0, "cd": 1}, []))
    plain.decoder = decoders.ByteLevel()
    wrapped = mlxlm.TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=plain), mlxlm.BPEStreamingDetokenizer)
    assert wrapped.decode([1, 0]) == "cdab"
    assert isinstance(wrapped.detokenizer, mlxlm.BPEStreamingDetokenizer)
    assert set(wrapped.eos_token_ids) <= {None}  # none that stops


@holds("linear_to_lora_layers", "LoRALinear")
def test_lora_layers_compute_x_w_plus_scale_x_a_b() -> None:
    model = make_model("tied")
    parameters = {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    mlxlm.linear_to_lora_layers(model, len(model.layers), parameters, use_dora=False)
    layer = model.layers[0].self_attn.q_proj
    assert type(layer) is mlxlm.LoRALinear
    assert (layer.lora_a.shape, layer.lora_b.shape, layer.scale) == ((64, 2), (2, 64), 3.0)
    assert not layer.lora_b.any().item()
    assert mx.abs(layer.lora_a).max().item() <= 64**-0.5
    assert {path.rpartition(".")[2] for path, _ in tree_flatten(model.trainable_parameters())} == {"lora_a", "lora_b"}
    x = mx.random.normal((3, 64))
    assert layer.dropout(x) is x  # probability 0
    layer.lora_b = mx.random.normal((2, 64))
    expected = layer.linear(x) + 3.0 * (x @ layer.lora_a @ layer.lora_b)
    assert mx.allclose(layer(x), expected, atol=1e-4)
    assert mx.allclose(layer.fuse(dequantize=False)(x), expected, atol=1e-4)


@holds("linear_to_lora_layers", "DoRALinear")
def test_fresh_magnitudes_are_the_norms_of_the_rows() -> None:
    model = make_model("tied")
    parameters = {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    mlxlm.linear_to_lora_layers(model, len(model.layers), parameters, use_dora=True)
    layer = model.layers[0].self_attn.q_proj
    assert type(layer) is mlxlm.DoRALinear
    assert mx.allclose(layer.m, mx.linalg.norm(layer.linear.weight, axis=1))
    assert (layer.lora_a.shape, layer.lora_b.shape, layer.scale) == ((64, 2), (2, 64), 3.0)


@holds("linear_to_lora_layers", "SwitchLinear", "SwitchGLU")
def test_experts_take_lora_and_refuse_dora() -> None:
    def added(**how: bool) -> nn.Module:
        model = make_model("moe")
        parameters = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.switch_mlp.up_proj"]}
        mlxlm.linear_to_lora_layers(model, len(model.layers), parameters, **how)
        return model

    plain = make_model("moe").layers[0].mlp
    assert isinstance(plain.switch_mlp, mlxlm.SwitchGLU)
    assert isinstance(plain.switch_mlp.up_proj, mlxlm.SwitchLinear)
    assert plain.switch_mlp.up_proj.weight.shape == (4, 32, 64)  # experts, outputs, inputs
    layer = added(use_dora=False).layers[0].mlp.switch_mlp.up_proj
    assert (layer.lora_a.shape, layer.lora_b.shape) == ((4, 2, 64), (4, 32, 2))
    with pytest.raises(ValueError, match="DoRA"):
        added(use_dora=True)


@holds("quantize", "QuantizedSwitchLinear")
def test_weights_are_quantized_in_place(capsys) -> None:
    model = make_model("moe", moe_intermediate_size=64)
    weight = model.layers[0].self_attn.q_proj.weight
    model, config = mlxlm.quantize(model, {"model_type": "qwen3_moe"}, 64, 4)
    assert capsys.readouterr().out == ""
    assert (config["quantization"]["group_size"], config["quantization"]["bits"]) == (64, 4)
    layer, expert = model.layers[0].self_attn.q_proj, model.layers[0].mlp.switch_mlp.up_proj
    assert isinstance(layer, nn.QuantizedLinear)
    assert (layer.bits, layer.group_size, layer.mode) == (4, 64, "affine")
    assert isinstance(expert, mlxlm.QuantizedSwitchLinear)
    assert expert.scales.shape == (4, 64, 1)
    near = mx.dequantize(layer.weight, layer.scales, layer.biases, 64, 4)
    assert mx.abs(near - weight).max().item() < 0.05
    assert config["quantization"]["mode"] == "affine"
    small, config = mlxlm.quantize(make_model("tied"), {}, 16, 4, "nvfp4")
    assert config["quantization"] == {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    assert small.layers[0].self_attn.q_proj.mode == "nvfp4"
    assert "biases" not in small.layers[0].self_attn.q_proj


@holds("MultiLinear", "QuantizedMultiLinear")
def test_the_products_of_latent_attention() -> None:
    layer = mlxlm.MultiLinear(64, 5, 3)  # inputs, outputs, heads
    assert layer.weight.shape == (3, 5, 64)
    x = mx.random.normal((3, 2, 64))
    assert mx.allclose(layer(x), x @ layer.weight.swapaxes(1, 2), atol=1e-5)
    stored = layer.to_quantized(64, 8)
    assert isinstance(stored, mlxlm.QuantizedMultiLinear)
    near = mx.dequantize(stored.weight, stored.scales, stored.biases, stored.group_size, stored.bits, stored.mode)
    assert mx.abs(near - layer.weight).max().item() < 0.01


@holds("generate_step", "make_sampler", "BatchGenerator")
def test_its_generators_are_told_and_answer_as_before() -> None:
    model = make_model("tied")
    steps = mlxlm.generate_step(TOKENS[0], model, max_tokens=3, sampler=mlxlm.make_sampler(0.0))
    greedy = [int(token) for token, _ in steps]
    expected = TOKENS
    for _ in range(3):
        expected = mx.concatenate([expected, mx.argmax(model(expected)[:, -1], axis=-1)[:, None]], axis=1)
    assert greedy == expected[0, 4:].tolist()
    generator = mlxlm.BatchGenerator(
        model, max_tokens=3, sampler=mlxlm.make_sampler(0.0), completion_batch_size=2, prefill_batch_size=2
    )
    uids = generator.insert([[5, 6, 7, 8], [9]])
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            tokens[response.uid].append(response.token)
            assert response.logprobs[response.token].item() <= 0
    generator.close()
    assert tokens[uids[0]] == greedy
    assert len(tokens[uids[1]]) == 3


def test_a_version_without_a_name_is_said_with_what_to_install(monkeypatch) -> None:
    import mlx_lm.tuner.utils as utils

    monkeypatch.delattr(utils, "linear_to_lora_layers")
    monkeypatch.delitem(sys.modules, "grpo.model.mlxlm")
    with pytest.raises(UserError, match=r"mlx-lm \S+ lacks .* 'linear_to_lora_layers'.* pip install 'mlx-lm"):
        __import__("grpo.model.mlxlm")


def test_a_package_that_is_not_there_is_not_taken_for_another_version(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlx_lm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "grpo.model.mlxlm")
    monkeypatch.setitem(sys.modules, "transformers", None)  # mlx-lm's own requirement
    with pytest.raises(ModuleNotFoundError, match="transformers"):
        __import__("grpo.model.mlxlm")
