"""Adapters in PEFT's format: by PEFT's formulas the same as here, or refused in a line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import shaken

from grpo.config import AdapterConfig
from grpo.errors import UserError
from grpo.model import mlxlm
from grpo.model.adapters import Adapters, load_adapter
from grpo.model.dora import FoldedDoRALinear
from grpo.model.lora import FoldedLoRALinear
from grpo.model.saved import SavedAdapter, read_adapter

TOKENS = mx.array([[5, 6, 7, 8], [9, 10, 11, 12]])
RANK, ALPHA = 2, 6
LINEAR = {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (64, 32)}


def peft_folder(folder: Path, blocks: int = 3, dora: bool = False, **changes) -> Path:
    """An adapter on q_proj and v_proj as PEFT saves it: A `[r, in]`, B `[out, r]`, torch's layout, in numpy."""
    draw = np.random.default_rng(0)
    arrays = {}
    for block in range(blocks):
        for name, (inputs, outputs) in LINEAR.items():
            path = f"base_model.model.model.layers.{block}.{name}"
            arrays[f"{path}.lora_A.weight"] = draw.normal(size=(RANK, inputs)).astype(np.float32)
            arrays[f"{path}.lora_B.weight"] = draw.normal(size=(outputs, RANK)).astype(np.float32)
            if dora:
                arrays[f"{path}.lora_magnitude_vector"] = draw.uniform(1, 2, size=outputs).astype(np.float32)
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"], "bias": "none", "use_rslora": False, "use_dora": dora,
        "modules_to_save": None, "rank_pattern": {},
        "alpha_pattern": {}, "init_lora_weights": True, "task_type": "CAUSAL_LM", **changes,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    arrays = {name: mx.array(array) for name, array in arrays.items()}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def by_hand(model, folder: Path, scaling: float, dora: bool = False) -> mx.array:
    """The logits of `model` with W + scaling · B A in the place of W, and DoRA's m / |W'| of each output (PEFT's)."""
    arrays = mx.load(str(folder / "adapter_model.safetensors"))
    for block, layer in enumerate(model.layers):
        for name in LINEAR:
            path = f"base_model.model.model.layers.{block}.{name}"
            linear = layer.self_attn[name.rpartition(".")[2]]
            a, b = (np.array(arrays[f"{path}.lora_{x}.weight"], np.float64) for x in "AB")
            weight = np.array(linear.weight, np.float64) + scaling * b @ a
            if dora:
                m = np.array(arrays[f"{path}.lora_magnitude_vector"], np.float64)
                weight = weight * (m / np.linalg.norm(weight, axis=1))[:, None]
            linear.weight = mx.array(weight.astype(np.float32))
    return model(TOKENS)


@pytest.mark.parametrize(
    ("how", "scaling", "settings"),
    [
        ({}, ALPHA / RANK, {"scale": 3.0}),
        ({"use_rslora": True}, ALPHA / math.sqrt(RANK), {"scale": 6.0, "use_rslora": True}),
        ({"dora": True}, ALPHA / RANK, {"scale": 3.0, "type": "dora"}),
    ],
)
def test_a_peft_adapter_computes_what_peft_computes(zoo, tmp_path, how: dict, scaling: float, settings: dict) -> None:
    folder = peft_folder(tmp_path / "peft", **how)
    base, expected = zoo("tied")(TOKENS), by_hand(zoo("tied"), folder, scaling, "dora" in how)
    assert mx.abs(expected - base).max() > 0.1
    loaded = zoo("tied")
    load_adapter(loaded, folder)  # as `grpo generate --adapter` does
    assert mx.allclose(loaded(TOKENS), expected, atol=1e-4)
    model = zoo("tied")
    cfg = AdapterConfig(rank=RANK, targets=("q_proj", "v_proj"), path=str(folder), **settings)
    adapters = Adapters(model, cfg, mx.random.key(0))
    assert mx.allclose(model(TOKENS), expected, atol=1e-4)
    with adapters.use("reference"):
        assert mx.allclose(model(TOKENS), expected, atol=1e-4)
    adapters.save(tmp_path)
    again = zoo("tied")
    load_adapter(again, tmp_path)
    assert mx.allclose(again(TOKENS), expected, atol=1e-4)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(("kind", "folded"), [("lora", FoldedLoRALinear), ("dora", FoldedDoRALinear)])
@pytest.mark.parametrize("form", ["mlx-lm", "peft"])
def test_a_loaded_adapter_has_the_layers_that_training_has(
    zoo, tmp_path, kind: str, folded: type, form: str, bits: int | None
) -> None:
    """And not mlx-lm's, which make a layer's whole matrix at every call for DoRA."""

    def base() -> nn.Module:
        model = zoo("tied")
        if bits is not None:
            nn.quantize(model, 32, bits)
        return model

    if form == "peft":
        peft_folder(tmp_path, dora=kind == "dora")
    else:
        model = base()
        adapters = Adapters(model, AdapterConfig(type=kind, rank=RANK, targets=("q_proj",)), mx.random.key(0))
        adapters.load_state(shaken(adapters.state()))
        adapters.save(tmp_path)
    loaded = base()
    load_adapter(loaded, tmp_path)
    assert {type(module) for module in loaded.modules() if "lora_a" in module} == {folded}
    theirs = base()
    arrays = read_adapter(tmp_path)
    parameters = {"rank": RANK, "scale": arrays.scale, "dropout": 0.0}
    keys = {path.rpartition(".")[0] for path in arrays.arrays}
    mlxlm.linear_to_lora_layers(theirs, 0, {**parameters, "keys": keys}, use_dora=kind == "dora")
    theirs.load_weights(list(arrays.arrays.items()), strict=False)
    expected = theirs.eval()(TOKENS)
    assert mx.allclose(loaded(TOKENS), expected, atol=1e-4)
    assert mx.abs(expected - base()(TOKENS)).max() > 0.01


def test_an_adapter_without_a_config_is_refused(zoo, tmp_path) -> None:
    adapters = Adapters(zoo("tied"), AdapterConfig(rank=RANK), mx.random.key(0))
    adapters.save(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"the folder has no adapter_config\.json, which contains the rank and scale"):
        load_adapter(zoo("tied"), tmp_path)


def test_a_recipe_that_does_not_fit_is_told_what_to_say(zoo, tmp_path) -> None:
    folder = peft_folder(tmp_path / "peft")
    with pytest.raises(UserError) as refused:
        Adapters(zoo("tied"), AdapterConfig(path=str(folder)), mx.random.key(0))
    section = "adapter: {rank: 2, scale: 3.0, targets: [self_attn.q_proj, self_attn.v_proj]}"
    assert str(refused.value).endswith(f"To continue from it, set this in the recipe: {section}")
    kind = {"type": "dora", "rank": RANK, "use_rslora": True, "targets": ("q_proj", "v_proj")}
    with pytest.raises(UserError, match=r"is of type lora, but adapter.type is dora\..*type: lora.*use_rslora: false"):
        Adapters(zoo("tied"), AdapterConfig(path=str(folder), **kind), mx.random.key(0))
    with pytest.raises(UserError, match=r"absent: there is no such folder$"):
        read_adapter(tmp_path / "absent")
    part = peft_folder(tmp_path / "part", blocks=1)
    with pytest.raises(UserError, match=r"layers: \[0, 1\]"):
        Adapters(zoo("tied"), AdapterConfig(path=str(part)), mx.random.key(0))
    for settings, right in (({"scale": 2.0}, 3), ({"scale": 3.0, "use_rslora": True}, 3 * math.sqrt(2))):
        cfg = AdapterConfig(rank=RANK, targets=("q_proj", "v_proj"), path=str(folder), **settings)
        with pytest.raises(
            UserError, match=rf"was trained with B A multiplied by 3, .* set adapter.scale to {right:g}$"
        ):
            Adapters(zoo("tied"), cfg, mx.random.key(0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "PEFT's peft_type IA3 is not supported"),
        ({"bias": "lora_only"}, "PEFT's bias lora_only is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"PEFT's modules_to_save \['lm_head'\] is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, r"PEFT's rank_pattern \{'q_proj': 4\} is not supported"),
        ({"alora_invocation_tokens": [7]}, r"PEFT's alora_invocation_tokens \[7\] is not supported"),
        ({"alpha_pattern": {"q_proj": 4}}, "PEFT's alpha_pattern"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16, which changes the base's weights, is not supported"),
        ({"r": "many"}, "not in PEFT's format"),
    ],
)
def test_what_is_more_than_one_a_and_b_is_refused(zoo, tmp_path, changes: dict, said: str) -> None:
    folder = peft_folder(tmp_path / "peft", **changes)
    for take in (read_adapter, lambda folder: load_adapter(zoo("tied"), folder)):
        with pytest.raises(UserError, match=f"adapter {folder}: .*{said}"):
            take(folder)


def test_what_is_no_adapter_is_said(zoo, tmp_path) -> None:
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle/adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="is a pickle, which can run code"):
        read_adapter(tmp_path / "pickle")
    odd = peft_folder(tmp_path / "odd")
    arrays = mx.load(str(odd / "adapter_model.safetensors"))
    for name in ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.lora_embedding_A"):
        mx.save_safetensors(str(odd / "adapter_model.safetensors"), {**arrays, name: mx.zeros((2, 2))})
        with pytest.raises(UserError, match=f"{name} is not PEFT's name for LoRA or DoRA on a linear layer"):
            read_adapter(odd)
    mx.save_safetensors(str(odd / "adapter_model.safetensors"), arrays)
    (odd / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_adapter(odd)
    path = "base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"
    broken = peft_folder(tmp_path / "broken")
    mx.save_safetensors(str(broken / "adapter_model.safetensors"), {**arrays, path: arrays[path] * mx.nan})
    for take in (read_adapter, lambda folder: load_adapter(zoo("tied"), folder)):
        with pytest.raises(UserError, match=r"lora_B\.weight has NaN or infinities in 128 of 128 places"):
            take(broken)
    four = peft_folder(tmp_path / "four", blocks=4)
    with pytest.raises(UserError, match=r"cannot be loaded into this model: .*layers\.3\."):
        load_adapter(zoo("tied"), four)


def test_names_of_models_that_see() -> None:
    """mlx-lm's shell is around the language model; transformers has all of the model, or the language model alone."""
    array, known = mx.zeros(1), {"language_model.model.layers.0.mlp.up_proj.lora_a"}
    for theirs in ("model.language_model.layers.0", "model.layers.0", "language_model.model.layers.0"):
        saved = SavedAdapter("lora", 1, 1.0, {f"{theirs}.mlp.up_proj.lora_a": array})
        assert set(saved.fitted(known)) == known
    plain = SavedAdapter("lora", 1, 1.0, {"model.layers.0.mlp.up_proj.lora_a": array})
    assert set(plain.fitted({"model.layers.0.mlp.up_proj.lora_a"})) == set(plain.arrays)


def test_the_section_of_an_adapter() -> None:
    def saved(kind: str, *paths: str) -> SavedAdapter:
        return SavedAdapter(kind, 4, 0.5, {path: mx.zeros(1) for path in paths})

    layers = [f"model.layers.{n}.mlp.{name}.lora_{x}" for n in (1, 2) for name in ("up_proj", "gate") for x in "ab"]
    section = saved("lora", *layers).section()
    assert section == {
        "type": "lora", "layers": (1, 3), "rank": 4, "scale": 0.5, "use_rslora": False,
        "targets": ("mlp.up_proj", "mlp.gate"),
    }  # fmt: skip
    two = saved("lora", *(path.replace("layers.2", "layers.0") for path in layers))
    assert (two.section(depth=2)["layers"], two.section(depth=3)["layers"]) == ("all", (0, 2))
    part = saved("full", "model.layers.1.mlp.up_proj.weight")
    assert part.section() == {"type": "full", "layers": (1, 2)}
    assert saved("full", "model.layers.1.mlp.up_proj.weight", "model.norm.weight").section()["layers"] == "all"
