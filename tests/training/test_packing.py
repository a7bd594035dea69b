"""Micro-batches by tokens: few shapes, all rows, little padding."""

import random
import shutil

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from training.sections import make_batches, updater
from training.test_update import real_rows

from grpo.backend import device
from grpo.config import Recipe
from grpo.recipes import with_settings
from grpo.training import packing
from grpo.training.batches import by_row
from grpo.training.gradients import Gradients
from grpo.training.packing import Packing, Shape, pack
from grpo.types import Group, Rollout, Task, Trajectory


def row(prompt: int, length: int, name: int = 0):
    task = Task(name, "?", (name, *range(prompt - 1)), {})
    return task, Rollout(Trajectory.sampled((5,) * length, (0.0,) * length, "", "stop"), advantage=1.0)


def ragged(draw: random.Random, groups: int = 4, n: int = 4, longest: int = 60) -> list[Group]:
    made = []
    for number in range(groups):
        prompt = draw.randrange(1, 50)
        rows = [row(prompt, draw.randrange(1, longest + 1), number) for _ in range(n)]
        made.append(Group(rows[0][0], tuple(rollout for _, rollout in rows)))
    return made


def test_exact_shapes_by_hand() -> None:
    rows = [row(10, 4, 1), row(10, 2, 1), row(3, 2, 2), row(3, 30, 2)]
    packed = pack(rows, Packing(tokens=40, rows=4, group=2))
    # 3 + 30 tokens, and 2 × 10 + 3 × 4.
    assert [(sorted(part), shape) for part, shape in packed] == [
        ([3], Shape(1, 3, 1, 30)),
        ([0, 1, 2], Shape(2, 10, 3, 4)),
    ]


def test_prompts_that_are_not_shared_count_for_each_row() -> None:
    rows = [row(10, 4, 1), row(10, 4, 1), row(10, 4, 1)]
    shared = pack(rows, Packing(tokens=28, rows=3, group=3))
    apart = pack(rows, Packing(tokens=28, rows=3, group=3, shares=False))
    assert [shape for _, shape in shared] == [Shape(1, 10, 3, 4)]  # 10 + 3 × 4
    assert [shape for _, shape in apart] == [Shape(1, 10, 2, 4), Shape(1, 10, 1, 4)]  # 2 × 14, and 14
    padded = Packing(tokens=256, rows=8, group=4, multiple=16, shares=False)
    assert padded.shape(1, 4, 40, 16) == Shape(1, 48, 4, 16)  # 256 / (48 + 16) rows
    assert padded.shape(2, 5, 40, 16) is None


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("group", [1, 6, 8])
def test_shapes_hold_no_more_tokens_than_they_may(group: int, shares: bool) -> None:
    """On a GPU too, where rows fill up to a power of two, and that may be less than a group."""
    for tokens in (256, 1024):
        rule = Packing(tokens, rows=48, group=group, multiple=16, shares=shares)
        for prompt, length in [(16, 16), (100, 10), (500, 10), (30, 200), (2000, 2000)]:
            shape = rule.shape(1, 1, prompt, length)
            assert shape.rows == 1 or rule.through(shape) <= tokens
            twice = shape._replace(rows=2 * shape.rows, prompts=-(-2 * shape.rows // group))
            assert rule.through(twice) > tokens or shape.rows >= 48  # nor less


def test_a_row_that_is_too_long_goes_alone() -> None:
    ((part, shape),) = pack([row(50, 60)], Packing(tokens=10, rows=1, group=1))
    assert (part, shape) == ([0], Shape(1, 50, 1, 60))


def test_what_a_forward_pass_finds_comes_in_the_order_of_the_rows() -> None:
    rows = [row(5, length, name) for name, length in enumerate([3, 9, 1, 7])]
    found = by_row(rows, Packing(tokens=30, rows=4, group=2), lambda batch: batch.trained.sum(axis=1))
    assert found == [3, 9, 1, 7]
    for rule in (Packing(tokens=99, rows=4, group=2), Packing(64, 4, 2, 8, packs=True)):  # longest first
        found = by_row(rows, rule, lambda batch: batch.trained)
        assert [sum(values) for values in found] == [3, 9, 1, 7]


@pytest.mark.parametrize("multiple", [1, 16])
def test_every_row_is_in_one_micro_batch_that_holds_it(multiple: int) -> None:
    draw = random.Random(0)
    for _ in range(50):
        rows = [(group.task, rollout) for group in ragged(draw) for rollout in group.rollouts]
        packed = pack(rows, Packing(tokens=256, rows=16, group=4, multiple=multiple))
        assert sorted(i for part, _ in packed for i in part) == list(range(len(rows)))
        for part, shape in packed:
            prompts = {rows[i][0].prompt_ids for i in part}
            assert len(part) <= shape.rows
            assert len(prompts) <= shape.prompts
            assert max(map(len, prompts)) <= shape.prompt_length
            assert max(len(rows[i][1].trajectory.token_ids) for i in part) <= shape.length
            assert shape.tokens <= 256 or shape.rows == 1


def test_groups_stay_together_where_that_saves_tokens() -> None:
    rows = [row(100, length, name) for name in range(2) for length in (10, 12)]
    packed = pack(rows, Packing(tokens=130, rows=4, group=2))
    assert sorted(sorted(part) for part, _ in packed) == [[0, 1], [2, 3]]


def step_recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "m"},
            "data": {"source": "d"},
            "rewards": [{"use": "r"}],
            "optim": {"steps": 10, "micro_batch_tokens": 256},
            "rollout": {"max_completion_length": 64, "prompts_per_step": 4, "num_generations": 4},
        },
        strict=False,
    )


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(packing, "on_gpu", lambda: True)
    monkeypatch.setattr(packing, "GPU_MULTIPLE", 16)


def shapes_of(batches) -> set[tuple]:
    return {tuple(array.shape for array in batch.arrays().values()) for batch in batches}


def test_two_hundred_ragged_steps_have_few_shapes(as_on_a_gpu) -> None:
    """A compiled function keeps one trace for each. Lengths up to 50 and 60 are padded to 16, 32, 48 or 64."""
    draw, seen = random.Random(0), set()
    for _ in range(200):
        seen |= shapes_of(make_batches(ragged(draw), step_recipe()))
    assert 1 < len(seen) <= 4 * 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="mx.compile on a CPU calls a C++ compiler")
def test_two_hundred_compiled_steps_keep_few_traces_and_no_memory(as_on_a_gpu, make_policy, monkeypatch) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    mx.enable_compile()
    traces, seen, draw, resting = [], set(), random.Random(0), []
    try:
        policy, cfg = make_policy().policy, step_recipe()
        loss = Gradients._loss
        monkeypatch.setattr(Gradients, "_loss", lambda self, *given: traces.append(1) or loss(self, *given))
        update = updater(policy, cfg)
        update.gradients.alone = policy.packs  # which is tried before; lanes, which a CPU has, compile nothing
        for step in range(200):
            batches = make_batches(ragged(draw, longest=30), cfg)
            seen |= shapes_of(batches)
            update([batches], step + 1)
            mx.clear_cache()
            resting.append(mx.get_active_memory())
        mx.eval(policy.model.parameters())
    finally:
        mx.disable_compile()
    assert len(traces) == len(seen)
    assert max(resting[150:]) <= max(resting[:50]) + 2**20


def test_memory_does_not_grow_over_ragged_steps(make_policy) -> None:
    policy, cfg, draw, resting = make_policy().policy, step_recipe(), random.Random(0), []
    update = updater(policy, cfg)
    for step in range(12):
        update([make_batches(ragged(draw), cfg)], step + 1)
        resting.append(mx.get_active_memory())
    assert max(resting[6:]) <= max(resting[:6]) + 2**16
    assert tree_flatten(policy.model.trainable_parameters())


def test_there_are_micro_batches_for_every_process(make_policy) -> None:
    groups, cfg = ragged(random.Random(0)), step_recipe()
    cfg = with_settings(cfg, {"optim.micro_batch_tokens": 10**6})
    (whole,), parted = make_batches(groups, cfg), make_batches(groups, cfg, parts=4)
    assert len(parted) == 4
    assert sum(map(real_rows, parted)) == real_rows(whole) == 16


@pytest.mark.parametrize(
    ("longest", "padded"),
    [(128, 128), (640, 768), (6_145, 8_192), (8_192, 8_192), (8_193, 9_216), (16_384, 16_384), (16_385, 18_432),
     (40_000, 40_960), (65_537, 73_728)],
)  # fmt: skip
def test_lengths_come_in_halves_of_a_power_of_two_and_long_ones_in_eighths(longest: int, padded: int) -> None:
    """A row that is a third longer than its tokens wastes memory that decides whether it can train."""
    packing = Packing(tokens=2**17, rows=1, group=1, multiple=128)
    assert packing.shape(1, 1, 128, longest) == Shape(1, 128, 1, padded)
    if longest > 8_192:
        assert packing.width(longest) == padded
