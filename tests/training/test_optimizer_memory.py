"""Whole weights train in one set of weights, gradients and moments: measured, and the same numbers to the bit."""

from __future__ import annotations

import gc

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from conftest import make_model
from mlx.utils import tree_flatten, tree_map
from planning.loads import workload
from training.sections import make_minibatches, updater
from training.test_packing import row
from training.test_update import recipe

from grpo.backend.device import on_gpu
from grpo.config import AdapterConfig, OptimConfig
from grpo.generation.generator import Generator
from grpo.model.adapters import Adapters
from grpo.model.drawn import NoTokenizer
from grpo.model.policy import Policy
from grpo.planning.planner import make_plan
from grpo.rollout import RolloutEngine, sampling_of
from grpo.runs.checkpoint import Context
from grpo.runs.loop import Loop
from grpo.runs.signals import StopRequest
from grpo.runs.state import RunState
from grpo.scoring.scorer import Scorer
from grpo.training import optimizer as optimizers
from grpo.training.algorithms import CLASSES, make_optimizer
from grpo.training.inplace import parts_of
from grpo.training.moments import MAPS
from grpo.training.optimizer import WHOLE, Float32Optimizer, bytes_of_a_group, grouped
from grpo.training.trainer import Trainer
from grpo.training.update import _squares, bytes_of_a_norm
from grpo.types import Group, Task

WIDE = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 32, "vocab_size": 512, "num_hidden_layers": 12}
"""8.6 million parameters, the largest array a fiftieth of them."""
GROUP = 2**17


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """As small beside the toy as the groups are beside a real model."""
    monkeypatch.setattr(optimizers, "GROUP", GROUP)


def drawn(arrays: dict[str, mx.array], seed: int, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    keys = mx.random.split(mx.random.key(seed), len(arrays))
    found = {
        path: mx.random.normal(a.shape, dtype, key=key) for (path, a), key in zip(arrays.items(), keys, strict=True)
    }
    mx.eval(found)
    return found


def alike(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Arrays for where only their sizes matter: drawn ones take longer than the optimizer's step."""
    found = {path: mx.full(array.shape, 0.1) for path, array in arrays.items()}
    mx.eval(found)
    return found


class OnePrompt:
    """A source of one prompt, the same at every step."""

    def take(self, n: int) -> list[Task]:
        return [Task(0, "", (1, 2, 3), {})] * n

    def observe(self, groups) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, int]:
        return {}

    def load_state(self, state) -> None:
        pass


def numbers(model: nn.Module) -> int:
    return sum(array.size for _, array in tree_flatten(model.parameters()))


def resting() -> int:
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()


def whole(**changes) -> Policy:
    model = make_model("untied", **WIDE, **changes)
    return Policy(model, Adapters(model, AdapterConfig(type="full"), mx.random.key(0), reference=False), 1.0)


STATE_BYTES = {"adamw": 8, "adam": 8, "adamax": 8, "sgd": 4, "lion": 4, "adafactor": 0.03, "muon": 4, "rmsprop": 4,
               "adagrad": 4, "adadelta": 8}  # fmt: skip


PACKED_ARGS = {"sgd": {"momentum": 0.9}, "adafactor": {"beta_1": 0.9}}


@pytest.mark.each_value
@pytest.mark.parametrize("kept", ["float32", "int8"])
@pytest.mark.parametrize("layers", [16, 4])  # of half a group each, or of two groups
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_step_holds_nothing_twice(name: str, dtype: mx.Dtype, layers: int, kept: str) -> None:
    model = nn.Module()
    model.layers = [nn.Linear(256, 4096 // layers, bias=False) for _ in range(layers)]
    model.update(tree_map(lambda a: a.astype(dtype), model.parameters()))
    parameters = tree_flatten(model.parameters(), destination={})
    mx.eval(parameters)
    count = numbers(model)
    before = resting()
    arguments = PACKED_ARGS.get(name, {}) if kept == "int8" else {}
    cfg = OptimConfig(steps=1, optimizer=name, moments=kept, optimizer_args=arguments)
    optimizer = Float32Optimizer(cfg, model.parameters())
    optimizer.update(model, alike(parameters))
    del parameters
    copies = 0 if dtype == mx.float32 else 4
    held = (resting() - before) / count
    # A byte a moment, and a scale of 4 bytes for 256 of them; the rest of adafactor's are a row and a column.
    packed = len(MAPS[name]) * (1 + 4 / 256) + (0.03 if name == "adafactor" else 0)
    assert held == pytest.approx((STATE_BYTES[name] if kept == "float32" else packed) + copies, abs=0.05)
    gradients = alike(tree_flatten(model.parameters(), destination={}))
    mx.reset_peak_memory()
    optimizer.update(model, gradients)
    assert not gradients
    # Beside what stays and the gradients: what is at work of one group, an eighth of the parameters here.
    at_work = (mx.get_peak_memory() - before) / count - held - 4
    assert at_work <= 1.01 * bytes_of_a_group(cfg, model.parameters(), on_gpu()) / count


@pytest.mark.skipif(on_gpu(), reason="what is in flight on a GPU varies")
@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"sgd"}))  # it moves a parameter in its own place
def test_what_one_array_takes_while_it_moves_is_as_planned(name: str) -> None:
    """How many operations are in flight varies: the most is never above the plan, and is seen within a few steps."""
    model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(2)])  # each moves by itself
    cfg = OptimConfig(steps=1, optimizer=name)
    optimizer = Float32Optimizer(cfg, model.parameters())
    mx.eval(model.parameters())
    expected, peak = bytes_of_a_group(cfg, model.parameters(), gpu=False), 0
    for step in range(400):
        gradients = drawn(tree_flatten(model.parameters(), destination={}), step)
        mx.eval(optimizer.state)
        before = resting()
        optimizer.update(model, gradients)
        peak = max(peak, mx.get_peak_memory() - before)
        if step >= 2 and peak >= 0.95 * expected:
            break
    assert peak == pytest.approx(expected, rel=0.05)


def test_what_a_norm_takes_is_as_planned() -> None:
    """Small arrays are put behind one another and squared, a large one is squared alone."""
    for small, large in ((40, 0), (0, 1), (40, 1)):
        arrays = {f"small.{i}": mx.zeros((64, 32)) for i in range(small)}
        arrays |= {f"large.{i}": mx.zeros((1024, 512)) for i in range(large)}
        mx.eval(arrays)
        before, taken = resting(), []
        for _ in range(20):  # how much is held at once depends on who is faster
            mx.reset_peak_memory()
            _squares(arrays)
            taken.append(mx.get_peak_memory() - before)
        assert max(taken) == pytest.approx(bytes_of_a_norm(arrays), rel=0.01)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_groups_change_nothing(name: str, dtype: mx.Dtype) -> None:
    """MLX's own optimizer on the whole tree, after its own clipping, gives the same numbers to the bit."""
    optimizers.GROUP = 20
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5), nn.Linear(5, 2))
    model.update(tree_map(lambda a: a.astype(dtype), model.parameters()))
    cfg = OptimConfig(steps=1, optimizer=name, learning_rate=0.03)
    ours, theirs = Float32Optimizer(cfg, model.trainable_parameters()), make_optimizer(cfg)
    expected = {path: a.astype(mx.float32) for path, a in tree_flatten(model.trainable_parameters())}
    assert len(grouped(expected)) > 2
    for step in range(3):
        gradients = drawn(expected, step)
        clipped, norm = optim.clip_grad_norm(gradients, 0.5)
        expected = theirs.apply_gradients(clipped, expected)
        ours.update(model, gradients, mx.minimum(0.5 / (norm + 1e-6), 1.0))
    for path, array in tree_flatten(model.trainable_parameters()):
        assert mx.array_equal(array, expected[path].astype(dtype)), path
    state = dict(tree_flatten(ours.state))
    assert state["step"].item() == 3
    for path, array in tree_flatten(theirs.state):
        assert mx.array_equal(state[path], array), path


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("name", sorted(set(CLASSES) - WHOLE))
def test_parts_of_a_large_array_change_nothing(name: str, dtype: mx.Dtype) -> None:
    """MLX's own optimizer on the whole array gives the same numbers to the bit, and what others hold stays."""
    optimizers.GROUP = 600
    model = nn.Linear(67, 31)
    model.update(tree_map(lambda a: a.astype(dtype), model.parameters()))
    cfg = OptimConfig(steps=1, optimizer=name, learning_rate=0.03)
    ours, theirs = Float32Optimizer(cfg, model.trainable_parameters()), make_optimizer(cfg)
    held, copy = dict(model.trainable_parameters()), {path: a + 0 for path, a in model.trainable_parameters().items()}
    expected = {path: a.astype(mx.float32) for path, a in tree_flatten(model.trainable_parameters())}
    assert len(parts_of(expected["weight"].size, 600)) == 3
    for step in range(3):
        gradients = drawn(expected, step)
        expected = theirs.apply_gradients(gradients, expected)
        before = tree_flatten(ours.state, destination={})
        was = {path: a + 0 for path, a in before.items()}
        mx.eval(was)
        ours.update(model, gradients)
        assert all(mx.array_equal(array, was[path]) for path, array in before.items())
    assert all(mx.array_equal(array, copy[path]) for path, array in held.items())
    for path, array in tree_flatten(model.trainable_parameters()):
        assert mx.array_equal(array, expected[path].astype(dtype)), path
        assert array.shape == expected[path].shape
    state = dict(tree_flatten(ours.state))
    assert state["step"].item() == 3
    for path, array in tree_flatten(theirs.state):
        assert mx.array_equal(state[path], array), path


@pytest.mark.parametrize(
    ("settings", "cpu", "gpu"),
    [
        # A group at work, and a copy of the array.
        ({}, (16 + 12) * GROUP + 4 * 2**18, (28 + 12) * GROUP + 4 * 2**18),
        ({"moments": "int8"}, *[(28 + 2 * 27 + 12) * GROUP // 2 + 4 * 2**18] * 2),
        ({"optimizer": "lion", "moments": "int8"}, *[(28 + 27 + 12) * GROUP // 2 + 4 * 2**18] * 2),
        ({"optimizer": "adafactor"}, 16 * 2**18, 28 * 2**18),  # which moves arrays whole
        ({"optimizer": "muon"}, 80 * 2**18, 80 * 2**18),
        ({"optimizer": "muon", "moments": "int8"}, (80 + 27) * 2**18, (80 + 27) * 2**18),
    ],
)
def test_a_large_array_takes_what_a_group_takes(settings: dict, cpu: int, gpu: int) -> None:
    parameters, cfg = {"weight": mx.zeros((2**10, 2**8))}, OptimConfig(steps=1, **settings)
    assert [bytes_of_a_group(cfg, parameters, where) for where in (False, True)] == [cpu, gpu]


def test_parts_are_whole_blocks_and_all_of_an_array() -> None:
    for numbers, most in [(2**23 + 5, 2**22), (2077, 600), (257, 256), (10_000, 999)]:
        parts = parts_of(numbers, most)
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == numbers
        assert all(part.start % 256 == 0 and 0 < part.stop - part.start < most + 256 for part in parts)


@pytest.mark.parametrize("micro_batches", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_an_update_of_whole_weights_takes_at_most_eighteen_bytes_a_parameter(micro_batches: int) -> None:
    others = resting()
    policy = whole()
    cfg = recipe(
        rollout={"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 4},
        optim={"micro_batch_tokens": 999 if micro_batches == 1 else 8},
    )
    rows = [[row(4, 4, number) for _ in range(2)] for number in range(2)]
    groups = [Group(pair[0][0], tuple(rollout for _, rollout in pair)) for pair in rows]
    update, minibatches = updater(policy, cfg), make_minibatches(groups, cfg)
    assert len(minibatches[0]) == micro_batches
    update(minibatches, 1)
    resting()
    update(minibatches, 2)  # weights 4, gradient 4, moments 8
    assert (mx.get_peak_memory() - others) / numbers(policy.model) < 18


@pytest.mark.parametrize(
    ("dtype", "optim", "bytes_each"),
    [
        (mx.float32, {}, 16),  # weights 4, gradient 4, moments 8
        pytest.param(mx.float32, {"num_iterations": 2, "num_minibatches": 2}, 16, marks=pytest.mark.slow),
        pytest.param(mx.float32, {"optimizer": "lion"}, 12, marks=pytest.mark.slow),
        # moments 2, and their scales
        pytest.param(mx.float32, {"moments": "int8"}, 10.03, marks=pytest.mark.slow),
        # weights 2, their float32 copies 4, gradient 4, moments 8; a CPU multiplies bfloat16 slowly
        pytest.param(mx.bfloat16, {}, 18, marks=pytest.mark.slow),
        pytest.param(mx.bfloat16, {"moments": "int8"}, 12.03, marks=pytest.mark.slow),
    ],
)
def test_a_run_of_whole_weights_holds_them_once(tmp_path, dtype: mx.Dtype, optim: dict, bytes_each: int) -> None:
    """Over whole steps as the loop makes them: decoding, updates and a checkpoint, and as the plan says."""
    others = resting()
    policy = whole()
    policy.model.update(tree_map(lambda a: a.astype(dtype), policy.model.parameters()))
    cfg = recipe(
        adapter={"type": "full"},
        rollout={"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 4},
        optim={"micro_batch_tokens": 999, "gradient_checkpointing": False, "steps": 3, **optim},
        checkpoint={"every": 1},
        log={"kl": None, "completions": None},
    )
    engine = RolloutEngine(Generator(policy.model, NoTokenizer(), 2), sampling_of(cfg.rollout))
    scorer = Scorer({"turns": lambda completions, **_: [float(i % 2) for i in range(len(completions))]})
    trainer = Trainer(cfg, policy, OnePrompt(), engine, scorer)
    plan, _ = make_plan(workload(cfg, 3), policy, engine.generator.decoding)
    peaks = []

    def tell(_) -> None:
        peaks.append(mx.get_peak_memory() - others)
        resting()

    context, start = Context("", {}, {}, {}, {}), RunState("id", trainer.state())
    loop = Loop(trainer, tmp_path / "run", context, tell, StopRequest(), start)
    del start
    assert (loop.run().state.step, len(peaks)) == (3, 3)
    peak, count = max(peaks[1:]), numbers(policy.model)
    # A group at work, or a few activations, are there beside; what was before a step is not.
    assert bytes_each < peak / count < bytes_each + 1
    # The optimizer's step is the peak; of the update the plan reckons a little more.
    assert peak == pytest.approx(sum(plan.stays.values()) + plan.phases["optimizer's step"], rel=0.03)
    assert peak == pytest.approx(plan.total, rel=0.1)


def test_decoding_does_not_keep_the_weights_of_before_an_update() -> None:
    others = resting()  # of tests before this
    policy = whole()
    cfg = recipe(
        adapter={"type": "full"},
        rollout={"prompts_per_step": 1, "num_generations": 8, "max_completion_length": 4},
        optim={"micro_batch_tokens": 999, "steps": 2, "optimizer": "adafactor", "learning_rate": 0.01},
    )
    engine = RolloutEngine(Generator(policy.model, NoTokenizer(), 2), sampling_of(cfg.rollout))
    assert "joined layers" in engine.generator.decoding.description
    scorer = Scorer({"even": lambda completion_ids, **_: [sum(i % 2 == 0 for i in ids) for ids in completion_ids]})
    trainer = Trainer(cfg, policy, OnePrompt(), engine, scorer)
    before = policy.model.layers[0].self_attn.q_proj.weight + 0
    trainer.step(1)
    assert not mx.array_equal(before, policy.model.layers[0].self_attn.q_proj.weight)
    assert (resting() - others) / numbers(policy.model) < 4.3  # the weights, once
    trainer.step(2)
    assert (mx.get_peak_memory() - others) / numbers(policy.model) < 10  # weights, gradient, and what is at work
