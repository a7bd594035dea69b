"""Completions behind one another in a step: the same gradient, metrics and measurements as one by one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import pytest
from training.holes import made as with_holes
from training.sections import gauges, make_minibatches, updater, with_anchor, with_reference, with_top_entropy
from training.test_turn_advantages import with_turns
from training.test_update import difference, groups, recipe

from grpo.config import Recipe
from grpo.model.lines import LineKeys, laid_out
from grpo.objective.groups import with_advantages, with_rewards
from grpo.planning.parity import _forced
from grpo.training import packing
from grpo.training.batches import useful_tokens
from grpo.training.binning import SHORTEST, filled, portions
from grpo.training.gradients import Gradient
from grpo.training.packing import GPU_MULTIPLE, WIDE, Packing, pack
from grpo.types import Group, Rollout, Task, Trajectory


@pytest.fixture
def in_lines(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it packs as on a GPU, in lines of 8 places or more, from then on."""

    def as_on_a_gpu() -> None:
        monkeypatch.setattr(packing, "on_gpu", lambda: True)
        monkeypatch.setattr(packing, "GPU_MULTIPLE", 8)

    return as_on_a_gpu


def scored(made: Sequence[Group], cfg: Recipe) -> list[Group]:
    """With advantages that are the rewards less their mean, unless turns have theirs."""
    if any(rollout.turn_advantages for group in made for rollout in group.rollouts):
        return list(made)
    weights = {"r": 1.0}
    return with_advantages(with_rewards(made, weights), weights, cfg.advantage, cfg.loss.preset)


def gradient(policy, cfg: Recipe, made: Sequence[Group], lines: bool) -> Gradient:
    """Of the last of the step's minibatches, with every column that the loss may read."""
    minibatches = make_minibatches(scored(made, cfg), cfg)
    if cfg.loss.top_entropy_quantile < 1:
        minibatches = with_top_entropy(minibatches, policy, cfg)
    batches = with_anchor([[], with_reference(minibatches[-1], policy, cfg)], policy, cfg)[-1]
    assert all((batch.lines is not None) == lines for batch in batches)
    return updater(policy, cfg).gradient(batches)


LOSSES = [
    {"type": "grpo", "beta": 0.2},
    {"type": "dapo", "entropy_coef": 0.1},
    {"type": "dr_grpo", "kl_estimator": "k1", "beta": 0.1},
    {"type": "gspo"},
    {"type": "gspo_token"},
    {"type": "cispo", "importance_sampling_correction": "sequence_truncate"},
    {"type": "dapo", "importance_sampling_correction": "token_mask", "off_policy_mask_threshold": 1e-3},
    {"type": "vespo"},
    {"type": "dppo"},
    {"type": "sapo"},
    {"type": "dapo", "top_entropy_quantile": 0.4},
]
MADE = {"plain": groups, "holes": with_holes, "turns": lambda policy: with_turns(with_holes(policy))}


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("loss", "made"),
    [*((loss, "holes") for loss in LOSSES), *((loss, made) for loss in LOSSES[::3] for made in ("plain", "turns"))],
    ids=lambda one: one if isinstance(one, str) else "-".join(map(str, one.values())),
)
def test_the_gradient_and_the_metrics_are_those_of_one_by_one(make_policy, in_lines, loss: dict, made: str) -> None:
    policy = make_policy().policy
    cfg = recipe(loss=loss, optim={"micro_batch_tokens": 32}, advantage={"scale_rewards": "none"})
    rows = MADE[made](policy)
    expected = gradient(policy, cfg, rows, lines=False)
    in_lines()
    found = gradient(policy, cfg, rows, lines=True)
    assert max(mx.abs(found.arrays[path] - array).max().item() for path, array in expected.arrays.items()) < 2e-6
    assert found.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("tokens", "checkpointing"), [(8, False), (999, False), (24, True), (999, True)])
def test_nor_does_it_depend_on_how_many_lines_go_at_once(
    make_policy, in_lines, tokens: int, checkpointing: bool
) -> None:
    policy, cfg = make_policy().policy, recipe(optim={"micro_batch_tokens": tokens})
    expected = gradient(policy, cfg, groups(policy), lines=False).arrays
    in_lines()
    policy.gradient_checkpointing = checkpointing
    assert difference(expected, gradient(policy, cfg, groups(policy), lines=True).arrays) < 1e-6


@pytest.mark.parametrize(
    ("tokens", "checkpointing", "wide"), [(8, False, 1), (24, True, 1), (999, True, 1), (8, True, 7), (24, False, 9)]
)
def test_long_rows_have_lines_of_their_own(
    make_policy, in_lines, monkeypatch: pytest.MonkeyPatch, tokens: int, checkpointing: bool, wide: int
) -> None:
    """Without a mask, and beside lines of several rows: the gradient is that of one by one."""
    policy, cfg = make_policy().policy, recipe(optim={"micro_batch_tokens": tokens}, loss={"entropy_coef": 0.1})
    expected = gradient(policy, cfg, with_holes(policy), lines=False).arrays
    in_lines()
    monkeypatch.setattr(packing, "WIDE", wide)
    monkeypatch.setattr(packing, "WIDEST", 0)  # several rows never share one
    monkeypatch.setattr(packing, "EACH", 0)  # nor are they few micro-batches for the sake of launches
    assert policy.packs
    masks, plain = list[int](), LineKeys._sees
    monkeypatch.setattr(LineKeys, "_sees", lambda *given: masks.append(1) or plain(*given))
    policy.gradient_checkpointing = checkpointing
    batches = make_minibatches(scored(with_holes(policy), cfg), cfg)[-1]
    apart = [batch for batch in batches if batch.lines is not None]
    assert apart, "some are longer than that"
    assert all(len(batch.lines) == 3 for batch in apart)
    assert difference(expected, updater(policy, cfg).gradient(batches).arrays) < 1e-6
    assert not masks


def test_what_passes_measure_is_the_same(make_policy, in_lines) -> None:
    policy = make_policy().policy
    cfg = recipe(loss={"beta": 0.1, "kl_in": "reward"}, optim={"micro_batch_tokens": 32})
    made = [
        replace(group, rollouts=tuple(replace(r, advantage=0.0) for r in group.rollouts))
        for group in with_holes(policy)
    ]
    filtered = [  # a sampler's own distribution: entropies need a forward pass
        replace(g, rollouts=tuple(replace(r, trajectory=_with_sampler(r.trajectory)) for r in g.rollouts)) for g in made
    ]
    before = gauges(policy, cfg)
    expected = before.divergences(made), before.entropy_left_out(filtered), _forced(policy, made, before.packing)
    in_lines()
    after = gauges(policy, cfg)
    assert after.packing.packs
    assert after.divergences(made) == pytest.approx(expected[0], rel=1e-4)
    left = after.entropy_left_out(filtered)
    assert (left.tokens, left.total) == (expected[1].tokens, pytest.approx(expected[1].total, rel=1e-5))
    assert _forced(policy, made, after.packing) == pytest.approx(expected[2], abs=1e-5)


def _with_sampler(trajectory: Trajectory) -> Trajectory:
    return replace(trajectory, columns={**trajectory.columns, "sampler": trajectory.columns["behaviour"]})


def drawn(kind: str, draw: random.Random, mean: int, limit: int) -> int:
    """A length as they come in real runs."""
    match kind:
        case "exponential":
            length = draw.expovariate(1 / mean)
        case "log-normal":
            length = draw.lognormvariate(math.log(mean) - 0.32, 0.8)
        case _:  # half at the limit
            length = limit if draw.random() < 0.5 else draw.uniform(5, limit)
    return min(limit, max(5, int(length)))


def a_step(
    kind: str, draw: random.Random, prompts: int, n: int, prompt: int, mean: int, limit: int
) -> list[tuple[Task, Rollout]]:
    rows = []
    for _ in range(prompts):
        length = max(20, int(draw.gauss(prompt, prompt / 6)))
        task = Task(0, "", tuple(draw.randrange(1000) for _ in range(length)), {})
        lengths = [drawn(kind, draw, mean, limit) for _ in range(n)]
        rows += [(task, Rollout(Trajectory.sampled((1,) * size, (0.0,) * size, "", "stop"))) for size in lengths]
    return rows


@pytest.mark.parametrize(
    ("kind", "sizes", "least"),
    [
        ("exponential", (8, 8, 130, 200, 512), 0.8),
        ("exponential", (8, 16, 300, 600, 2048), 0.84),
        ("exponential", (16, 16, 150, 100, 1024), 0.84),
        ("log-normal", (8, 8, 130, 200, 512), 0.8),
        ("log-normal", (32, 8, 130, 200, 512), 0.85),
        ("half", (8, 8, 130, 200, 512), 0.86),
        ("half", (8, 16, 300, 600, 2048), 0.78),
    ],
)
def test_most_of_what_goes_through_a_gpu_is_no_padding(kind: str, sizes: tuple[int, ...], least: float) -> None:
    """In 10 steps, each prompt counted once; and in no more than twice the shapes of completions one by one."""
    draw, shapes, real, through = random.Random(0), {True: set(), False: set()}, 0, 0
    for _ in range(10):
        rows = a_step(kind, draw, *sizes)
        real += sum(len(rollout.trajectory.token_ids) for _, rollout in rows)
        real += sum(map(len, {task.prompt_ids for task, _ in rows}))
        for packs in (True, False):
            rule = Packing(16_384, sizes[0] * sizes[1], sizes[1], GPU_MULTIPLE, packs=packs, wide=WIDE)
            parts = pack(rows, rule)
            assert sorted(i for part, _ in parts for i in part) == list(range(len(rows)))
            shapes[packs] |= {shape for _, shape in parts}
            through += packs * sum(rule.through(shape) for _, shape in parts)
    assert real / through > least
    assert len(shapes[True]) <= 2 * max(4, len(shapes[False]))


def test_every_row_of_a_line_has_its_prompt_there_once() -> None:
    draw = random.Random(0)
    for _ in range(50):
        rows = [((group,) * draw.randrange(1, 30), draw.randrange(1, 40)) for group in range(6) for _ in range(5)]
        rows = [((group,) * (group + 1), length) for (group, *_), length in rows]
        lines = filled(rows, 48)
        assert sorted(number for line in lines for number in line) == list(range(30))
        for line in lines:
            used = sum(rows[i][1] for i in line) + sum(len(prompt) - 1 for prompt in {rows[i][0] for i in line})
            assert used <= 48
            assert len(line) <= 48 // SHORTEST


def behind(prompt: int, *lengths: int) -> list[tuple[Task, Rollout]]:
    """Completions of these lengths behind one prompt."""
    task = Task(0, "", (5,) * prompt, {})
    return [(task, Rollout(Trajectory.sampled((1,) * size, (0.0,) * size, "", "stop"))) for size in lengths]


def test_long_rows_by_hand() -> None:
    """Rows above 4,096 places go alone, each in a line about as wide as it is, and the others as ever."""
    rows = behind(101, 20_000, 90, 5_000, 6_000, 80)
    found = pack(rows, Packing(4_096, 5, 5, GPU_MULTIPLE, packs=True, wide=WIDE))
    own = [(part, shape) for part, shape in found if shape.alone]
    assert [(part, shape.lines, shape.width) for part, shape in own] == [
        ([0], 1, 20_480),
        ([3], 1, 6_144),
        ([2], 1, 5_120),
    ]
    ((part, shape),) = [(part, shape) for part, shape in found if not shape.alone]
    assert sorted(part) == [1, 4]
    assert shape.width <= WIDE
    laid, starts = laid_out([((1, 2, 3), (4, 5)), ((1, 2, 3), (6,))], 2, 6, alone=True)
    assert laid.tolist() == [
        [[1, 2, 3, 4, 0, 0], [1, 2, 3, 0, 0, 0]],
        [[0, 0, 4, 5, 0, 0], [0, 0, 6, 0, 0, 0]],
        [[0, 0, 1, 1, 0, 0], [0, 0, 2, 0, 0, 0]],
    ]
    assert starts == [2, 8]


def test_completions_longer_than_that_are_always_alone() -> None:
    """Whatever the prompt: behind a shared prompt their mask would take as much as in a shared line."""
    for tokens in (256, 2**16):
        found = pack(behind(6_001, 4_097, 4_096, 100), Packing(tokens, 3, 3, GPU_MULTIPLE, packs=True, wide=WIDE))
        assert 0 in next(part for part, shape in found if shape.alone)
        assert all(shape.length <= WIDE for part, shape in found if not shape.alone)


def test_a_long_prompt_is_not_computed_for_each_of_its_rows() -> None:
    found = pack(behind(6_001, *[100] * 8), Packing(2**14, 8, 8, GPU_MULTIPLE, packs=True, wide=WIDE))
    assert [shape.alone for _, shape in found] == [False]


def test_portions_by_hand() -> None:
    assert portions(13, 16, each=0.5) == [8, 4, 1]  # three portions cost 14.5 lines, one of 16 costs 16.5
    assert portions(13, 16, each=4) == [16]
    assert portions(40, 16, each=0.5) == [16, 16, 8]
    assert portions(3, 1, each=9) == [1, 1, 1]
    assert portions(0, 4, each=1) == []


@pytest.mark.parametrize("seed", range(4))
def test_processes_get_micro_batches_of_the_same_shapes(seed: int) -> None:
    rows = a_step("exponential", random.Random(seed), 8, 8, 130, 200, 512)
    parts = pack(rows, Packing(16_384, 32, 8, GPU_MULTIPLE, packs=True, wide=WIDE, parts=2))
    first, second = parts[::2], parts[1::2]
    assert len(first) - len(second) in (0, 1)  # one line may be left over
    assert [shape for _, shape in first[: len(second)]] == [shape for _, shape in second]
    assert sorted(i for part, _ in parts for i in part) == list(range(64))
    assert all(len(part) <= shape.rows for part, shape in parts)
    lengths = [len(rollout.trajectory.token_ids) for _, rollout in rows]
    one, other = (sum(lengths[i] for part, _ in share for i in part) for share in (first, second))
    assert 0.6 < one / other < 1.7


@pytest.mark.parametrize("changed", [{"pack_completions": False}, {"share_prompts": False}])
def test_a_recipe_may_leave_it_out(changed: dict) -> None:
    assert Packing.of(recipe().optim, recipe().rollout, gpu=True).packs
    assert not Packing.of(recipe().optim, recipe().rollout, gpu=False).packs
    cfg = recipe(optim=changed)
    assert not Packing.of(cfg.optim, cfg.rollout, gpu=True).packs


def test_a_step_tells_how_much_of_what_goes_through_is_useful(make_policy, in_lines) -> None:
    """Prompts of 3, 9 and 5 tokens, completions of 1 to 8; of the second group no row has an advantage."""
    policy, cfg = make_policy().policy, recipe(optim={"micro_batch_tokens": 64})
    made = scored(groups(policy, uniform=True), cfg)
    learned = [made[0], made[2]]
    real = 3 + 5 + sum(len(r.trajectory.token_ids) for group in learned for r in group.rollouts)
    minibatches = make_minibatches(made, cfg)
    through = sum(batch.prompt_ids.size + batch.token_ids.size for (*batches,) in minibatches for batch in batches)
    assert useful_tokens(made, minibatches, cfg.loss, True) == {"update/useful_tokens": real / through}
    apart = sum(b.token_ids.size + len(b.token_ids) * b.prompt_ids.shape[1] for (*bs,) in minibatches for b in bs)
    assert useful_tokens(made, minibatches, cfg.loss, False) == {"update/useful_tokens": real / apart}
    in_lines()
    packed = make_minibatches(made, cfg)
    through = sum(batch.lines.shape[1] * batch.lines.shape[2] for batches in packed for batch in batches)
    assert useful_tokens(made, packed, cfg.loss, True) == {"update/useful_tokens": real / through}
    assert useful_tokens(made, [[]], cfg.loss, True) == {}
