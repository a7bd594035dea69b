"""What trains (LoRA, DoRA, whole weights, on quantised bases too), and its named states."""

from __future__ import annotations

import time

import mlx.core as mx
import pytest
from conftest import shaken
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from grpo.config import AdapterConfig, ModelConfig
from grpo.errors import UserError
from grpo.model.adapters import Adapters, load_adapter
from grpo.model.load import load

TOKENS = mx.array([[5, 6, 7, 8], [9, 10, 11, 12]])


def adapters_of(model, shake: bool = True, **settings) -> Adapters:
    defaults = {} if settings.get("type") == "full" else {"rank": 4}
    adapters = Adapters(model, AdapterConfig(**{**defaults, **settings}), mx.random.key(0))
    if shake:
        adapters.load_state(shaken(adapters.state()))
    return adapters


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(mx.array_equal(array, other[path]) for path, array in one.items())


def test_states_are_added_copied_used_and_dropped(zoo) -> None:
    adapters = adapters_of(zoo("tied"))
    first = adapters.state()
    adapters.copy("policy", "best")
    adapters.load_state({path: 2 * array for path, array in first.items()})
    adapters.add("other", {path: 3 * array for path, array in first.items()})
    assert sorted(adapters.names) == ["best", "other", "policy", "reference"]
    assert same(adapters.state("best"), first)
    with adapters.use("other"):
        assert same(adapters.state(), {path: 3 * array for path, array in first.items()})
        with adapters.use("best"):
            assert same(adapters.state(), first)
        assert same(adapters.state("policy"), {path: 2 * array for path, array in first.items()})
    assert same(adapters.state(), {path: 2 * array for path, array in first.items()})
    adapters.drop("other")
    assert "other" not in adapters.names
    with pytest.raises(ValueError, match="active"):
        adapters.add("policy", first)


def test_states_that_do_not_fit_are_refused_and_change_nothing(zoo) -> None:
    adapters = adapters_of(zoo("tied"))
    first = adapters.state()
    path, *rest = first
    with pytest.raises(ValueError, match=r"the model has no trained array model\.other"):
        adapters.load_state({path: 2 * first[path], "model.other": first[path]})
    assert same(adapters.state(), first)
    for odd in ({name: first[name] for name in rest}, {**first, "model.other": first[path]}):
        with pytest.raises(ValueError, match="half does not have exactly the arrays that train"):
            adapters.add("half", odd)
    assert sorted(adapters.names) == ["policy", "reference"]


def test_blocks_nest_back_into_the_policy_and_end_in_errors_one_by_one(zoo) -> None:
    adapters = adapters_of(zoo("tied"))
    first = adapters.state()
    with adapters.use("reference"):
        with adapters.use("policy"):
            assert same(adapters.state(), first)
        with pytest.raises(ZeroDivisionError), adapters.use("policy"):
            raise ZeroDivisionError
        assert adapters.active == "reference"
        with pytest.raises(KeyError), adapters.use("nobody"):
            pass
        assert adapters.active == "reference"
    assert sorted(adapters.names) == ["policy", "reference"]
    assert same(adapters.state(), first)


def test_switching_takes_less_than_a_millisecond_for_196_modules(zoo) -> None:
    adapters = adapters_of(zoo("tied", num_hidden_layers=28))
    assert len(adapters.state()) == 2 * 196
    spent = []
    for _ in range(20):
        start = time.perf_counter()
        with adapters.use("reference"):
            pass
        spent.append((time.perf_counter() - start) / 2)
    assert min(spent) < 5e-3  # generous: it is about 1 ms on a busy core


def test_the_reference_moves_by_the_mixing_factor_when_it_is_due(zoo) -> None:
    cfg = AdapterConfig(rank=4, sync_reference_every=3, ref_model_mixup_alpha=0.25)
    adapters = Adapters(zoo("tied"), cfg, mx.random.key(0))
    before, policy = adapters.state("reference"), shaken(adapters.state())
    adapters.load_state(policy)
    for step in (1, 2):
        adapters.sync_reference(cfg, step)
    assert same(adapters.state("reference"), before)
    adapters.sync_reference(cfg, 3)
    for path, array in adapters.state("reference").items():
        assert mx.allclose(array, 0.25 * policy[path] + 0.75 * before[path], atol=1e-7)


def test_going_on_from_an_adapter_makes_a_frozen_copy_of_it_the_reference(zoo, tmp_path) -> None:
    first = adapters_of(zoo("tied"))
    first.save(tmp_path)
    adapters = adapters_of(zoo("tied"), shake=False, path=str(tmp_path))
    assert same(adapters.state(), first.state())
    adapters.load_state({path: 2 * array for path, array in first.state().items()})
    assert same(adapters.state("reference"), first.state())


def test_an_adapter_that_does_not_fit_says_its_rank(zoo, tmp_path) -> None:
    adapters_of(zoo("tied")).save(tmp_path)
    with pytest.raises(UserError, match=r"set this in the recipe: adapter: \{rank: 4, scale: 2.0, targets:"):
        adapters_of(zoo("tied"), rank=8, path=str(tmp_path))


def test_an_adapter_that_was_trained_with_another_scale_is_refused(zoo, tmp_path) -> None:
    adapters_of(zoo("tied"), scale=20.0).save(tmp_path)
    with pytest.raises(
        UserError, match=r"B A multiplied by 20, but this recipe multiplies it by 2: set adapter\.scale to 20$"
    ):
        adapters_of(zoo("tied"), path=str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="not in mlx-lm's format"):
        adapters_of(zoo("tied"), path=str(tmp_path))


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_every_kind_changes_nothing_at_first_and_is_saved_for_mlx_lm(zoo, tmp_path, kind: str) -> None:
    base = zoo("tied")
    fresh = zoo("tied")
    adapters_of(fresh, shake=False, type=kind)
    assert mx.allclose(fresh(TOKENS), base(TOKENS), atol=1e-5)
    model = zoo("tied")
    adapters = adapters_of(model, type=kind)
    with adapters.use("reference"):
        assert mx.allclose(model(TOKENS), base(TOKENS), atol=1e-5)
    adapters.save(tmp_path)
    for take in (load_adapter, load_adapters):
        saved = zoo("tied")
        take(saved, tmp_path)
        assert mx.allclose(saved(TOKENS), model(TOKENS), atol=1e-5)
        assert not mx.allclose(saved(TOKENS), base(TOKENS), atol=1e-2)


@pytest.mark.parametrize(("base", "kind"), [("tied", "lora"), ("tied", "dora"), ("moe", "lora")])
def test_merged_weights_compute_the_same(zoo, base: str, kind: str) -> None:
    model = zoo(base)
    adapters = adapters_of(model, type=kind)
    before = model(TOKENS)
    merged = adapters.merge()
    assert mx.allclose(merged(TOKENS), before, atol=1e-4)
    assert {path for path, _ in tree_flatten(merged.parameters())} == {
        path for path, _ in tree_flatten(zoo(base).parameters())
    }


def test_a_range_of_layers(zoo, tmp_path) -> None:
    model = zoo("tied")
    adapters = adapters_of(model, layers=(1, 2), targets=("self_attn.q_proj", "mlp.up_proj"))
    assert set(adapters.state()) == {
        f"model.layers.1.{name}.lora_{x}" for name in ("self_attn.q_proj", "mlp.up_proj") for x in "ab"
    }
    adapters.save(tmp_path)
    for take in (load_adapter, load_adapters):
        saved = zoo("tied")
        take(saved, tmp_path)
        assert mx.allclose(saved(TOKENS), model(TOKENS), atol=1e-5)
    whole = adapters_of(zoo("tied"), type="full", layers=(0, 1))
    assert {path.split(".")[2] for path in whole.state()} == {"0"}
    with pytest.raises(UserError, match="the last block is 9, but this model has 3 blocks"):
        adapters_of(zoo("tied"), layers=(0, 9))


def test_a_quantised_model_has_no_weights_to_train(zoo) -> None:
    with pytest.raises(UserError, match="quantized weights cannot be trained"):
        adapters_of(zoo("quantised"), type="full")


def test_experts_have_no_dora(zoo) -> None:
    with pytest.raises(UserError, match="doesn't support DoRA"):
        adapters_of(zoo("moe"), type="dora")


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_when_it_is_loaded(toy_folder, bits: int) -> None:
    model, _ = load(ModelConfig(name=str(toy_folder), quantize=bits))
    layer = model.layers[0].mlp.up_proj
    assert (layer.bits, layer.weight.dtype) == (bits, mx.uint32)
    whole, _ = load(ModelConfig(name=str(toy_folder)))
    gap = mx.abs(model(TOKENS) - whole(TOKENS)).mean().item()
    assert 0 < gap < 1.5


def test_an_adapter_has_the_models_dtype(toy_folder) -> None:
    model, _ = load(ModelConfig(name=str(toy_folder), dtype="bfloat16"))
    adapters = adapters_of(model, shake=False)
    assert {array.dtype for array in adapters.state().values()} == {mx.bfloat16}


@pytest.mark.parametrize(("kind", "settings"), [("tied", {}), ("moe", {}), ("tied", {"type": "dora"})])
def test_how_far_an_adapter_has_gone_is_from_where_it_began(zoo, tmp_path, kind: str, settings: dict) -> None:
    """With `path` from that adapter; the product itself, made by hand, says the same."""
    first = adapters_of(zoo(kind), **settings)
    first.save(tmp_path)
    adapters = adapters_of(zoo(kind), shake=False, path=str(tmp_path), **settings)
    assert adapters.delta() == 0
    fresh = adapters_of(zoo(kind), shake=False, **settings)
    assert fresh.delta() == 0
    fresh.load_state(first.state())
    assert fresh.delta() > 0.1
    began = first.state()
    moved = {path: array + 0.01 * mx.random.normal(array.shape, key=mx.random.key(1)) for path, array in began.items()}
    adapters.load_state(moved)
    total = mx.array(0.0)
    for path in began:
        if path.endswith("lora_a"):
            difference = 2.0 * (added(moved, path) - added(began, path))
        elif path.endswith("lora_b"):
            continue
        else:
            difference = moved[path] - began[path]
        total += (difference**2).sum()
    assert adapters.delta() == pytest.approx(total.item() ** 0.5, rel=1e-4)
    adapters.add("reference", moved)  # as it has moved; the beginning stays
    assert adapters.delta() == pytest.approx(total.item() ** 0.5, rel=1e-4)


def added(state: dict, path: str) -> mx.array:
    """A layer's product, before its scale."""
    a, b = state[path], state[f"{path[:-1]}b"]
    return b @ a if a.ndim == 3 else a @ b  # experts keep both transposed
