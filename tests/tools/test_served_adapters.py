"""Every kind of adapter is served as training and `grpo generate` have it, and the base as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from grpo.config import AdapterConfig, ModelConfig
from grpo.errors import UserError
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.model.adapters import Adapters, load_adapter
from grpo.model.load import load
from grpo.serving.shelf import Shelf
from grpo.tools.serve import ServedModels, adapters_of


def sampled(generator: Generator) -> Any:
    ((one,),) = generator.generate([Request((5, 6, 7), 1, 3)], Sampling(1.0, 16), mx.random.key(0))
    return one


@pytest.mark.parametrize(
    ("settings", "quantize"),
    [
        ({"rank": 4, "use_rslora": True}, None),
        ({"rank": 2, "layers": (1, 2), "targets": ("q_proj", "mlp.down_proj"), "dropout": 0.5}, None),
        ({"type": "dora", "rank": 4}, None),
        ({"type": "full"}, None),
        ({"rank": 4}, 4),
    ],
)
def test_an_adapter_and_the_base_answer_as_they_do_alone(
    toy_folder: Path, tmp_path: Path, settings: dict[str, Any], quantize: Any
) -> None:
    cfg = ModelConfig(name=str(toy_folder), quantize=quantize)
    model, tokenizer = load(cfg)
    made = Adapters(model, AdapterConfig(**settings), mx.random.key(0))
    state = made.state()
    keys = mx.random.split(mx.random.key(1), len(state))
    moved = {p: a + 0.1 * mx.random.normal(a.shape, key=k) for (p, a), k in zip(state.items(), keys, strict=True)}
    made.load_state(moved)
    made.save(tmp_path)
    expected = {}
    for name in ("base", "own"):
        model, tokenizer = load(cfg)
        if name == "own":
            load_adapter(model, tmp_path)
        expected[name] = sampled(Generator(model, tokenizer, 2))
    assert expected["own"].token_ids != expected["base"].token_ids
    model, tokenizer = load(cfg)
    shelf = Shelf(adapters_of(model, tmp_path), ServedModels({"own": tmp_path, "base": None}, {}))
    generator = Generator(model, tokenizer, 2)
    for name in ("own", "base", "own"):
        with shelf.use(name):
            one = sampled(generator)
        assert one.token_ids == expected[name].token_ids
        assert one.behaviour == pytest.approx(expected[name].behaviour, abs=1e-5)


def test_an_adapter_of_another_model_is_refused_before_anything_is_served(toy_folder: Path, tmp_path: Path) -> None:
    mx.save_safetensors(
        str(tmp_path / "adapters.safetensors"), {"model.layers.0.self_attn.q_proj.lora_a": mx.zeros((3, 2))}
    )
    model, _ = load(ModelConfig(name=str(toy_folder)))
    with pytest.raises(UserError, match=r"there is no adapter_config\.json"):
        adapters_of(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        '{"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 2, "scale": 1.0}}'
    )
    with pytest.raises(UserError, match="has other layers or another rank"):
        adapters_of(model, tmp_path)
