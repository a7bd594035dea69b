"""Decoding follows the model: whatever an adapter is on, and when modules are replaced between two calls."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from grpo.backend.random import derive_key
from grpo.config import AdapterConfig
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.model.adapters import Adapters

KEY = derive_key(0, "test")
PROMPTS = [[5, 6, 7, 8, 9], [11], [20, 21]]


class NoText:
    eos_token_ids = frozenset({0, 1, 2})

    def decode(self, _ids, **_kwargs) -> str:
        return ""


def wrap(model: nn.Module, ranks: dict[str, int], kind=LoRALinear) -> None:
    """Adapters of these ranks on the attention's layers by name, with a B that is not zero."""
    for layer in model.layers:
        for name, rank in ranks.items():
            wrapped = kind.from_base(getattr(layer.self_attn, name), r=rank, scale=2.0)
            wrapped.lora_b = 0.3 * mx.random.normal(wrapped.lora_b.shape)
            setattr(layer.self_attn, name, wrapped)


def worst_gap(model: nn.Module, generator: Generator) -> float:
    """The largest difference of a completion's logprobs from teacher forcing."""
    worst = 0.0
    groups = generator.generate([Request(ids, 3) for ids in PROMPTS], Sampling(max_tokens=8), KEY)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            tokens = mx.array([[*prompt, *completion.token_ids]])
            logits = model(tokens[:, :-1])[0, len(prompt) - 1 :]
            forced = mx.take_along_axis(nn.log_softmax(logits, axis=-1), tokens[0, len(prompt) :, None], axis=-1)[:, 0]
            worst = max(worst, mx.abs(forced - mx.array(completion.behaviour)).max().item())
    return worst


@pytest.mark.parametrize("kind", ["tied", "quantised"])
@pytest.mark.parametrize("ranks", [{"q_proj": 4, "v_proj": 2}, {"q_proj": 4, "k_proj": 2, "v_proj": 8}, {"o_proj": 4}])
def test_adapters_on_some_layers_and_of_mixed_ranks_are_joined(zoo, kind: str, ranks: dict[str, int]) -> None:
    model = zoo(kind)
    wrap(model, ranks)
    generator = Generator(model, NoText(), 4)
    assert generator.decoding.description.startswith("joined layers")
    assert worst_gap(model, generator) < 1e-4


def test_a_quantised_base_with_an_adapter_everywhere(zoo) -> None:
    model = zoo("quantised")
    adapters = Adapters(model, AdapterConfig(rank=4), mx.random.key(0))
    adapters.load_state({path: 0.1 * mx.random.normal(array.shape) for path, array in adapters.state().items()})
    generator = Generator(model, NoText(), 4)
    assert generator.decoding.description.startswith("joined layers")
    assert worst_gap(model, generator) < 1e-4


def test_dora_is_decoded_by_the_model_s_own_layers(zoo) -> None:
    model = zoo("tied")
    wrap(model, {"q_proj": 4}, DoRALinear)
    generator = Generator(model, NoText(), 4)
    assert generator.decoding.description.startswith("the model's layers")
    assert worst_gap(model, generator) < 1e-4


def test_an_adapter_that_is_put_on_later_is_followed(zoo) -> None:
    model = zoo("tied")
    generator = Generator(model, NoText(), 4)
    wrap(model, {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4})
    assert worst_gap(model, generator) < 1e-4


def test_an_adapter_that_is_merged_is_followed(zoo) -> None:
    model = zoo("tied")
    adapters = Adapters(model, AdapterConfig(rank=4), mx.random.key(0))
    adapters.load_state({path: 0.1 * mx.random.normal(array.shape) for path, array in adapters.state().items()})
    generator = Generator(model, NoText(), 4)
    adapters.merge()
    for layer in model.layers:  # and then changed: what the generator joined before is not what the model holds
        layer.mlp.up_proj.weight = layer.mlp.up_proj.weight * 1.5
    assert worst_gap(model, generator) < 1e-4


def test_whole_weights_that_train_are_followed(zoo) -> None:
    model = zoo("untied")
    generator = Generator(model, NoText(), 4)
    for _ in range(2):
        model.update(
            {
                "model": {"norm": {"weight": model.model.norm.weight * 1.1}},
                "lm_head": {"weight": model.lm_head.weight * 1.5},
            }
        )
        model.apply(lambda array: array * 1.05)
        assert worst_gap(model, generator) < 1e-4
