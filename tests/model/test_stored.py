"""What a config says of weights in few bits is what the loader makes of them."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import COMMON, ZOO, make_model
from mlx.utils import tree_flatten
from model.test_quantized import GPT_OSS

from grpo.benchmark.models import write_weights
from grpo.config import ModelConfig
from grpo.errors import UserError
from grpo.model.load import load
from grpo.model.mlxlm import new_model
from grpo.model.outline import costs_of_config, outline
from grpo.model.quantized import Quantization
from grpo.model.stored import stored

NVFP4 = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*self_attn*"]}
OTHERS = [
    ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, Quantization(32, 4, "mxfp4")),
    ({"quant_method": "mxfp8"}, Quantization(32, 8, "mxfp8")),
    ({"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [32, 32]}, Quantization(32, 8, "mxfp8")),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["re:.*lm_head"]},
     Quantization(16, 4, "nvfp4")),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, Quantization(32, 4)),
    ({"quant_method": "modelopt", **NVFP4}, Quantization(16, 4, "nvfp4")),
    ({"quant_method": "modelopt", "quantization": NVFP4}, Quantization(16, 4, "nvfp4")),
    ({"quant_method": "awq", "bits": 4, "group_size": 64}, Quantization(64, 4)),
    ({"quant_method": "gptq", "bits": 8}, Quantization(128, 8)),
]  # fmt: skip


def sizes(model: nn.Module) -> dict[str, tuple]:
    return {path: (array.shape, array.dtype) for path, array in tree_flatten(model.parameters())}


@pytest.mark.parametrize(("theirs", "how"), OTHERS)
def test_other_toolkits_words_are_read(theirs: dict, how: Quantization) -> None:
    for config in ({"quantization_config": theirs}, {"text_config": {"quantization_config": theirs}}):
        found = stored(config)
        assert found is not None
        assert found.settings == how.config
        assert not found.embeddings
    assert found.keeps("lm_head") is any("lm_head" in str(value) for value in theirs.values())
    assert found.keeps("model.layers.1.self_attn.q_proj") is ("exclude_modules" in str(theirs))
    assert not found.keeps("model.layers.1.mlp.up_proj")


@pytest.mark.parametrize("theirs", [{}, None, {"quant_method": "fp8", "weight_block_size": [128, 128]}])
def test_weights_that_are_loaded_as_floating_point_numbers(theirs: dict | None) -> None:
    assert stored({"quantization_config": theirs}) is None


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"quant_method": "bitnet"}, "weights in bitnet are not supported"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "weights in compressed-tensors float-"),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}, "weights in modelopt FP8 are not"),
    ],
)
def test_what_is_not_known_is_refused(theirs: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        stored({"quantization_config": theirs})


def test_the_outline_of_a_mixture_in_mxfp4_has_the_sizes_of_the_loaded_model(tmp_path: Path) -> None:
    """As OpenAI stores gpt-oss: its config lists what is whole, and embeddings are, without a word."""
    whole = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    model = new_model(GPT_OSS)
    nn.quantize(model, mode="mxfp4", class_predicate=lambda path, m: "experts" in path and hasattr(m, "to_quantized"))
    config = {**GPT_OSS, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": whole}}
    write_weights(model, config, tmp_path / "m")
    loaded, _ = load(ModelConfig(name=str(tmp_path / "m")))
    assert sizes(outline(config, None, mx.float32)) == sizes(loaded)
    assert costs_of_config(config).weight_bytes < costs_of_config(GPT_OSS).weight_bytes


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_outline_in_another_toolkits_words_has_the_sizes_of_the_loaded_model(tmp_path: Path, kind: str) -> None:
    """The head of a tied model is its embedding, and so stays whole."""
    model = make_model(kind)
    nn.quantize(
        model, 32, 8, mode="mxfp8", class_predicate=lambda path, m: isinstance(m, nn.Linear) and path != "lm_head"
    )
    theirs = {"quant_method": "mxfp8", "modules_to_not_convert": ["lm_head"]}
    config = {**COMMON, "model_type": ZOO[kind][0], **ZOO[kind][1], "quantization_config": theirs}
    write_weights(model, config, tmp_path / "m")
    loaded, _ = load(ModelConfig(name=str(tmp_path / "m")))
    assert sizes(outline(config, None, mx.float32)) == sizes(loaded)
