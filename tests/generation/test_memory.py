"""Memory: what is planned is what is held, and slots are as many as fit."""

import mlx.core as mx
import pytest

from grpo.backend.random import derive_key
from grpo.errors import UserError
from grpo.generation.generator import Request
from grpo.generation.memory import FILTERED_HELD, LOGITS_HELD, Need, slots_that_fit
from grpo.generation.sampling import Sampling, TokenSampler


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
