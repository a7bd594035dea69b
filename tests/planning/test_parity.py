"""The check before a run that decoding follows what trains, the adapter included."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import pytest
from conftest import shaken

import grpo.generation.joined as joined_layers
import grpo.planning.parity as parity
from grpo.config import AdapterConfig
from grpo.errors import RunError, UserError
from grpo.generation.attention import FusedRowAttention, StockAttention
from grpo.generation.batchcaches import BatchCaches
from grpo.generation.blocks import read
from grpo.generation.buffers import cache_shapes
from grpo.generation.decoders import BlockDecoder, ModelDecoder
from grpo.generation.decoding import SharedPrefix
from grpo.generation.generator import Generator
from grpo.generation.sampling import Sampling
from grpo.model.adapters import Adapters
from grpo.model.drawn import NoTokenizer
from grpo.model.policy import Policy
from grpo.model.sharing import shared_hidden
from grpo.planning.parity import check_parity
from grpo.rollout import RolloutEngine
from grpo.training.gap import gap_bound
from grpo.training.packing import Packing
from grpo.types import Task

TASKS = [Task(n, "", tuple(range(1, length + 1)), {}) for n, length in enumerate((3, 17, 40, 9))]


def made(zoo, base: str = "tied", **adapter: Any) -> tuple[Policy, RolloutEngine]:
    """A policy over a small model with a fresh adapter, and an engine that samples from it."""
    model = zoo(base)
    settings = adapter if adapter.get("type") == "full" else {"rank": 4, **adapter}
    policy = Policy(model, Adapters(model, AdapterConfig(**settings), mx.random.key(0)), 1.0)
    return policy, RolloutEngine(Generator(model, NoTokenizer(), 4), Sampling())


def moved(line: str) -> float:
    """By how much the random adapter moved logprobs, as the check said."""
    assert "too little" not in line
    return float(line.rpartition(" ")[2])


@pytest.mark.parametrize("base", ["tied", "llama", "quantised", "moe", "gemma2", "gemma3_text", "cohere"])
def test_the_adapter_is_made_to_show_and_a_right_model_passes(zoo, base: str) -> None:
    assert 0.1 <= moved(check_parity(*made(zoo, base), TASKS, 0)) <= 1


@pytest.mark.parametrize(
    "adapter",
    [
        {"type": "dora"},
        {"scale": 20.0},
        {"scale": 0.01, "rank": 1},
        {"targets": ("self_attn.q_proj", "self_attn.v_proj")},
        {"targets": ("mlp.down_proj",), "layers": (2, 3)},
    ],
    ids=str,
)
def test_so_it_is_whatever_trains(zoo, adapter: dict[str, Any]) -> None:
    assert moved(check_parity(*made(zoo, **adapter), TASKS, 0)) >= 0.1


def test_experts_have_an_adapter_too(zoo) -> None:
    targets = ("mlp.switch_mlp.gate_proj", "mlp.switch_mlp.down_proj")
    assert moved(check_parity(*made(zoo, "moe", targets=targets), TASKS, 0)) >= 0.1


def test_layers_with_biases(zoo) -> None:
    model = zoo("llama", attention_bias=True, mlp_bias=True)
    policy = Policy(model, Adapters(model, AdapterConfig(rank=4), mx.random.key(0)), 1.0)
    generator = Generator(model, NoTokenizer(), 4)
    assert generator.decoding.description.startswith("joined layers")
    assert moved(check_parity(policy, RolloutEngine(generator, Sampling()), TASKS, 0)) >= 0.1


def test_whole_weights_are_checked_as_they_are(zoo) -> None:
    line = check_parity(*made(zoo, type="full"), TASKS, 0)
    assert "mean gap" in line
    assert "random" not in line


WAYS = {
    "joined layers": lambda m: SharedPrefix(m, BlockDecoder(read(m)), StockAttention(), cache_shapes(m), 128, "joined"),
    "joined layers, a row alone": lambda m: SharedPrefix(
        m, BlockDecoder(read(m)), FusedRowAttention(), cache_shapes(m), 128, "joined"
    ),
    "the model's layers": lambda m: SharedPrefix(m, ModelDecoder(m), StockAttention(), cache_shapes(m), 128, "own"),
    "mlx-lm's caches": lambda m: BatchCaches(m, 128),
    "mlx-lm's caches, row by row": lambda m: BatchCaches(m, 128, joined=False),
}
"""Every way of decoding that runs on a CPU."""


def of_a_way(zoo, way: str) -> tuple[Policy, RolloutEngine]:
    policy, engine = made(zoo)
    engine.generator.slots = 1 if "alone" in way else 4
    engine.generator.decoding = WAYS[way](policy.model)
    return policy, engine


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_decoding_is_checked(zoo, way: str) -> None:
    policy, engine = of_a_way(zoo, way)
    assert moved(check_parity(policy, engine, TASKS, 0)) >= 0.1


@pytest.mark.parametrize("way", WAYS)
def test_a_way_of_decoding_that_ignores_the_adapter_is_refused(zoo, way: str) -> None:
    """It decodes another model, of the same weights without an adapter."""
    policy, engine = of_a_way(zoo, way)
    engine.generator.decoding = WAYS[way](zoo("tied"))
    with pytest.raises(RunError, match=r"mean gap .* or the adapter in"):
        check_parity(policy, engine, TASKS, 0)


def dropping_the_scale(layers, dtype):
    return {name: array / layers[0].scale if name == "b" else array for name, array in JOINED(layers, dtype).items()}


def ignoring_keys(layers, dtype):
    joined = JOINED(layers, dtype)
    if len(layers) == 3:
        first = layers[0].linear.weight.shape[0]
        end = first + layers[1].linear.weight.shape[0]
        joined["b"][:, first:end] = 0
    return joined


JOINED = joined_layers._joined_lora
FAULTS = {
    "no adapter": lambda layers, dtype: {name: array * (name == "a") for name, array in JOINED(layers, dtype).items()},
    "no scale": dropping_the_scale,
    "no adapter on keys": ignoring_keys,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_decoder_that_gets_the_adapter_wrong_is_refused(zoo, monkeypatch, fault: str) -> None:
    policy, engine = made(zoo)
    monkeypatch.setattr(joined_layers, "_joined_lora", FAULTS[fault])
    with pytest.raises(RunError, match="would not be sound"):
        check_parity(policy, engine, TASKS, 0)


@pytest.mark.parametrize("trained", [False, True])
def test_a_stale_b_is_refused(zoo, monkeypatch, trained: bool) -> None:
    """A decoder that holds on to the B it began with, be it zero or that of a saved adapter."""
    policy, engine = made(zoo)
    if trained:
        policy.adapters.load_state(shaken(policy.adapters.state()))
    check_parity(policy, engine, TASKS, 0)
    for product in engine.generator.decoding.decoder.blocks.products:
        product.refresh(mx.float32)  # takes over the policy's own B, once more
    monkeypatch.setattr(joined_layers.LastSeen, "changed", lambda *_: False)
    with pytest.raises(RunError, match="would not be sound"):
        check_parity(policy, engine, TASKS, 0)


def test_a_wrong_update_is_refused_as_well(zoo, monkeypatch) -> None:
    """What is compared is `group_logprobs`, which the update goes through, not the plain way beside it."""
    policy, engine = made(zoo)
    assert policy.share_prompts
    monkeypatch.setattr("grpo.model.policy.shared_hidden", lambda *args: 1.1 * shared_hidden(*args))
    with pytest.raises(RunError, match="would not be sound"):
        check_parity(policy, engine, TASKS, 0)


@pytest.mark.each_value
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_policy_is_what_it_was_whatever_happens(zoo, monkeypatch, kind: str, fails: bool) -> None:
    policy, engine = made(zoo, type=kind)
    state, names = policy.adapters.state(), list(policy.adapters.names)
    drawn_before = [array.tolist() for array in mx.random.state]
    if fails:

        def interrupted(*_args: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(policy, "group_logprobs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check_parity(policy, engine, TASKS, 0)
    else:
        check_parity(policy, engine, TASKS, 0)
    now = policy.adapters.state()
    assert now.keys() == state.keys()
    assert all(now[path] is array for path, array in state.items())
    assert (policy.adapters.active, policy.adapters.names) == ("policy", names)
    assert [array.tolist() for array in mx.random.state] == drawn_before


@pytest.mark.parametrize("multiple", [1, 16])
def test_it_goes_through_the_update_s_micro_batches(zoo, monkeypatch, multiple: int) -> None:
    policy, engine = made(zoo)
    shapes, group_logprobs = [], policy.group_logprobs

    def seen(prompts: mx.array, lengths: mx.array, index: mx.array, completions: mx.array, *rest: Any) -> Any:
        shapes.append((prompts.size + completions.size, completions.shape[1]))
        return group_logprobs(prompts, lengths, index, completions, *rest)

    monkeypatch.setattr(policy, "group_logprobs", seen)
    check_parity(policy, engine, TASKS, 0, Packing(tokens=128, rows=8, group=2, multiple=multiple))
    assert len(shapes) > 2
    assert max(tokens for tokens, _ in shapes) <= 128
    assert all(width % multiple == 0 for _, width in shapes)


def test_an_adapter_that_cannot_show_is_told_of(zoo, monkeypatch) -> None:
    policy, engine = made(zoo)
    monkeypatch.setattr("grpo.planning.parity.TRIES", 1)
    monkeypatch.setattr("grpo.planning.parity.FIRST_B", 1e-6)
    assert "too little to tell whether decoding uses" in check_parity(policy, engine, TASKS, 0)


def decoded(monkeypatch, engine: RolloutEngine) -> list[list[int]]:
    """The lengths of the prompts of each decoding from here on."""
    seen, generate = [], engine.generator.generate

    def counted(requests: Any, *rest: Any) -> Any:
        seen.append([len(request.prompt_ids) for request in requests])
        return generate(requests, *rest)

    monkeypatch.setattr(engine.generator, "generate", counted)
    return seen


def test_a_first_size_that_shows_is_checked_once(zoo, monkeypatch) -> None:
    policy, engine = made(zoo)
    seen = decoded(monkeypatch, engine)
    assert 0.1 <= moved(check_parity(policy, engine, TASKS, 0)) <= 1
    assert seen == [[3, 17, 40, 9]]


@pytest.mark.parametrize(
    ("name", "value", "least", "most"),
    [("FIRST_B", 1e-5, 0.1, 1), ("SHOWN", (0.01, 10.0, 0.02), 0.01, 0.03)],
    ids=["too small to be seen", "too large"],
)
def test_another_size_is_searched_with_the_shortest_prompt_and_then_checked_with_all(
    zoo, monkeypatch, name: str, value: Any, least: float, most: float
) -> None:
    monkeypatch.setattr(parity, name, value)
    policy, engine = made(zoo)
    seen = decoded(monkeypatch, engine)
    assert 0.5 * least <= moved(check_parity(policy, engine, TASKS, 0)) <= 2 * most
    assert seen[0] == seen[-1] == [3, 17, 40, 9]
    assert len(seen) > 3
    assert all(lengths == [3] for lengths in seen[1:-1])


@pytest.mark.parametrize(
    "moves",
    [
        lambda size: 0.01 * size,  # hardly
        lambda size: 500 * size,
        lambda size: 1e-3 * size if size < 0.11 else 0.2 if size < 0.12 else 40.0,  # all at once
        lambda size: math.nan if size > 1e-3 else 300 * size,  # too much for float16
    ],
)
def test_a_size_of_b_is_found_that_shows_and_does_not_break_the_model(zoo, moves) -> None:
    assert 0.1 <= moves(parity._size_of_b(made(zoo)[0], moves)) <= 1


def test_the_bound_grows_where_a_low_temperature_magnifies_rounding(zoo) -> None:
    policy, _ = made(zoo)
    for temperature, bound in ((1.0, 1e-3), (0.5, 2e-3), (2.0, 1e-3)):
        policy.temperature = temperature
        assert math.isclose(gap_bound(policy), bound)


def test_an_exception_is_told_by_its_type_and_place(zoo, monkeypatch) -> None:
    policy, engine = made(zoo)

    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("CUDA kernel failed to compile")

    monkeypatch.setattr(StockAttention, "attend", broken)
    with pytest.raises(UserError, match=r"joined layers.*: RuntimeError in .*test_parity\.py:\d+: CUDA kernel failed"):
        check_parity(policy, engine, TASKS, 0)
