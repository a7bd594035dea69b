"""The plan: what an update needs is near what it then takes, and what cannot fit is refused with numbers."""

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
from grpo.backend.device import on_gpu
from grpo.config import AdapterConfig
from grpo.errors import UserError
from grpo.generation.batchcaches import BatchCaches
from grpo.generation.choice import find_decoding
from grpo.model.adapters import Adapters
from grpo.model.load import cast
from grpo.model.policy import Policy
from grpo.model.widehead import widen_head
from grpo.planning import choosing, planner
from grpo.planning import plan as planning
from grpo.planning.choosing import Choice
from grpo.planning.drafting import Case, plan_on
from grpo.planning.footprint import Footprint, measure_footprint
from grpo.planning.machines import FREE, Machine
from grpo.planning.planner import make_plan
from grpo.recipes import with_settings
from grpo.training.batches import make_batches
from grpo.training.lanes import lanes_worth
from grpo.training.optimizer import MOST_AT_WORK, bytes_of_a_group
from grpo.training.packing import Packing, Shape, pack
from grpo.training.update import bytes_of_a_norm
from grpo.types import Group

PROMPT, LENGTH = 96, 160
SHORT = (12, 20)
"""Lengths whose gradient is tried in no time, where it does not matter how much that takes."""


def planned(kind: str = "tied", adapter: str = "lora", lengths: tuple[int, int] = (PROMPT, LENGTH), **optim):
    changes = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 2048, "head_dim": 32}
    model = make_model(kind, **changes)
    rank = {} if adapter == "full" else {"rank": 8}
    adapters = Adapters(model, AdapterConfig(type=adapter, **rank), mx.random.key(0))
    policy = Policy(model, adapters, 1.0, optim.get("share_prompts", True))
    cfg = recipe(
        adapter={"type": adapter, **rank},
        rollout={"prompts_per_step": 4, "num_generations": 4, "max_completion_length": lengths[1]},
        optim={"micro_batch_tokens": "auto", **optim},
    )
    plan, optim = make_plan(workload(cfg, lengths[0]), policy, find_decoding(model))
    return policy, with_settings(cfg, {"optim": optim}), plan


def peak_of_an_update(policy: Policy, cfg, prompt: int = PROMPT, updates: int = 1) -> int:
    groups = []
    for number in range(4):
        rows = [row(prompt, cfg.rollout.max_completion_length, number) for _ in range(4)]
        groups.append(Group(rows[0][0], tuple(rollout for _, rollout in rows)))
    update = updater(policy, cfg)
    minibatches = make_minibatches(groups, cfg, lanes_worth(policy.model, cfg.loss))
    update(minibatches, 1)
    gc.collect()
    mx.clear_cache()
    resting = mx.get_active_memory()
    mx.reset_peak_memory()
    for step in range(updates):
        update(minibatches, step + 2)
    return mx.get_peak_memory() - resting


@pytest.mark.quick_cases("optim3", "optim7")
@pytest.mark.parametrize(
    ("kind", "adapter", "optim"),
    [
        ("tied", "lora", {"gradient_checkpointing": False}),
        pytest.param(
            "tied", "lora", {"gradient_checkpointing": False, "micro_batch_tokens": 800}, marks=pytest.mark.slow
        ),
        pytest.param("tied", "lora", {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        ("tied", "lora", {"gradient_checkpointing": True, "lengths": (512, 64)}),
        pytest.param("untied", "lora", {"gradient_checkpointing": True, "lengths": (512, 64)}, marks=pytest.mark.slow),
        pytest.param("tied", "lora", {"gradient_checkpointing": False, "share_prompts": False}, marks=pytest.mark.slow),
        ("untied", "full", {"gradient_checkpointing": False}),
        ("moe", "lora", {"gradient_checkpointing": False}),
        pytest.param("quantised", "dora", {"gradient_checkpointing": False}, marks=pytest.mark.slow),
    ],
)
def test_the_plan_is_near_the_measured_peak(monkeypatch, kind: str, adapter: str, optim: dict) -> None:
    monkeypatch.setattr(lanes, "cpu_cores", lambda: 1)
    policy, cfg, plan = planned(kind, adapter, **optim)
    peak = peak_of_an_update(policy, cfg, optim.get("lengths", (PROMPT,))[0])
    assert plan.phases["update"] == pytest.approx(peak, rel=0.08)


def test_lanes_are_planned_as_if_all_were_at_their_peaks_at_once(monkeypatch) -> None:
    monkeypatch.setattr(lanes, "cpu_cores", lambda: 2)
    policy, cfg, plan = planned(gradient_checkpointing=True, lengths=(512, 64))
    assert plan.lanes == 2
    peak = peak_of_an_update(policy, cfg, 512, updates=3)  # lanes that take turns hold less at once than is planned
    assert 0.5 * plan.phases["update"] < peak < 1.02 * plan.phases["update"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_lines_take_is_near_the_measured_peak(checkpointing: bool) -> None:
    """Completions of four lengths behind one another, two lines at once; nothing but the shape is known before."""
    policy, cfg, _ = planned(lengths=SHORT, gradient_checkpointing=checkpointing)
    made = [row(PROMPT, length, number) for number in range(4) for length in (LENGTH, 96, 64, 32)]
    groups = [Group(made[at][0], tuple(rollout for _, rollout in made[at : at + 4])) for at in range(0, 16, 4)]
    rule = Packing(tokens=1024, rows=16, group=4, multiple=256, packs=True)
    shapes = [shape for _, shape in pack(made, rule)]
    assert [(shape.lines, shape.width) for shape in shapes] == [(4, 256), (4, 256), (2, 256)]
    batches = make_batches(groups, cfg.loss, rule, LENGTH)
    peaks = []
    for _ in range(2):
        gc.collect()
        mx.clear_cache()
        resting = mx.get_active_memory()
        mx.reset_peak_memory()
        updater(policy, cfg).gradient(batches)
        peaks.append(mx.get_peak_memory() - resting)
    footprint = measure_footprint(policy, checkpointing)
    assert max(map(footprint.bytes, shapes)) == pytest.approx(peaks[1], rel=0.3)


@pytest.mark.parametrize(("name", "arrays"), [("adamw", 2), ("lion", 1), ("adafactor", 0.3)])
def test_the_optimizers_arrays_are_counted(name: str, arrays: float) -> None:
    policy, cfg, plan = planned("untied", "lora", SHORT, optimizer=name)
    assert plan.stays["optimizer"] / (4 * plan.trained) == pytest.approx(arrays, abs=0.3)
    # What the step makes beside the state before it, and what is at work of a group of parameters.
    made = 4 * plan.trained + plan.stays["optimizer"]
    at_work, norm = at_work_of(policy, cfg)
    assert 0 < at_work < MOST_AT_WORK * plan.trained
    assert plan.phases["optimizer's step"] == max(made + at_work, 4 * plan.trained + norm)
    several = planned("untied", "lora", SHORT, optimizer=name, num_minibatches=2)[2]
    assert several.phases["optimizer's step"] == 4 * plan.trained + max(at_work, norm)


def at_work_of(policy: Policy, cfg) -> tuple[int, int]:
    """Bytes that the optimizer's step takes besides: of a group, and before that for the norm."""
    parameters = policy.model.trainable_parameters()
    return bytes_of_a_group(cfg.optim, parameters, on_gpu()), bytes_of_a_norm(parameters)


@pytest.mark.parametrize("optim", [{}, {"num_minibatches": 2}, {"num_iterations": 2}])
def test_whole_weights_are_counted_once(optim: dict) -> None:
    policy, cfg, plan = planned("untied", "full", SHORT, **optim)
    assert plan.stays["optimizer"] == pytest.approx(8 * plan.trained, rel=1e-4)
    assert plan.stays["the state before the step"] == 0
    assert plan.phases["optimizer's step"] == 4 * plan.trained + max(at_work_of(policy, cfg))


def test_what_a_step_of_several_updates_can_be_taken_back_to_is_counted() -> None:
    once, twice = (planned("untied", "lora", SHORT, num_iterations=passes)[2] for passes in (1, 2))
    weights_and_moments = 12 * twice.trained  # float32
    assert twice.stays.pop("the state before the step") == pytest.approx(weights_and_moments, rel=1e-4)
    assert once.stays.pop("the state before the step") == 0
    assert once.stays == twice.stays


def test_only_what_is_come_to_is_measured(monkeypatch) -> None:
    measured, measure = [], planner.measure_footprint
    monkeypatch.setattr(choosing, "MUCH", 10**6)  # the toy would fit by far
    monkeypatch.setattr(planner, "memory_bytes", lambda: 2**30)
    monkeypatch.setattr(planner, "measure_footprint", lambda *asked: measured.append(asked[1:]) or measure(*asked))
    assert not planned()[2].checkpointing
    assert measured == [(False, planner.allowed(None))]  # without checkpoints, within the run's memory


@pytest.mark.parametrize(
    ("cuda", "tried", "chosen"),
    [
        (False, None, (False, 1024)),  # without checkpoints as long as the machine is kept busy
        (True, None, (True, 16_384)),  # the largest there is, if only with checkpoints
        (True, 13 * 2**30, (False, 4096)),  # which took more than reckoned, so the next largest, without
    ],
)
def test_the_order_of_micro_batches_that_are_tried(cuda: bool, tried: int | None, chosen: tuple[bool, int]) -> None:
    cfg = recipe(
        rollout={"prompts_per_step": 64, "num_generations": 8, "max_completion_length": 128},
        optim={"micro_batch_tokens": "auto"},
    )
    shapes = []

    def footprint(checkpointing: bool) -> Footprint:
        return Footprint(0, 2**18 if checkpointing else 2**21, 0.0, 400, 1000, True, checkpointing)

    def seen(checkpointing: bool | int, shape: Shape) -> int:
        shapes.append((checkpointing, shape))
        return tried if checkpointing else 10 * 2**30

    machine = Machine(128 * 2**30, True, cuda)
    choice = Choice(machine, workload(cfg, 128), 2**40, 4, footprint)
    found = (replace(choice, tried=seen) if tried else choice).make()
    assert (found.checkpointing, found.tokens) == chosen
    if tried:
        columns = 512, 4096, 512, 4096
        largest = [Shape(8, 128, 64, 128), Shape(*columns, lines=4, width=4096)]
        assert shapes[:2] == [(True, largest[0]), (True, largest[1])]
        assert shapes[-2:] == [
            (False, Shape(2, 128, 16, 128)),
            (False, Shape(256, 4096, 256, 4096, lines=1, width=4096)),
        ]
        assert found.bytes == 10 * 2**30


def test_held_out_prompts_are_sampled_from_and_not_trained_on() -> None:
    policy, cfg, plan = planned(lengths=SHORT)
    longer, _ = make_plan(workload(cfg, SHORT[0], 4 * SHORT[0]), policy, find_decoding(policy.model))
    assert longer.phases["rollout"] > plan.phases["rollout"]
    assert longer.tokens == plan.tokens


def test_what_waiting_completions_keep_has_room_in_the_plan() -> None:
    model = make_model("tied")
    adapters = Adapters(model, AdapterConfig(rank=2), mx.random.key(0))
    cfg = recipe(rollout={"prompts_per_step": 4, "num_generations": 4, "max_completion_length": 5000})
    load, decoding = workload(cfg, PROMPT), find_decoding(adapters.model)

    def plan(memory: int, waits: bool) -> planning.Plan:
        machine, small = Machine(memory, False, False), Footprint(0, 1, 0, 1, 1, True, False)
        return plan_on(Case(machine, replace(load, waits=waits), model, 0, decoding, lambda _: small))[0]

    ample = 2**40
    without, with_all = plan(ample, False), plan(ample, True)
    assert (without.waiting, with_all.waiting) == (0, 16 * decoding.outside(PROMPT, 5000))
    assert with_all.phases["rollout"] == without.phases["rollout"] + with_all.waiting
    assert (with_all.slots, with_all.kept_bytes) == (without.slots, without.kept_bytes)
    size = planning.size_of(with_all.waiting)
    said = f"completions that wait for their environments keep up to {size} of keys and values"
    assert [line for line in with_all.lines() if "wait" in line] == [said]
    assert not any("wait" in line for line in without.lines())
    # Where all else would fit: slots and what waits share the room.
    beside = sum(without.stays.values()) + without.phases["rollout"]
    short = plan(int(beside / FREE) + 1, True)
    assert 1 < short.slots < 16
    assert 0 < short.kept_bytes < short.waiting == with_all.waiting
    assert sum(short.stays.values()) + short.phases["rollout"] <= FREE * short.memory
    there = f"; {planning.size_of(short.kept_bytes)} are available, beyond which the oldest are recomputed"
    assert [line for line in short.lines() if "wait" in line] == [said + there]


def test_speculation_has_no_say_in_what_waiting_rows_may_keep() -> None:
    """A row whose keys and values are dropped is computed again, which rounds otherwise."""
    model = make_model("tied")
    adapters = Adapters(model, AdapterConfig(rank=2), mx.random.key(0))
    decoding, small = find_decoding(adapters.model), Footprint(0, 1, 0, 1, 1, True, False)
    decoding.vocabulary = 20_000  # wide steps need much: logits for every token of theirs

    def plan(memory: int, speculate: str | int) -> planning.Plan:
        rollout = {"prompts_per_step": 4, "num_generations": 4, "max_completion_length": 5000, "speculate": speculate}
        load = replace(workload(recipe(rollout=rollout), PROMPT), waits=True)
        return plan_on(Case(Machine(memory, False, False), load, model, 0, decoding, lambda _: small))[0]

    ample = plan(2**40, "auto")
    beside = sum(ample.stays.values()) + ample.phases["rollout"] - ample.waiting
    widths = []
    for part in (0.1, 1.0, 1.2, 2.0):
        memory = int((beside + part * ample.waiting) / FREE)
        plans = [plan(memory, speculate) for speculate in ("off", 1, 3, 7, "auto")]
        assert len({(one.kept_bytes, one.slots, one.phases["rollout"]) for one in plans}) == 1
        assert [one.fed for one in plans] == [min(plans[-1].fed, most) for most in (1, 2, 4, 8, 8)]
        both = plans[-1].kept_bytes + plans[-1].drafts
        assert plans[-1].kept_bytes >= min(ample.waiting, 3 * both // 4) > 0
        widths.append(plans[-1].fed)
    assert widths == [4, 2, 4, 8]


@pytest.mark.parametrize(("speculate", "widest"), [("auto", 8), (7, 8), (1, 2), ("off", 1)])
def test_steps_are_as_wide_as_is_asked_for_and_the_slots_leave(speculate: str | int, widest: int) -> None:
    model = make_model("tied")
    adapters = Adapters(model, AdapterConfig(rank=2), mx.random.key(0))
    rollout = {"prompts_per_step": 4, "num_generations": 4, "max_completion_length": 500, "speculate": speculate}
    load, decoding = workload(recipe(rollout=rollout), PROMPT), find_decoding(adapters.model)

    def plan(memory: int) -> planning.Plan:
        small = Footprint(0, 1, 0, 1, 1, True, False)
        machine = Machine(memory, False, False)
        return plan_on(Case(machine, load, model, 0, decoding, lambda _: small))[0]

    ample = plan(2**40)
    assert ample.fed == widest
    if widest == 1:
        assert ample.drafts == 0
        assert not any("drafted tokens" in line for line in ample.lines())
    else:
        assert ample.drafts == load.need().wider(decoding, ample.slots, widest) > 0
        size = planning.size_of(ample.drafts)
        said = f"drafted tokens may take {size} more: a decoding step has up to {widest} tokens per row"
        assert ample.lines()[-1] == said
    decoding.narrow = "it cannot"
    assert (plan(2**40).fed, plan(2**40).drafts) == (1, 0)
    aside = load.need().wider(decoding, ample.slots, 8)
    assert plan(2**40).kept_bytes == ample.kept_bytes + aside
    decoding.narrow = None
    if widest == 8:
        beside = sum(ample.stays.values()) + ample.phases["rollout"]
        for fed in (1, 2, 4):
            more = load.need().wider(decoding, ample.slots, 2 * fed) - 1
            short = plan(int((beside + more) / FREE))
            assert (short.slots, short.fed) == (ample.slots, fed)
            assert 0 <= short.kept_bytes < more
            assert short.drafts == (load.need().wider(decoding, short.slots, fed) if fed > 1 else 0)
            assert any("drafted tokens" in line for line in short.lines()) == (fed > 1)


def test_a_cpu_chooses_small_micro_batches_by_sizes_and_not_by_what_was_measured(monkeypatch) -> None:
    model = make_model("tied")
    adapters = Adapters(model, AdapterConfig(rank=2), mx.random.key(0))
    optim = {"micro_batch_tokens": "auto"}
    cfg = recipe(rollout={"prompts_per_step": 16, "num_generations": 16, "max_completion_length": 60}, optim=optim)
    load, decoding = workload(cfg, 40), find_decoding(adapters.model)

    def chosen(token: float) -> int:
        found = Footprint(0, token, 0.0, 1, 1, True, False)
        machine = Machine(2**40, False, False)
        return plan_on(Case(machine, load, model, 0, decoding, lambda _: found))[0].micro_batch

    assert chosen(100.0) == chosen(5e4) == 4_096
    (largest,) = load.largest(2_048, False)
    monkeypatch.setattr(choosing, "ENOUGH_ON_CPU", choosing.reckoned(model, largest))
    assert chosen(100.0) == chosen(5e4) == 2_048


def test_auto_decides_and_the_decision_is_in_the_recipe() -> None:
    policy, cfg, plan = planned(lengths=SHORT)
    assert cfg.optim.micro_batch_tokens == plan.micro_batch
    assert cfg.optim.gradient_checkpointing is policy.gradient_checkpointing is plan.checkpointing is False
    assert any(f"updates in micro-batches of up to {plan.micro_batch:,} tokens" in line for line in plan.lines())


def test_a_bound_is_said_to_be_one_and_rows_beyond_it_are_named() -> None:
    plan = planned(lengths=SHORT)[2]
    within = replace(plan, micro_batch=600, shape=Shape(1, 40, 1, 500), checkpointing=False)
    assert "updates in micro-batches of up to 600 tokens" in within.lines()
    beyond = replace(within, micro_batch=256, checkpointing=True)
    said = "updates in micro-batches of up to 256 tokens, longer completions alone (up to 540), layers checkpointed"
    assert said in beyond.lines()


@pytest.mark.parametrize(
    ("size", "said"),
    [(1_024, "1 kB"), (475_000, "464 kB"), (2**20, "1 MB"), (138 * 2**20, "138 MB"), (3 * 2**29, "1.5 GB")],
)
def test_sizes_are_told_in_units_that_show_them(size: int, said: str) -> None:
    assert planning.size_of(size) == said


def test_layers_are_checkpointed_where_memory_is_short(monkeypatch) -> None:
    generous = planned()[2].phases["update"]
    monkeypatch.setattr(choosing, "MOST_ACTIVATIONS", generous // 16)
    _, cfg, plan = planned()
    assert plan.checkpointing
    assert cfg.optim.gradient_checkpointing is True
    assert plan.phases["update"] < generous


def test_quantised_weights_are_counted_not_their_words() -> None:
    assert planned("quantised", lengths=SHORT)[2].parameters == planned("tied", lengths=SHORT)[2].parameters


def test_memory_is_what_stays_and_the_larger_phase() -> None:
    _, _, plan = planned(lengths=SHORT)
    assert plan.total == sum(plan.stays.values()) + max(plan.phases["rollout"], plan.phases["update"])
    assert re.search(r": weights \d+ MB, .*, and the largest of rollout \d+ MB, update \d+ MB and .*$", plan.lines()[2])


def test_what_cannot_fit_is_refused_with_numbers(monkeypatch) -> None:
    monkeypatch.setattr(planner, "memory_bytes", lambda: 8 * 2**20)
    with pytest.raises(
        UserError,
        match=r"needs \d+ MB, but the machine has 8 MB\. weights \d+ MB, .* stay in memory, and the update "
        r"\(1 × 160 tokens after 1 × 96, layers checkpointed\) takes \d+ MB\. What would help: a smaller rollout",
    ):
        planned()


def test_a_model_that_cannot_share_prompts_is_planned_so() -> None:
    policy, cfg, _ = planned("tied", lengths=SHORT)
    assert cfg.optim.share_prompts
    policy.share_prompts = False  # as one that cannot says of itself
    _, optim = make_plan(workload(cfg, SHORT[0]), policy, find_decoding(policy.model))
    assert optim.share_prompts is False


def test_what_a_head_with_float32_logits_holds_is_planned(monkeypatch) -> None:
    monkeypatch.setattr(planner, "entering", lambda *_: 0)  # what is measured varies
    plans = []
    for wide in (False, True):
        model = make_model("untied", vocab_size=2048, num_hidden_layers=1)
        cast(model, mx.bfloat16)
        assert not wide or widen_head(model)
        policy = Policy(model, Adapters(model, AdapterConfig(rank=2), mx.random.key(0)), 1.0)
        cfg = recipe(rollout={"prompts_per_step": 1, "num_generations": 2, "max_completion_length": 4})
        plans.append(make_plan(workload(cfg, 4), policy, BatchCaches(model, 2048))[0])
    narrow, wider = plans
    matrix = 4 * 2048 * 64  # all of it as float32: it is smaller than the pieces that may be there at once
    assert wider.phases["rollout"] == narrow.phases["rollout"] + matrix
    assert wider.phases["update"] - narrow.phases["update"] > matrix / 2  # what is measured varies
    assert wider.stays == narrow.stays


@pytest.mark.parametrize("can", [True, False])
def test_a_model_that_cannot_go_in_lines_is_planned_so_on_a_gpu(monkeypatch, can: bool) -> None:
    policy, cfg, _ = planned(lengths=SHORT, pack_completions=True)
    policy._lines = can  # as it says of itself
    load, decoding = workload(cfg, SHORT[0]), find_decoding(policy.model)
    assert make_plan(load, policy, decoding)[1].pack_completions  # a CPU asks nothing
    monkeypatch.setattr(planner, "on_gpu", lambda: True)
    assert make_plan(load, policy, decoding)[1].pack_completions is can
