"""Lanes: several runs side by side give what one gives, whatever the time that each takes."""

import time

import mlx.core as mx
import pytest
from ways import LONG, STOPS, asked, finish, generator_of, sampled

from grpo.backend import lanes as backend_lanes
from grpo.generation import lanes as lanes_module
from grpo.generation.batching import Run
from grpo.generation.events import Events
from grpo.generation.lanes import Lanes, _merged, rollout_lanes
from grpo.generation.sampling import Sampling

pytestmark = pytest.mark.skipif(mx.default_device().type == mx.DeviceType.gpu, reason="a GPU decodes in one lane")


def opened(lanes: int, slots: int = 8, kept_bytes: int | None = None, stops: frozenset[int] = STOPS):
    generator = generator_of("joined layers", slots)
    generator.stop_ids = stops
    generator.lanes, generator.kept_bytes = lanes, kept_bytes
    return generator.open()


def numbers(rows) -> list:
    return [(row.token_ids, row.logprobs, row.finish_reason) for row in rows]


def conversation(lanes: int, slots: int = 8, kept_bytes: int | None = None, delay: float = 0.0):
    """Groups of several prompts, more rows than slots, each with two turns more."""
    engine = opened(lanes, slots, kept_bytes)
    if delay:
        slowed(engine, delay)
    rows = [row for i in range(3) for row in engine.submit(asked((9, 10, 11 + i), i, n=6))]
    order = []
    while engine.busy:
        for row in engine.step().ended:
            order.append(rows.index(row))
            if len(row.injected) < 2 and row.room >= 5:
                engine.extend(row, [40, 41, 42, 43, 44])
    lanes_of = [engine._run._lane[row] for row in rows] if lanes > 1 else []
    return numbers(rows), order, lanes_of


def slowed(engine, delay: float) -> None:
    """Let the first lane take longer."""
    first = engine._run.runs[0]
    step = first.step

    def late() -> Events:
        time.sleep(delay)
        return step()

    first.step = late


def test_two_lanes_sample_what_one_samples_to_the_bit() -> None:
    def single_turns(lanes: int) -> list:
        engine = opened(lanes, 24)
        rows = [row for i in range(3) for row in engine.submit(asked((9, 10, 11 + i), i, n=8, keep=False))]
        finish(engine)
        return numbers(rows)

    assert single_turns(2) == single_turns(1)


def test_conversations_are_the_same_in_two_lanes() -> None:
    one, _, _ = conversation(1)
    two, _, lanes = conversation(2)
    assert [(ids, reason) for ids, _, reason in two] == [(ids, reason) for ids, _, reason in one]
    for (_, found, _), (_, expected, _) in zip(two, one, strict=True):
        assert found == pytest.approx(expected, abs=2e-5)  # rows are extended beside others
    assert 0.3 < sum(lanes) / len(lanes) < 0.7


def test_neither_lanes_nor_numbers_nor_order_depend_on_time() -> None:
    expected = conversation(2)
    assert conversation(2, delay=0.003) == expected
    assert conversation(2) == expected


def dealt(*groups: int, slots: int = 64) -> list[list[int]]:
    """The lane of each row of groups that begin together."""
    engine = opened(2, slots)
    rows = [engine.submit(asked((9, 10 + i), i, n=n)) for i, n in enumerate(groups)]
    engine._run._deal()
    found = [[engine._run._lane.get(row, -1) for row in group] for group in rows]
    engine.close()
    return found


def test_rows_of_a_prompt_are_together_unless_a_lane_would_have_less_to_do() -> None:
    assert dealt(8, 8) == [[0] * 8, [1] * 8]
    assert dealt(8, 8, 8, 8) == [[0] * 8, [1] * 8, [0] * 8, [1] * 8]
    assert sorted(dealt(8)[0]) == [0] * 4 + [1] * 4
    assert [sum(group) for group in dealt(8, 8, 8)] == [0, 8, 4]


def test_few_rows_are_in_one_lane_if_they_fit() -> None:
    assert dealt(7) == [[0] * 7]
    assert sorted(dealt(7, slots=8)[0]) == [0, 0, 0, 0, 1, 1, 1]
    assert dealt(1) == [[0]]


def test_a_row_that_waits_goes_where_there_is_room_and_to_its_prompt() -> None:
    engine = opened(2, slots=8, stops=frozenset())
    rows = [*engine.submit(asked((9, 10), 1, n=4)), *engine.submit(asked((9, 11), 2, n=8))]
    engine.step()
    lanes = engine._run._lane
    assert [lanes.get(row) for row in rows] == [0] * 4 + [1] * 4 + [None] * 4
    engine.release(rows[0])
    engine.step()
    assert lanes[rows[8]] == 0  # the other lane has its prompt, but no room
    engine.release(rows[4])
    engine.step()
    assert lanes[rows[9]] == 1
    engine.close()
    assert all(row.state == "released" for row in rows)
    assert not engine.busy


def test_a_row_beside_another_goes_to_its_lane_and_is_counted_once() -> None:
    def begun_anew(lanes: int):
        engine = opened(lanes)
        rows = engine.submit(asked((9, 10, 11), n=8, sampling=Sampling(1.0, 8)))
        while any(row.finish_reason is None for row in rows):
            engine.step()
        again = [engine.submit(asked((9, 10, 11), i, beside=row, keep=False))[0] for i, row in enumerate(rows)]
        for row in rows:
            engine.release(row)
        finish(engine)
        return engine, rows, again

    engine, rows, again = begun_anew(2)
    lanes = engine._run._lane
    assert [lanes[row] for row in again] == [lanes[row] for row in rows]
    assert {row.prompt.left for row in again} == {0}
    assert numbers(again) == numbers(begun_anew(1)[2])


@pytest.mark.parametrize("most", [0, 40_000])
def test_what_rows_keep_is_bounded_over_all_lanes(most: int) -> None:
    expected, _, _ = conversation(1, slots=18)
    found, _, _ = conversation(2, slots=18, kept_bytes=most)
    assert [ids for ids, _, _ in found] == [ids for ids, _, _ in expected]
    engine = opened(2, 18, most)
    rows = engine.submit(asked(LONG, n=12))
    held = []
    while any(row.finish_reason is None for row in rows):
        engine.step()
        held.append(sum(run.seats.parking.nbytes for run in engine._run.runs))
    assert max(held) <= most
    assert sum(row.state == "waiting" for row in rows) > 6  # more than there is room for
    engine.close()


def test_parked_and_released_rows_leave_the_others_alone() -> None:
    engine = opened(1)
    rows = engine.submit(asked((9, 10), n=12, sampling=Sampling(1.3, 30)))
    finish(engine)
    expected = sampled(rows)
    engine = opened(2)
    rows = engine.submit(asked((9, 10), n=12, sampling=Sampling(1.3, 30)))
    engine.park(rows[11])  # it waits for a lane
    engine.step()
    engine.step()
    engine.park(rows[0])
    engine.release(rows[1])
    engine.release(rows[10])  # it waits for a lane
    for _ in range(3):
        engine.step()
    for row in (rows[0], rows[11]):
        if row.state == "parked":
            engine.extend(row, ())
    finish(engine)
    left = [i for i in range(12) if i not in (1, 10)]
    assert [sampled(rows)[i] for i in left] == [expected[i] for i in left]
    assert rows[1].state == rows[10].state == "released"


def test_an_error_in_one_lane_is_raised_when_no_lane_is_at_work() -> None:
    engine = opened(2)
    engine.submit(asked((9, 10), n=8))
    engine.step()
    ended = []

    def broken() -> Events:
        raise RuntimeError("of lane 0")

    def late() -> Events:
        time.sleep(0.02)
        ended.append(True)
        return Events()

    engine._run.runs[0].step, engine._run.runs[1].step = broken, late
    with pytest.raises(RuntimeError, match="of lane 0"):
        engine.step()
    assert ended == [True]


def test_two_engines_take_turns_in_the_same_lanes() -> None:
    engine = opened(2)
    rows = engine.submit(asked((9, 10), n=8, keep=False))
    finish(engine)
    expected = sampled(rows)
    engines = [opened(2), opened(2)]
    both = [engine.submit(asked((9, 10), n=8, keep=False)) for engine in engines]
    while any(engine.busy for engine in engines):
        for engine in engines:
            engine.step()
    assert [sampled(rows) for rows in both] == [expected, expected]


def test_new_weights_are_taken_over_by_all_lanes(make_policy) -> None:
    toy = make_policy()
    toy.generator.slots, toy.generator.lanes = 8, 2

    def greedy() -> list:
        engine = toy.generator.open()
        rows = engine.submit(asked((5, 6, 7), n=8, keep=False, sampling=Sampling(0.0, 8)))
        finish(engine)
        return numbers(rows)

    before = greedy()
    toy.policy.adapters.load_state({path: array * 3 for path, array in toy.policy.adapters.state().items()})
    after = greedy()
    assert after != before
    assert all(row == after[0] for row in after)


def test_events_of_lanes_are_put_together() -> None:
    (a, b) = opened(1).submit(asked((9, 10), n=2))
    both = _merged([Events([None, a], [[], [5]], [[], [-0.5]]), Events([b], [[6]], None, None, {b: "stop"})])
    assert [(t.row, t.token_id, t.logprob, t.finish_reason) for t in both if t.row is a] == [(a, 5, -0.5, None)]
    assert both.token_ids == [[], [5], [6]]
    assert both.logprobs == [[], [-0.5], ()]
    assert both.ended == {b: "stop"}


def test_who_cannot_be_stepped_side_by_side_has_one_lane(monkeypatch) -> None:
    generator = generator_of("the model's layers", 8)
    generator.lanes = 2
    assert isinstance(generator.open()._run, Run)
    assert isinstance(opened(2)._run, Lanes)
    assert isinstance(opened(2, slots=1)._run, Run)


def test_lanes_are_for_large_steps_on_a_machine_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr(backend_lanes, "cpu_cores", lambda: 2)
    assert rollout_lanes(64, 512 * 1280) == rollout_lanes(256, 128 * 384) == 2
    assert rollout_lanes(64, 128 * 384) == rollout_lanes(16, 512 * 1280) == 1
    assert rollout_lanes(64, 512 * 1280, neighbours=2) == 1
    monkeypatch.setattr(backend_lanes, "cpu_cores", lambda: 1)
    assert rollout_lanes(64, 512 * 1280) == 1
    monkeypatch.setattr(backend_lanes, "cpu_cores", lambda: 4)
    assert rollout_lanes(64, 512 * 1280) == 1  # BLAS has the cores
    assert rollout_lanes(64, 512 * 1280, neighbours=2) == 2


def test_processes_that_share_the_machine_share_its_cores(monkeypatch) -> None:
    monkeypatch.setattr(backend_lanes, "cpu_cores", lambda: 2)
    monkeypatch.setattr(lanes_module, "LARGE_STEP", 0)
    generator = generator_of("joined layers", 64)
    generator.lanes = None
    assert isinstance(generator.open()._run, Lanes)
    monkeypatch.setattr(generator, "neighbours", 2)
    assert isinstance(generator.open()._run, Run)


def test_memory_is_planned_for_prompts_in_each_lane() -> None:
    decoding = generator_of("joined layers", 1).decoding
    token = sum(shape.bytes_per_token for shape in decoding.shapes)
    # 8 places more of 100 tokens, of which as many are prefilled at once.
    assert decoding.memory(64, 8, 100, 10) >= decoding.memory(63, 8, 100, 10) + 2 * 8 * 100 * token


def test_an_engine_that_stays_open_holds_no_row_that_has_ended() -> None:
    with opened(2, slots=4, stops=frozenset()) as engine:
        (busy,) = engine.submit(asked(LONG, sampling=Sampling(1.0, 1000), keep=False))
        for number in range(12):
            (row,) = engine.submit(asked((*LONG, number), sampling=Sampling(1.0, 3), keep=False))
            while row.finish_reason is None:
                engine.step()
        del row
        for _ in range(3):
            engine.step()
        lanes = engine._run
        assert isinstance(lanes, Lanes)
        held = [len(lanes._lane), len(lanes._home), *map(len, lanes._pieces)]
        assert busy.state == "decoding"
        assert max(held) <= 2  # and not all thirteen
