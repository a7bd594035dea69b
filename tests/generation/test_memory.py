"""Memory: what is planned is what is held, and slots are as many as fit."""

from dataclasses import replace

import mlx.core as mx
import pytest
from generation.ways import generator_of

from grpo.backend.random import derive_key
from grpo.errors import UserError
from grpo.generation.generator import Request
from grpo.generation.growth import columns_for
from grpo.generation.memory import (
    FILTERED_HELD,
    LOGITS_HELD,
    Need,
    slots_beside_waiting,
    slots_that_fit,
    widest_that_fits,
)
from grpo.generation.rows import Submission
from grpo.generation.sampling import Sampling, TokenSampler
from grpo.generation.slots import WIDEST
from grpo.planning.rehearsal import entering


def test_the_estimate_is_what_a_rollout_takes(make_policy) -> None:
    toy = make_policy()
    toy.generator.stop_ids = frozenset()
    requests = [Request([1 + i, *range(5, 204)], 4) for i in range(4)]
    toy.generator.generate(requests, Sampling(1.0, 200), derive_key(0, "warm"))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    toy.generator.generate(requests, Sampling(1.0, 200), derive_key(0, "test"))
    measured = mx.get_peak_memory() - before
    decoding = toy.generator.decoding
    seen = Need(16, 4, 200, 200).bytes(decoding, 16, entering(decoding, 4, 200))
    assert 0.7 * seen < measured < 1.1 * seen  # what is in flight varies


FILTERS = Sampling(0.7, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=1.1, min_tokens=2)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("sampling", [Sampling(), FILTERS], ids=["plain", "filtered"])
def test_the_estimate_covers_what_sampling_takes(dtype: mx.Dtype, sampling: Sampling) -> None:
    """Of a large vocabulary, where it is most of a step: the logits and all that filters make of them."""
    rows, vocabulary = 16, 20_000
    logits = mx.random.normal((rows, vocabulary)).astype(dtype)
    sampler = TokenSampler(sampling, [1], rows, vocabulary)
    sampler.admit(list(range(rows)), list(mx.random.split(mx.random.key(0), rows)), [[1]] * rows)
    mx.eval(logits, sampler.keys)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(sampler.draw(logits, mx.zeros(rows, mx.int32), True).arrays())
    taken = mx.get_peak_memory() - before + logits.nbytes
    planned = 4 * rows * vocabulary * (FILTERED_HELD if sampling.reshaped else LOGITS_HELD)
    assert planned / 3 < taken < planned


def test_prompts_are_planned_twice_only_where_there_may_be_two_lanes() -> None:
    decoding = generator_of("joined layers", 4).decoding
    few, many = (decoding.memory(slots, 2, 100, 0) for slots in (63, 64))
    if decoding.side_by_side:
        assert many > 1.9 * few


def test_steps_are_as_wide_as_memory_allows(make_policy) -> None:
    decoding = make_policy().generator.decoding
    for need in (Need(64, 8, 100, 100), Need(64, 8, 100, 100, reshaped=True)):
        held = FILTERED_HELD if need.reshaped else LOGITS_HELD
        for fed, wider in ((2, 4), (4, 8)):
            room = need.wider(decoding, 16, fed)
            assert room >= (fed - 1) * held * 4 * 16 * decoding.vocabulary
            assert widest_that_fits(decoding, need, 16, room) == fed
            assert widest_that_fits(decoding, need, 16, need.wider(decoding, 16, wider) - 1) == fed
        assert widest_that_fits(decoding, need, 16, need.wider(decoding, 16, 2) - 1) == 1
        assert widest_that_fits(decoding, need, 16, 10**12) == WIDEST


def test_slots_are_as_many_as_fit(make_policy) -> None:
    decoding = make_policy().generator.decoding
    need = Need(64, 8, 100, 100)
    assert slots_that_fit(decoding, need, 64, need.bytes(decoding, 64)) == 64
    assert slots_that_fit(decoding, need, 64, need.bytes(decoding, 64) - 1) == 63
    assert slots_that_fit(decoding, need, 64, need.bytes(decoding, 7)) == 7
    assert slots_that_fit(decoding, need, 200, 10**12) == 64  # no more than there are rows


def test_a_slot_for_every_row_may_need_less_than_fewer_slots(make_policy) -> None:
    """With fewer slots, prompts enter while other completions are long."""
    decoding, need = make_policy().generator.decoding, Need(16, 4, 100, 500)
    all_at_once, fewer = need.bytes(decoding, 16), need.bytes(decoding, 15)
    assert all_at_once < fewer
    assert slots_that_fit(decoding, need, 16, all_at_once) == 16
    assert 1 < slots_that_fit(decoding, need, 16, all_at_once - 1) < 15


def test_what_cannot_fit_is_refused_with_numbers(make_policy) -> None:
    decoding = make_policy().generator.decoding
    with pytest.raises(UserError, match=r"one completion of 100000 tokens after a prompt of 50 needs .* GB .* 0\.0 GB"):
        slots_that_fit(decoding, Need(8, 8, 50, 100_000), 8, 1000)


@pytest.mark.parametrize("way", ["joined layers", "batch caches"])
def test_what_a_waiting_row_keeps_is_reckoned(way: str) -> None:
    generator = generator_of(way, 4)
    generator.stop_ids = frozenset()
    engine = generator.open()
    (row,) = engine.submit(Submission(tuple(range(5, 205)), Sampling(1.0, 300), seed=0, n=1, keep=True))
    for _ in range(257):
        engine.step()
    engine.park(row)
    while row.kept is None:
        engine.step()
    reckoned = generator.decoding.outside(200, len(row.token_ids))
    assert row.kept.nbytes == pytest.approx(reckoned, rel=0.15)
    engine.close()


class Counted:
    """A way of decoding of which a slot takes 10 bytes and a place 1, and a row outside its slot 8."""

    vocabulary = 0

    def memory(self, slots: int, places: int, prompt: int, completion: int, entering: int | None = None) -> int:
        return 10 * slots + places

    def outside(self, prompt: int, completion: int) -> int:
        return 8


def test_waiting_rows_have_room_beside_the_slots() -> None:
    still, waits = (Need(16, 1, 5, 5, waits=waits) for waits in (False, True))
    assert (still.waiting(Counted()), waits.waiting(Counted())) == (0, 16 * 8)
    slots = [
        [slots_beside_waiting(Counted(), need, 16, available) for need in (still, waits)]
        for available in (1000, 288, 200, 40, 21, 11)
    ]
    # There is room for all; just so; half of what one slot leaves is theirs; one slot goes before all they keep.
    assert slots == [[16, 16], [16, 15], [16, 10], [3, 2], [2, 1], [1, 1]]
    with pytest.raises(UserError, match="one completion of 5 tokens"):
        slots_beside_waiting(Counted(), waits, 16, 10)


def test_prompts_enter_before_completions_are_long_where_each_row_has_a_slot() -> None:
    """By hand: a row keeps 3 bytes a token, and prompts that enter take 1,000 besides."""

    class Entered(Counted):
        vocabulary = 0

        def memory(self, slots: int, places: int, prompt: int, completion: int, entering: int | None = None) -> int:
            return 3 * slots * completion + (1_000 if entering is None else entering)

    all_seated, waits = Need(8, 2, 10, 1_000), Need(8, 2, 10, 1_000, waits=True)
    first = columns_for(1, 1_000)
    assert all_seated.bytes(Entered(), 8) == max(3 * 8 * 1_000, 3 * 8 * first + 1_000) == 24_000
    assert all_seated.bytes(Entered(), 8, 30_000) == 3 * 8 * first + 30_000
    # Prompts of rows that wait for slots, or come back, enter beside long completions.
    assert all_seated.bytes(Entered(), 4) == 3 * 4 * 1_000 + 1_000
    assert waits.bytes(Entered(), 8, 500) == 3 * 8 * 1_000 + 500
    # So all slots may fit where one fewer does not.
    assert all_seated.bytes(Entered(), 8) < 24_500 < 3 * 8 * 1_000 + 1_000
    assert slots_that_fit(Entered(), replace(all_seated, rows=8), 8, 24_000) == 8
    assert slots_that_fit(Entered(), replace(all_seated, rows=9), 8, 24_000) == 7
