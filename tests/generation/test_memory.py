"""Memory: what is planned is what is held, and slots are as many as fit."""

import mlx.core as mx
import pytest

from grpo.backend.random import derive_key
from grpo.errors import UserError
from grpo.generation.generator import Request
from grpo.generation.memory import Need, slots_that_fit
from grpo.generation.sampling import Sampling


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
    planned = Need(16, 4, 200, 200).bytes(toy.generator.decoding, 16)
    assert 0.5 * planned < measured < 1.25 * planned


def test_slots_are_as_many_as_fit(make_policy) -> None:
    decoding = make_policy().generator.decoding
    need = Need(64, 8, 100, 100)
    assert slots_that_fit(decoding, need, 64, need.bytes(decoding, 64)) == 64
    assert slots_that_fit(decoding, need, 64, need.bytes(decoding, 64) - 1) == 63
    assert slots_that_fit(decoding, need, 64, need.bytes(decoding, 7)) == 7
    assert slots_that_fit(decoding, need, 200, 10**12) == 64  # no more than there are rows


def test_what_cannot_fit_is_refused_with_numbers(make_policy) -> None:
    decoding = make_policy().generator.decoding
    with pytest.raises(UserError, match=r"one completion of 100000 tokens after a prompt of 50 needs .* GB .* 0\.0 GB"):
        slots_that_fit(decoding, Need(8, 8, 50, 100_000), 8, 1000)
