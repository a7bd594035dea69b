"""The open generator, by every way of decoding: what is sampled depends on nothing but the row."""

import pytest
from ways import LONG, WAYS, asked, exact_buffers, finish, fresh, generator_of, held, sampled

from grpo.backend import cuda
from grpo.backend.random import derive_key
from grpo.generation import buffers, slots
from grpo.generation.generator import Request
from grpo.generation.sampling import Sampling

PROMPTS = [(9, 10, 11), (12,), LONG]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch) -> None:
    """Edges of chunks and of widths are crossed by short rows."""
    monkeypatch.setattr(slots, "width_step", lambda: 8)
    monkeypatch.setattr(buffers, "PREFILL_CHUNK", 16)


@pytest.fixture(params=WAYS)
def way(request) -> str:
    return request.param


def alone(generator, submissions) -> list:
    """What each submission gives in an engine of its own."""
    found = []
    for submission in submissions:
        engine = generator.open()
        rows = engine.submit(submission)
        finish(engine)
        found.append(sampled(rows))
    return found


@pytest.mark.each_value
@pytest.mark.parametrize("slots", [2, 6])
def test_neither_order_nor_lateness_nor_neighbors_change_a_row(way: str, slots: int) -> None:
    generator = generator_of(way, slots)
    # The last come late, with a longer prompt and more tokens than any before: all buffers grow.
    submissions = [
        asked(PROMPTS[0], 1, n=2, sampling=Sampling(1.0, 10)),
        asked(PROMPTS[1], 2, n=2, sampling=Sampling(1.0, 14)),
        asked(PROMPTS[2], 3, n=2, sampling=Sampling(1.0, 24)),
    ]
    expected = alone(generator, submissions)
    assert max(len(ids) for rows in expected for ids, _ in rows) > 8
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        engine, rows = generator.open(), {}
        for number in order:
            rows[number] = engine.submit(submissions[number])
            for _ in range(4):
                engine.step()
        finish(engine)
        assert [sampled(rows[number]) for number in range(3)] == expected


@pytest.mark.quick_cases("joined layers", "overlapping steps", "both in a layer")
def test_rows_go_on_when_buffers_grow_after_many_rows(way: str) -> None:
    generator = generator_of(way, 2)
    generator.stop_ids = frozenset()
    short = [asked((9, 10), seed, sampling=Sampling(1.0, 12)) for seed in range(4)]
    longer = asked((11,), 5, sampling=Sampling(1.0, 40))
    expected = alone(generator, [*short, longer])
    engine = generator.open()
    rows = [engine.submit(submission) for submission in short]
    for _ in range(20):  # more than a slot has columns
        engine.step()
    rows.append(engine.submit(longer))
    finish(engine)
    assert [sampled(row) for row in rows] == expected


@pytest.mark.quick_cases("joined layers", "overlapping steps", "both in a layer")
@pytest.mark.parametrize(("temperature", "added"), [(0.0, 1), (1.0, 70)])
def test_an_extended_row_is_a_fresh_one_with_all_as_its_prompt(
    way: str, temperature: float, added: int, monkeypatch
) -> None:
    """While rows of the same prompt and of others decode."""
    monkeypatch.setattr(cuda, "available", lambda: False)  # `fresh` counts its draws on by stock operations' keys
    generator = generator_of(way, 3)
    engine = generator.open()
    sampling = Sampling(temperature, 3 * added + 60, max_repeats=3)
    rows = engine.submit(asked(PROMPTS[0], n=3, sampling=sampling))
    others = engine.submit(asked(LONG, 2, n=4, sampling=Sampling(1.0, 90), keep=False))
    neighbors = alone(generator, [asked(LONG, 2, n=4, sampling=Sampling(1.0, 90), keep=False)])
    turns = 0
    while engine.busy:
        for row in engine.step().ended:
            if row.keep and len(row.injected) < 3 and row.room >= added:
                engine.extend(row, [30 + turns % 50 + i % 9 for i in range(added)])
                turns += 1
    assert turns >= 3
    assert [sampled(others)] == neighbors
    for row in [row for row in rows if row.injected]:  # not those that the first turn filled
        other = fresh(generator, row, PROMPTS[0])
        cut = row.injected[-1].stop
        assert row.token_ids[cut:] == other.token_ids
        assert row.finish_reason == other.finish_reason
        assert row.logprobs[cut:] == pytest.approx(other.logprobs, abs=2e-5)
        assert len(row.logprobs) == len(row.token_ids) == len(row.trained)


@pytest.mark.quick_cases("joined layers", "overlapping steps", "both in a layer")
def test_hundreds_of_tokens_at_once(way: str, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "available", lambda: False)  # see above
    generator = generator_of(way, 2)
    engine = generator.open()
    (row,) = engine.submit(asked(LONG, sampling=Sampling(1.0, 700)))
    finish(engine)
    engine.extend(row, [20 + i % 100 for i in range(500)])
    finish(engine)
    other = fresh(generator, row, LONG)
    assert row.token_ids[row.injected[0].stop :] == other.token_ids


@pytest.mark.quick_cases("joined layers", "overlapping steps", "both in a layer")
def test_a_parked_row_loses_nothing(way: str) -> None:
    """Parked and let on again at odd moments, in its slot or in the queue, and others take its slot meanwhile."""
    generator = generator_of(way, 2)
    submissions = [asked(PROMPTS[i % 3], i, n=2, sampling=Sampling(1.3, 40)) for i in range(3)]
    expected = alone(generator, submissions)
    engine = generator.open()
    rows = [row for submission in submissions for row in engine.submit(submission)]
    parked = 0
    for step in range(100):
        row = rows[step % 5]
        if row.state in ("queued", "decoding") and row.room > 1:  # a step in flight may bring the last token
            engine.park(row)
            parked += row.state == "parked"
            if row.state == "parked" and step % 3 == 0:  # at once
                engine.extend(row, ())
        engine.step()
        if (row := rows[step * 3 % 5]).state == "parked":
            engine.extend(row, ())
    for row in rows:
        if row.state == "parked":
            engine.extend(row, [])
    finish(engine)
    assert parked >= 10
    assert [sampled(rows[i : i + 2]) for i in (0, 2, 4)] == expected


@pytest.mark.quick_cases("joined layers", "overlapping steps", "both in a layer")
def test_what_is_dropped_for_want_of_memory_is_computed_again(way: str) -> None:
    generator = generator_of(way, 2)

    def conversation(kept_bytes: int | None):
        generator.kept_bytes = kept_bytes
        engine = generator.open()
        rows = [row for i in range(3) for row in engine.submit(asked(PROMPTS[i], i, n=2))]
        dropped = 0
        for _ in range(2):
            finish(engine)
            engine.step()  # the last to end is out of its slot now
            waiting = [row for row in rows if row.state == "waiting"]
            dropped += sum(row.kept is None for row in waiting)
            held = sum(row.kept.nbytes for row in waiting if row.kept)
            assert held == engine._run.seats.parking.nbytes <= (held if kept_bytes is None else kept_bytes)
            for row in waiting:
                if row.room >= 5:
                    engine.extend(row, [40, 41, 42, 43, 44])
        finish(engine)
        return dropped, sampled(rows)

    none_dropped, expected = conversation(None)
    assert none_dropped == 0
    for most in (0, 20_000):
        dropped, found = conversation(most)
        assert dropped > 0
        assert found == expected


@pytest.mark.quick_cases("joined layers", "overlapping steps", "both in a layer")
@exact_buffers
def test_the_last_release_frees_all_buffers(way: str) -> None:
    generator = generator_of(way, 4)
    generator.generate([Request([5, 6])], Sampling(1.0, 3), derive_key(0, "warm"))
    before = held()
    engine = generator.open()
    rows = engine.submit(asked(LONG, n=4))
    finish(engine)
    waiting = [row for row in rows if row.state == "waiting"]
    assert waiting
    assert held() - before > 10_000
    for row in waiting:
        engine.release(row)
    assert held() - before < 3_000
    assert not engine.busy
    (again,) = engine.submit(asked(LONG))  # and the engine serves on
    finish(engine)
    assert sampled([again]) == sampled(rows[:1])


@pytest.mark.quick_cases("joined layers", "overlapping steps", "both in a layer")
def test_a_released_row_leaves_the_others_alone(way: str) -> None:
    generator = generator_of(way, 3)
    submission = asked(PROMPTS[0], n=5, sampling=Sampling(1.3, 30))
    (expected,) = alone(generator, [submission])
    engine = generator.open()
    rows = engine.submit(submission)
    engine.step()
    engine.step()
    engine.release(rows[1])  # it decodes
    engine.release(rows[4])  # it waits for a slot
    finish(engine)
    assert [sampled(rows)[i] for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]
    assert rows[1].state == rows[4].state == "released"
    assert rows[1].token_ids == expected[1][0][: len(rows[1].token_ids)]
