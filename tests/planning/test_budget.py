"""A run's own limit of memory: everything is fitted into it, or refused with what would fit."""

from __future__ import annotations

import gc
import re
from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import make_model
from planning.loads import workload
from training.sections import make_minibatches, updater
from training.test_packing import row
from training.test_update import recipe

from grpo.backend import lanes
from grpo.backend.device import memory_bytes
from grpo.config import AdapterConfig, LossConfig
from grpo.errors import TooLargeError, UserError
from grpo.generation.choice import find_decoding
from grpo.model.adapters import Adapters
from grpo.model.logprobs import LOGITS
from grpo.model.policy import Policy
from grpo.planning import choosing, drafting
from grpo.planning.choosing import Checkpointing, Choice
from grpo.planning.footprint import Footprint, extent, measure_body, measure_footprint, probes
from grpo.planning.lengths import LONGEST, FittingLengths, longest
from grpo.planning.machines import OF_A_LIMIT, Machine
from grpo.planning.planner import Planner
from grpo.planning.rehearsal import is_cheap, rehearsed
from grpo.recipes import with_settings
from grpo.training.lanes import lanes_worth
from grpo.training.packing import Shape
from grpo.types import Group

PROMPT, LENGTH = 24, 100
MB = 2**20


def policy_of(depth: int = 4, rank: int = 8, **changes) -> Policy:
    model = make_model("tied", num_hidden_layers=depth, **{"hidden_size": 64, "intermediate_size": 192} | changes)
    return Policy(model, Adapters(model, AdapterConfig(rank=rank), mx.random.key(0)), 1.0)


def planner(limit: float | None, policy: Policy | None = None, **optim) -> Planner:
    policy = policy or policy_of()
    rollout = {"prompts_per_step": 4, "num_generations": 4, "max_completion_length": LENGTH}
    cfg = recipe(rollout=rollout, optim={"micro_batch_tokens": "auto", **optim})
    return Planner(workload(cfg, PROMPT), policy, find_decoding(policy.model), limit, cfg.loss)


@pytest.fixture
def one_lane(monkeypatch) -> None:
    """Two lanes are at their peaks together or not, as it happens; they are planned as if they were."""
    monkeypatch.setattr(lanes, "cpu_cores", lambda: 1)


def test_less_memory_means_smaller_micro_batches_and_checkpoints_and_then_a_refusal(one_lane) -> None:
    ample, _ = planner(None).plan()
    assert not ample.checkpointing
    assert not ample.limited
    sizes = []
    for share in (0.7, 0.4):
        limit = share * ample.total
        plan, optim = planner(limit / 2**30).plan()
        assert plan.total <= limit
        assert plan.limited
        assert optim.gradient_checkpointing is plan.checkpointing
        sizes.append((plan.micro_batch, plan.recomputed))
    assert sizes[0] != sizes[1]
    with pytest.raises(TooLargeError) as refused:
        planner(0.02 * ample.total / 2**30).plan()
    said = re.search(
        r"needs \d+ [kM]B, and memory\.limit_gb allows \d+ [kM]B\. .* a higher memory\.limit_gb\.", str(refused.value)
    )
    assert said
    assert refused.value.needed > 0.02 * ample.total


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_a_step_stays_within_the_limit(one_lane, share: float) -> None:
    policy = policy_of()
    ample, _ = planner(None, policy).plan()
    limit = share * ample.total
    asked = planner(limit / 2**30, policy)
    plan, optim = asked.plan()
    cfg = with_settings(
        recipe(rollout={"prompts_per_step": 4, "num_generations": 4, "max_completion_length": LENGTH}), {"optim": optim}
    )
    groups = []
    for number in range(4):
        rows = [row(PROMPT, LENGTH, number) for _ in range(4)]
        groups.append(Group(rows[0][0], tuple(rollout for _, rollout in rows)))
    update = updater(policy, cfg)
    minibatches = make_minibatches(groups, cfg, lanes_worth(policy.model, cfg.loss))
    mx.eval(update.optimizer.state)
    gc.collect()
    resting = mx.get_active_memory()
    mx.reset_peak_memory()
    update(minibatches, 1)
    peak = mx.get_peak_memory() - resting
    assert plan.phases["update"] == pytest.approx(peak, rel=0.15)  # of some MB, one array more or less
    assert peak + sum(plan.stays.values()) <= 1.02 * limit


@pytest.mark.parametrize("tries", [True, False])
def test_where_memory_is_short_fewer_logits_are_there_at_once(one_lane, monkeypatch, tries: bool) -> None:
    if not tries:  # as with rows that are too long to be tried
        monkeypatch.setattr(Planner, "_tried", lambda *_: None)
    most, few = 2**20, 2**16
    monkeypatch.setitem(LOGITS, False, most)
    monkeypatch.setattr(drafting, "FEW_LOGITS", few)

    def wide() -> Policy:
        return policy_of(vocab_size=2_000)

    ample = planner(1, wide())
    assert ample.plan()[0].logits == ample.policy.logits == most
    with pytest.raises(TooLargeError) as refused:
        planner(0.001, wide()).plan()
    short = planner(refused.value.needed * 1.1 / 2**30, wide())
    assert short.plan()[0].logits == short.policy.logits == few


def test_a_limit_beyond_the_machine_is_refused() -> None:
    more = memory_bytes() / 2**30 + 1
    with pytest.raises(UserError, match=r"memory\.limit_gb: \d+\.?\d* GB is more than the machine has"):
        planner(more)


@pytest.mark.parametrize("most", [1, 7, 8, 100])
@pytest.mark.parametrize("fitting", [0, 1, 2, 6, 7, 8, 63, 64, 65, 1000])
def test_the_longest_is_found(fitting: int, most: int) -> None:
    tried: list[int] = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= fitting

    assert longest(fits, most) == min(fitting, most)
    assert max(tried) <= most
    assert len(tried) <= 2 * most.bit_length()


def test_the_longest_completion_is_the_longest_that_is_planned(one_lane) -> None:
    total = 1.2 * planner(None, micro_batch_tokens=256, gradient_checkpointing=True).plan()[0].total
    asked = planner(total / 2**30)
    length = asked.longest()
    assert 1 < length < 512 - PROMPT  # the model's positions

    def of(length: int) -> Planner:
        load = replace(asked.load, rollout=asked.load.rollout.model_copy(update={"max_completion_length": length}))
        other = planner(total / 2**30, asked.policy)
        other.load, other._footprint = load, asked._footprint
        other._tried = lambda *_: None  # lengths that nobody has tried are reckoned
        return other

    of(length).plan()
    with pytest.raises(TooLargeError, match=rf"Completions of up to about {length:,} tokens would fit"):
        of(length + 1).plan()


def test_the_report_says_what_takes_memory_and_what_bounds_the_length(one_lane) -> None:
    free = planner(None)
    lines = free.report(free.plan()[0])
    what = ["weights", "optimizer", "other states", "rollout", "update", "optimizer's step", "peak"]
    assert [line.split("  ")[0] for line in lines[:-1]] == what
    most = "488 tokens; the model has no more positions"  # of 512
    assert lines[-1] == f"longest completion that would fit: {most}"
    assert "the machine" in lines[-2]
    total = 1.2 * planner(None, micro_batch_tokens=256, gradient_checkpointing=True).plan()[0].total
    tight = planner(total / 2**30)
    lines = tight.report(tight.plan()[0])
    assert "memory.limit_gb" in lines[-2]
    found = re.fullmatch(r"longest completion that would fit: about ([\d,]+) tokens; for longer: (.*)", lines[-1])
    assert found
    assert int(found[1].replace(",", "")) == tight.longest()
    assert found[2] == "a smaller or quantized model (model.quantize); a higher memory.limit_gb"


def test_the_positions_bound_the_length_where_a_longer_completion_would_not_fit_either(one_lane) -> None:
    """All positions are used, and an eighth more would be too much for memory as well."""
    free = planner(None)
    plan = free.plan()[0]
    lengths = FittingLengths(free.load, lambda load: replace(plan, memory=plan.total - (_length(load) > 100)), 0)
    lengths = replace(lengths, positions=free.load.longest + 100)
    assert lengths.report(plan)[-1].endswith(": 100 tokens; the model has no more positions")


def _length(load) -> int:
    return load.rollout.max_completion_length


def test_what_is_said_of_lengths_does_not_contradict_the_plan(one_lane, monkeypatch) -> None:
    """What was tried and what is reckoned differ: the length of the recipe fits, or not, as it was tried."""
    total = 1.2 * planner(None, micro_batch_tokens=256, gradient_checkpointing=True).plan()[0].total
    refused = planner(total / 2**30)
    assert refused.longest() > LENGTH
    refused._tried = lambda *_: int(1.1 * total)
    with pytest.raises(TooLargeError, match=rf"Completions of up to about {LENGTH - 1} tokens would fit"):
        refused.plan()
    tight = planner(total / 2**30)
    plan, _ = tight.plan()
    monkeypatch.setattr(FittingLengths, "longest", lambda _: LENGTH // 2)
    assert tight.report(plan)[-1].startswith(f"longest completion that would fit: {LENGTH} tokens; ")


def choice(room: int, asked: bool | int | str = "auto", limited: bool = True) -> Choice:
    cfg = recipe(
        rollout={"prompts_per_step": 16, "num_generations": 8, "max_completion_length": 128},
        optim={"micro_batch_tokens": "auto", "gradient_checkpointing": asked, "pack_completions": False},
    )

    def footprint(checkpointing: bool) -> Footprint:
        return Footprint(0, 1_000 if checkpointing else 9_000, 0.0, 0, 1, True, checkpointing)

    return Choice(Machine(2**33, True, True, limited), workload(cfg, 128), room, 8, footprint)


@pytest.mark.parametrize(("spare", "layers"), [(1_000, True), (2_000, 7), (4_999, 5), (5_000, 4), (8_000, 1)])
def test_as_few_layers_are_checkpointed_as_fit(spare: int, layers: Checkpointing) -> None:
    """By hand: a token takes 9,000 bytes without checkpoints, and 1,000 less for each of the eight layers.

    A micro-batch of 16,384 tokens has room for 64 of the rows and their 8 prompts: 9,216 tokens.
    """
    tokens = 8 * 128 + 64 * 128
    found = choice(spare * tokens).make()
    if layers is True:
        assert found.checkpointing is True
    else:
        assert found.checkpointing == layers
        assert found.bytes <= spare * tokens


def test_the_sum_of_gradients_leaves_micro_batches_as_large_as_they_would_be() -> None:
    """The gradient of whole weights takes more than a micro-batch may: smaller ones would not make it smaller."""
    gradient = 2 * choosing.MOST_ON_CUDA

    def footprint(checkpointing: bool) -> Footprint:
        return Footprint(gradient, 1_000 if checkpointing else 9_000, 0.0, 0, 1, True, checkpointing)

    plain = choice(2**40, limited=False)
    plain = replace(plain, machine=replace(plain.machine, memory=2**40))
    whole = replace(plain, footprint=footprint, gradient=gradient)
    assert whole.make().tokens == plain.make().tokens == max(choosing.AUTO_TOKENS)
    assert whole.make().bytes == gradient + plain.make().bytes


def test_without_a_limit_all_layers_are_checkpointed_or_none() -> None:
    assert choice(2_000 * 9_216, limited=False).make().checkpointing is True


def test_a_number_of_layers_is_taken_as_it_is() -> None:
    found = choice(2**40, asked=3).make()
    assert found.checkpointing == 3
    assert found.bytes == 6_000 * found.shape.tokens


def test_a_way_that_took_more_than_reckoned_is_left_for_one_that_did_not() -> None:
    tried = []

    def seen(way: Checkpointing, shape: Shape) -> int:
        tried.append(way)
        return 2**40 if len(tried) < 3 else 1_000

    found = replace(choice(2_000 * 9_216), tried=seen).make()
    assert tried[:2] == [7, True]
    assert (found.bytes, found.checkpointing) == (1_000, tried[-1])


def test_a_limit_is_planned_with_almost_whole_and_a_machine_with_room_for_others() -> None:
    assert Machine(1_000, False, False, True).usable == int(1_000 * OF_A_LIMIT)
    assert Machine(1_000, False, False).usable == 900


@pytest.mark.parametrize("way", [False, True, 2])
def test_the_rehearsal_is_the_update(one_lane, way: Checkpointing) -> None:
    policy = policy_of()
    shape = Shape(2, PROMPT, 8, LENGTH)
    (body,) = measure_body(policy, way, [shape])
    assert rehearsed(policy, LossConfig(), way, shape, 2) == pytest.approx(body, rel=0.3)  # the vocabulary is tiny
    assert policy.gradient_checkpointing is False


def test_checkpointing_more_layers_takes_less() -> None:
    policy, shape = policy_of(6), Shape(2, PROMPT, 8, LENGTH)
    found = [rehearsed(policy, LossConfig(), way, shape, 2) for way in (False, 2, 4, True)]
    assert found[0] > 1.1 * found[1] > 1.2 * found[2]
    assert found[3] < 1.15 * found[2]
    assert found[3] < 0.5 * found[0]


def test_only_what_is_cheap_is_rehearsed() -> None:
    model = policy_of().model
    assert is_cheap(model, Shape(1, PROMPT, 4, LENGTH), True)
    assert not is_cheap(model, Shape(1, PROMPT, 1, 100_000), True)
    assert LONGEST > 100_000


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_line_holds_for_rows_longer_than_what_was_measured(checkpointing: bool) -> None:
    """Twelve layers, whose adapter's gradient is as large as a short row's activations."""
    policy = policy_of(12, hidden_size=32, intermediate_size=64)
    footprint = measure_footprint(policy, checkpointing)
    shape = Shape(1, 32, 1, 768)
    (seen,) = measure_body(policy, checkpointing, [shape])
    tokens, pairs = extent(shape, policy.share_prompts, checkpointing)
    # Attention goes another way for long rows than for those that were tried: the line says less or more of them.
    assert 0.7 * seen < footprint.token * tokens + footprint.pair * pairs < 1.5 * seen


def test_a_larger_adapter_does_not_take_less() -> None:
    """The peak comes before most of the adapter's gradient exists: taking the gradient off would be wrong."""
    shape = Shape(1, 16, 2, 16)
    small, large = (
        measure_body(policy_of(12, rank=rank, hidden_size=32, intermediate_size=64), True, [shape])[0]
        for rank in (2, 64)
    )
    assert large > small


def test_the_probes_differ_in_pairs_and_not_in_tokens() -> None:
    """A constant would look like pairs, and pairs grow with the square of the length."""
    (tokens, pairs), (more_tokens, more_pairs) = (extent(shape, True, True) for shape in probes(32))
    assert tokens <= more_tokens < 2 * tokens
    assert more_pairs > 8 * pairs
