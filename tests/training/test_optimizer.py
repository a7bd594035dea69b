"""Optimizers by name, precise whatever the model's dtype; quantised weights stay as they are."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.utils import load_model, load_tokenizer, quantize_model, save
from training.sections import make_batches, updater, with_advantages
from training.test_update import groups, recipe

from grpo.backend import device
from grpo.config import AdapterConfig, ModelConfig, OptimConfig
from grpo.config.optim import OPTIMIZER_ARGS
from grpo.errors import UserError
from grpo.model.adapters import Adapters
from grpo.model.load import load
from grpo.model.policy import Policy
from grpo.training.algorithms import CLASSES, make_optimizer
from grpo.training.optimizer import Float32Optimizer


def one_weight(value: float, dtype: mx.Dtype) -> nn.Module:
    model = nn.Module()
    model.weight = mx.array([[value]], dtype)
    return model


def test_the_names_of_optimizers_own_arguments_are_known() -> None:
    """So that one that is written beside `optimizer_args` is told where it belongs."""
    names = {name for kind in CLASSES.values() for name in inspect.signature(kind).parameters}
    assert names - {"learning_rate", "weight_decay"} == OPTIMIZER_ARGS


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_optimizer_descends_at_the_rate_it_is_told(name: str) -> None:
    model = one_weight(1.0, mx.float32)
    optimizer = Float32Optimizer(OptimConfig(steps=1, learning_rate=0.01, optimizer=name), model.parameters())
    optimizer.update(model, {"weight": mx.array([[1.0]])})
    first = 1 - model.weight.item()
    assert first > 0
    optimizer.learning_rate = 0.0
    optimizer.update(model, {"weight": mx.array([[1.0]])})
    assert 1 - model.weight.item() == pytest.approx(first, rel=1e-5)


def test_adamw_by_hand() -> None:
    model = one_weight(2.0, mx.float32)
    cfg = OptimConfig(steps=1, learning_rate=0.1, weight_decay=0.5)
    Float32Optimizer(cfg, model.parameters()).update(model, {"weight": mx.array([[3.0]])})
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)


def test_small_updates_of_bfloat16_weights_add_up() -> None:
    model = one_weight(1.0, mx.bfloat16)
    optimizer = Float32Optimizer(OptimConfig(steps=1, learning_rate=1e-4, optimizer="sgd"), model.parameters())
    for _ in range(100):  # each a fortieth of what bfloat16 can tell from 1
        optimizer.update(model, {"weight": mx.array([[-1.0]])})
    assert model.weight.dtype == mx.bfloat16
    assert model.weight.item() == pytest.approx(1.01, abs=0.004)
    assert optimizer.state["precise"]["weight"].item() == pytest.approx(1.01, abs=1e-5)


def test_the_state_is_float32_and_comes_back() -> None:
    model = one_weight(1.0, mx.bfloat16)
    cfg = OptimConfig(steps=1, learning_rate=0.01)
    optimizer, gradient = Float32Optimizer(cfg, model.parameters()), mx.array([[1.0]])
    optimizer.update(model, {"weight": gradient})
    state = optimizer.state
    assert {array.dtype for path, array in tree_flatten(state) if path != "step"} == {mx.float32}
    expected = []
    for _ in range(2):
        optimizer.update(model, {"weight": gradient})
        expected.append(model.weight.item())
    again, other = one_weight(1.0, mx.bfloat16), Float32Optimizer(cfg, model.parameters())
    other.state = state
    for value in expected:
        other.update(again, {"weight": gradient})
        assert again.weight.item() == value


def trodden(name: str, dtype: mx.Dtype, compiled: bool) -> list[dict[str, mx.array]]:
    """Weights and the optimizer's state after each of four steps at four rates, the third after coming back."""
    keys = iter(mx.random.split(mx.random.key(0), 40))
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model.update(tree_map(lambda a: mx.random.normal(a.shape, dtype, key=next(keys)), model.parameters()))
    cfg = OptimConfig(steps=4, optimizer=name, compile=compiled)
    optimizer, after = Float32Optimizer(cfg, model.parameters()), []
    for step, rate in enumerate([0.01, 0.0, 0.05, 0.02]):
        if step == 2:
            saved = tree_flatten(optimizer.state)
            optimizer = Float32Optimizer(cfg, model.parameters())
            optimizer.state = tree_unflatten(saved)
        optimizer.learning_rate = rate
        drawn = tree_map(lambda a: mx.random.normal(a.shape, key=next(keys)), model.parameters())
        optimizer.update(model, tree_flatten(drawn, destination={}))
        after.append(dict(tree_flatten({"model": model.parameters(), "state": optimizer.state})))
    return after


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="mx.compile on a CPU calls a C++ compiler")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_compiled_as_on_a_gpu_every_optimizer_does_the_same(monkeypatch, name: str, dtype: mx.Dtype) -> None:
    plain = trodden(name, dtype, compiled=False)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    mx.enable_compile()
    try:
        traced = trodden(name, dtype, compiled=True)
    finally:
        mx.disable_compile()
    for one, other in zip(plain, traced, strict=True):
        assert one.keys() == other.keys()
        for path, array in one.items():
            assert array.dtype == other[path].dtype, path
            assert mx.allclose(array, other[path], rtol=1e-5, atol=1e-6), path


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": "sgd", "optimizer_args": {"momentun": 0.9}}, "sgd takes no 'momentun' here; it takes momentum"),
        ({"optimizer": "adam", "optimizer_args": {"weight_decay": 0.1}}, "set optim.weight_decay"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "weight_decay does nothing with adam"),
        ({"optimizer": "adamw", "optimizer_args": {"betas": [2.0, 0.9]}}, "beta1"),
    ],
)
def test_arguments_that_will_not_do(settings: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_optimizer(OptimConfig(steps=1, **settings))


def test_arguments_reach_the_optimizer() -> None:
    optimizer = make_optimizer(OptimConfig(steps=1, optimizer="lion", optimizer_args={"betas": [0.5, 0.6]}))
    assert optimizer.betas == [0.5, 0.6]


def quantised(source: Path, folder: Path, bits: int) -> Path:
    """The model in a folder of its own, quantised as the Hub has them."""
    model, config = load_model(source)
    model, config = quantize_model(model, config, 64, bits)
    save(folder, source, model, load_tokenizer(source), config)
    return folder


@pytest.mark.quick_cases("dora-4-when loaded")
@pytest.mark.parametrize(
    ("kind", "bits", "when"), [("lora", 4, "before"), ("dora", 4, "when loaded"), ("dora", 8, "before")]
)
def test_packed_weights_are_bit_identical_after_fifty_steps(
    toy_folder, tmp_path, kind: str, bits: int, when: str
) -> None:
    if when == "before":
        model, _ = load(ModelConfig(name=str(quantised(toy_folder, tmp_path, bits))))
    else:
        model, _ = load(ModelConfig(name=str(toy_folder), quantize=bits))
    assert model.layers[0].mlp.up_proj.bits == bits
    policy = Policy(model, Adapters(model, AdapterConfig(type=kind, rank=2), mx.random.key(0)), 1.0)
    cfg = recipe(optim={"learning_rate": 1e-2, "micro_batch_tokens": 999})
    before = {path: array + 0 for path, array in tree_flatten(model.parameters())}
    mx.eval(before)
    update, batches = updater(policy, cfg), make_batches(with_advantages(groups(policy), cfg), cfg)
    for step in range(50):
        update([batches], step + 1)
    trained = set(policy.adapters.state())
    for path, array in tree_flatten(model.parameters()):
        assert mx.array_equal(array, before[path]) == (path not in trained), path


def test_every_weight_moves_where_whole_weights_train(toy_folder) -> None:
    model, _ = load(ModelConfig(name=str(toy_folder)))
    policy = Policy(model, Adapters(model, AdapterConfig(type="full"), mx.random.key(0)), 1.0)
    cfg = recipe(optim={"learning_rate": 1e-2})
    before = {path: array + 0 for path, array in tree_flatten(model.parameters())}
    mx.eval(before)
    updater(policy, cfg)([make_batches(with_advantages(groups(policy), cfg), cfg)], 1)
    assert all(not mx.array_equal(array, before[path]) for path, array in tree_flatten(model.parameters()))
