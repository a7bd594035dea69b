"""Moments in 8 bits: what a byte can hold, by hand, and how an optimizer that keeps them so moves."""

from __future__ import annotations

import math
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from training.sections import make_batches, updater, with_advantages
from training.test_update import groups, recipe

from grpo.backend import device
from grpo.config import OptimConfig
from grpo.errors import UserError
from grpo.model.joined import Joined
from grpo.model.shards import Shards
from grpo.training import moments
from grpo.training import optimizer as optimizers
from grpo.training.algorithms import CLASSES, make_optimizer
from grpo.training.moments import BLOCK, MAPS, POSITIVE, SIGNED, SMALLEST, large, packed, scaled, unpacked
from grpo.training.optimizer import Float32Optimizer

ARGS = {"sgd": {"momentum": 0.9}, "adafactor": {"beta_1": 0.9}}
"""What gives an optimizer moments that has none by itself."""
ADAMW = MAPS["adamw"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of any size are packed, so that toys are."""
    monkeypatch.setattr(moments, "SMALLEST", 1)


def step(n: int) -> mx.array:
    return mx.array(n, mx.uint64)


def again(own: dict[str, mx.array], n: int = 1) -> dict[str, mx.array]:
    """A state as it is after it was packed at step n, and unpacked."""
    return unpacked(packed(own, {name: ADAMW[name] for name in own}, step(n)), ADAMW)


def block(*numbers: float) -> mx.array:
    """An array large enough to be packed, zeros behind these numbers of its first block."""
    return mx.concatenate([mx.array(numbers), mx.zeros(SMALLEST - len(numbers))])


def test_values_by_hand() -> None:
    state = packed({"m": block(-2.0, 2.0 * (64 / 127) ** 4), "v": block(3.0, 3.0 * (51 / 255) ** 8)}, ADAMW, step(1))
    assert state["m.codes"][:3].tolist() == [-127, 64, 0]
    assert state["v.codes"][:3].tolist() == [255, 51, 0]
    assert (state["m.codes"].dtype, state["v.codes"].dtype) == (mx.int8, mx.uint8)
    assert (state["m.scales"].dtype, state["m.scales"][:2].tolist()) == (mx.float32, [2.0, 0.0])
    assert state["v.scales"][:2].tolist() == [3.0, 0.0]
    assert unpacked(state, ADAMW)["v"][1].item() == pytest.approx(3.0 * 0.2**8, rel=1e-6)


@pytest.mark.parametrize("n", range(0, 4000, 401))
def test_what_a_byte_can_hold_comes_back_to_the_bit(n: int) -> None:
    """Whatever the dither: a state that is packed twice is what it was, or saving would change it."""
    signed = mx.arange(-127, 128).astype(mx.float32)
    own = {
        "m": mx.tile(mx.pad(0.3 * mx.sign(signed) * SIGNED.values(mx.abs(signed)), (0, 1)), 16),
        "v": mx.tile(0.7 * POSITIVE.values(mx.arange(256)), 16),
    }
    once = again(own, n)
    twice = packed(once, ADAMW, step(n + 1))
    assert twice["m.codes"][:255].tolist() == list(range(-127, 128))
    assert twice["v.codes"][:256].tolist() == list(range(256))
    assert all(mx.array_equal(array, once[name]) for name, array in unpacked(twice, ADAMW).items())


@pytest.mark.parametrize(("name", "how", "bound"), [("m", SIGNED, 4 / 127), ("v", POSITIVE, 8 / 255)])
def test_the_error_is_less_than_a_code(name: str, how: moments.Map, bound: float) -> None:
    """Codes are d(scale x^p) = p x^(p-1) scale / levels apart, so at most p/levels of the scale, and less below."""
    drawn = mx.random.normal((64, BLOCK), key=mx.random.key(0)) ** 3
    values = drawn if name == "m" else mx.abs(drawn)
    scales = mx.abs(values).max(axis=1, keepdims=True)
    errors = mx.abs(again({name: values})[name] - values)
    assert (errors <= bound * scales * (1 + 1e-5)).all().item()
    rooted = (mx.abs(values) / scales) ** (1 / 2**how.roots)
    steps = 2**how.roots * mx.minimum(rooted + 1 / how.levels, 1.0) ** (2**how.roots - 1) / how.levels * scales
    assert (errors <= steps * (1 + 1e-5)).all().item()
    assert (errors / scales).max().item() > bound / 4  # or the bound says nothing


def test_blocks_of_zeros_stay_zeros() -> None:
    own = {"m": mx.zeros((64, 64)), "v": mx.zeros((64, 64))}
    assert all(mx.array_equal(array, own[name]) for name, array in again(own).items())
    sizes, scales = scaled(mx.array([[0.0, 0.0], [-4.0, 1.0]]))  # or NaN, which devices round to what they like
    assert (sizes.tolist(), scales.tolist()) == ([[0.0, 0.0], [1.0, 0.25]], [0.0, 4.0])


def test_a_second_moment_never_becomes_0() -> None:
    """Adam divides by its root: 1e-30 beside 1 would be 0 in the paper's map, and m / 0 an update without bound."""
    tiny = [10.0**-power for power in range(5, 36, 5)]
    came = again({"v": block(1.0, *tiny)})["v"]
    assert (came[1:8] >= (1 / 255) ** 8 * 0.99).all().item()
    assert not came[8:].any().item()


@pytest.mark.parametrize("shape", [(4097,), (67, 131), (3, 37, 41), (4096,), (1, 5000)])
def test_sizes_that_blocks_do_not_divide(shape: tuple[int, ...]) -> None:
    values = mx.random.normal(shape, key=mx.random.key(1))
    state = packed({"m": values}, {"m": SIGNED}, step(1))
    assert state["m.codes"].shape == shape
    assert state["m.scales"].shape == (math.ceil(values.size / BLOCK),)
    last = values.reshape(-1)[(values.size - 1) // BLOCK * BLOCK :]
    assert state["m.scales"][-1].item() == mx.abs(last).max().item()
    assert mx.allclose(unpacked(state, ADAMW)["m"], values, rtol=0.2, atol=1e-3)


def test_small_arrays_and_what_is_no_moment_stay_as_they_are() -> None:
    own = {"m": mx.ones(SMALLEST - 1), "other": mx.ones(SMALLEST), "v": mx.ones(SMALLEST)}
    assert set(packed(own, large(own, ADAMW), step(1))) == {"m", "other", "v.codes", "v.scales"}


def test_over_the_steps_a_number_is_rounded_to_itself_in_the_mean() -> None:
    """Dithered: a number between two codes is each of them in proportion, at every place."""
    low, high = SIGNED.values(mx.array([100, 101])).tolist()
    values = mx.concatenate([mx.ones((16, 1)), mx.full((16, BLOCK - 1), low + 0.3 * (high - low))], axis=1)
    over = mx.stack([again({"m": values}, n)["m"] for n in range(200)])
    up = (over[:, :, 1:] > (low + high) / 2).mean(axis=0)
    assert up.min().item() > 0.25
    assert up.max().item() < 0.35
    assert mx.abs(up.mean() - 0.3).item() < 0.002


def test_a_slow_mean_follows_what_is_smaller_than_a_code() -> None:
    """1/1000 of the way in a step, where codes are 1/30 apart. Rounded to the nearest it would never move."""
    v = mx.concatenate([mx.ones((16, 1)), mx.full((16, BLOCK - 1), 0.1)], axis=1)
    for n in range(700):
        v = again({"v": mx.where(v == 1, 1, 0.999 * v)}, n)["v"]
    left = (v[:, 1:] / 0.1).tolist()
    assert np.mean(left) == pytest.approx(0.999**700, rel=0.03)
    assert np.min(left) > 0.8 * 0.999**700
    assert np.max(left) < 1.2 * 0.999**700


def square(n: int = 64) -> nn.Module:
    model = nn.Module()
    model.weight = mx.random.normal((n, n), key=mx.random.key(0))
    model.bias = mx.zeros(n)
    return model


def trajectory(name: str, kept: str, seed: int, steps: int = 60) -> list[float]:
    """Losses of a least-squares problem with noisy gradients, whose columns' sizes differ by a factor of 1,000."""
    keys = iter(mx.random.split(mx.random.key(seed), steps + 2))
    model = square()
    sizes = mx.exp(mx.linspace(-3.5, 3.5, 64))
    goal = mx.random.normal((64, 64), key=next(keys))
    rate = {"sgd": 1.0, "adadelta": 1.0, "adagrad": 0.1, "adafactor": 0.03}.get(name, 0.03)
    cfg = OptimConfig(steps=steps, optimizer=name, learning_rate=rate, optimizer_args=ARGS.get(name, {}), moments=kept)
    optimizer, losses = Float32Optimizer(cfg, model.trainable_parameters()), []

    def loss(model: nn.Module) -> mx.array:
        return ((sizes * (model.weight - goal)) ** 2).mean() + (model.bias**2).mean()

    for _ in range(steps):
        value, slopes = nn.value_and_grad(model, loss)(model)
        noise = 0.3 * mx.random.normal(slopes["weight"].shape, key=next(keys)) * mx.abs(slopes["weight"])
        optimizer.update(model, {"weight": slopes["weight"] + noise, "bias": slopes["bias"]})
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_training_goes_as_with_float32_moments(name: str) -> None:
    for seed in range(2):
        precise, coarse = trajectory(name, "float32", seed), trajectory(name, "int8", seed)
        assert precise[-1] < 0.99 * precise[0]
        assert coarse[-1] == pytest.approx(precise[-1], rel=0.05)
        assert coarse[1:] != precise[1:]  # moments were packed


@pytest.mark.parametrize("group", [2**22, 2048])  # whole arrays, or in parts
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_moments_are_those_of_float32_but_for_a_code(name: str, group: int, monkeypatch) -> None:
    """Signs, places and scales: gradients of both signs, whose sizes differ from block to block."""
    monkeypatch.setattr(optimizers, "GROUP", group)
    states = {}
    for kept in ("float32", "int8"):
        model = square()
        cfg = OptimConfig(steps=1, optimizer=name, optimizer_args=ARGS.get(name, {}), moments=kept)
        optimizer = Float32Optimizer(cfg, model.trainable_parameters())
        for n in range(2):
            slopes = mx.random.normal((64, 64), key=mx.random.key(n)) * mx.exp(mx.linspace(-3, 3, 64))[:, None]
            optimizer.update(model, {"weight": slopes, "bias": mx.ones(64)})
        own = {path.removeprefix("weight."): a for path, a in tree_flatten(optimizer.state) if "weight." in path}
        states[kept] = unpacked(own, MAPS[name])
    for moment in MAPS[name]:
        fine, coarse = (states[kept][moment].reshape(-1, BLOCK) for kept in ("float32", "int8"))
        errors = mx.abs(coarse - fine).max(axis=1) / mx.abs(fine).max(axis=1)
        assert 0 < errors.max().item() < 0.08, moment


@pytest.mark.parametrize("group", [2**22, 2048])  # whole arrays, or in parts
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_saved_and_loaded_it_goes_on_to_the_bit(dtype: mx.Dtype, group: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(optimizers, "GROUP", group)
    cfg = OptimConfig(steps=1, learning_rate=0.01, moments="int8")
    runs = []
    for stops in (False, True):
        model = square()
        model.apply(lambda array: array.astype(dtype))
        optimizer = Float32Optimizer(cfg, model.trainable_parameters())
        for n in range(6):
            if stops and n == 3:
                path = str(tmp_path / "state.safetensors")
                mx.save_safetensors(path, tree_flatten(optimizer.state, destination={}))
                optimizer = Float32Optimizer(cfg, model.trainable_parameters())
                optimizer.state = tree_unflatten(mx.load(path))
            shapes = tree_flatten(model.trainable_parameters(), destination={})
            optimizer.update(
                model, {path: mx.random.normal(a.shape, key=mx.random.key(n)) for path, a in shapes.items()}
            )
        runs.append(tree_flatten({"model": model.parameters(), "state": optimizer.state}, destination={}))
    whole, parts = runs
    assert whole["state.weight.m.codes"].dtype == mx.int8
    assert "state.bias.m" in whole
    assert whole.keys() == parts.keys()
    assert all(mx.array_equal(array, parts[path]) for path, array in whole.items())


@pytest.mark.parametrize(("before", "after"), [("float32", "int8"), ("int8", "float32"), ("int8", "int8")])
def test_a_saved_state_fits_an_optimizer_with_other_moments(before: str, after: str) -> None:
    old, new = (Float32Optimizer(OptimConfig(steps=1, moments=kept), square().parameters()) for kept in (before, after))
    model = square()
    old.update(model, {"weight": mx.random.normal((64, 64)), "bias": mx.ones(64)})
    saved = tree_flatten(old.state, destination={})
    fitted = new.fitted(saved)
    joined = new.fitted(Joined(Shards(), saved))  # arrays that may be read once
    assert all(mx.array_equal(array, joined[path]) for path, array in fitted.items())
    expected = tree_flatten(new.state, destination={})
    assert {path: (a.shape, a.dtype) for path, a in fitted.items()} == {
        path: (a.shape, a.dtype) for path, a in expected.items()
    }
    assert fitted["step"].item() == 1
    assert mx.array_equal(fitted["bias.m"], saved["bias.m"])
    moved = {path.removesuffix(".codes"): a for path, a in fitted.items() if not path.endswith(".scales")}
    assert moved["weight.m"].any().item()
    if before == after:
        assert all(mx.array_equal(array, saved[path]) for path, array in fitted.items())
    else:
        there = new.fitted(old.fitted(fitted))
        assert all(mx.array_equal(array, fitted[path]) for path, array in there.items())


@pytest.mark.parametrize("kept", ["float32", "int8"])
@pytest.mark.parametrize(("before", "after"), [("lion", "adamw"), ("muon", "adamw")])
def test_another_optimizers_state_comes_back_as_it_is(before: str, after: str, kept: str) -> None:
    """So that the trainer refuses it in words."""
    cfg, own = OptimConfig(steps=1, optimizer=after, moments="int8"), square().parameters()
    theirs = Float32Optimizer(OptimConfig(steps=1, optimizer=before, moments=kept), own)
    saved = tree_flatten(theirs.state, destination={})
    fitted = Float32Optimizer(cfg, own).fitted(saved)
    assert fitted.keys() == saved.keys()
    assert all(mx.array_equal(array, saved[path]) for path, array in fitted.items())


@pytest.mark.parametrize(("name", "needs"), [("sgd", "momentum"), ("adafactor", "beta_1")])
def test_an_optimizer_without_moments_refuses(name: str, needs: str) -> None:
    with pytest.raises(UserError, match=f"int8 does nothing with {name}, .* unless optim.optimizer_args sets {needs}"):
        make_optimizer(OptimConfig(steps=1, optimizer=name, moments="int8"))
    make_optimizer(OptimConfig(steps=1, optimizer=name, moments="int8", optimizer_args={needs: 0.9}))


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_array_of_the_parameters_size_is_packed(name: str) -> None:
    """But the copies of what is not float32."""
    cfg = OptimConfig(steps=1, optimizer=name, moments="int8", optimizer_args=ARGS.get(name, {}))
    state = tree_flatten(Float32Optimizer(cfg, square().parameters()).state, destination={})
    large = {path: array.dtype for path, array in state.items() if array.size >= SMALLEST}
    assert set(large.values()) <= {mx.int8, mx.uint8}
    assert {path.split(".")[1] for path in large} == set(MAPS[name])
    assert {path.split(".")[1] for path, dtype in large.items() if dtype == mx.uint8} <= {"v", "u"}


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_moments(make_policy, small, wrong: float) -> None:
    """It is skipped before it reaches them, as with float32 moments."""
    policy = make_policy().policy
    cfg = recipe(optim={"moments": "int8"})
    update, batches = updater(policy, cfg), make_batches(with_advantages(groups(policy), cfg), cfg)
    update([batches], 1)
    before = tree_flatten(update.optimizer.state, destination={})
    assert any(path.endswith("m.codes") and array.any().item() for path, array in before.items())
    gradient = update.gradient(batches)
    path = next(iter(gradient.arrays))
    gradient.arrays[path] = gradient.arrays[path] * wrong
    assert update.apply(gradient, 2).skipped == 1
    after = tree_flatten(update.optimizer.state, destination={})
    assert all(mx.array_equal(array, after[path]) for path, array in before.items())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="mx.compile on a CPU calls a C++ compiler")
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_compiled_as_on_a_gpu_it_does_the_same(monkeypatch, name: str) -> None:
    """A last bit may round a number to the next code, which is a percent of it."""
    plain = trajectory(name, "int8", 0, 20)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    mx.enable_compile()
    try:
        traced = trajectory(name, "int8", 0, 20)
    finally:
        mx.disable_compile()
    assert traced == pytest.approx(plain, rel=1e-3)
