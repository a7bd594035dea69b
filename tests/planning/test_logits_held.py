"""How many of a chunk's logits the head holds at once is as the plan counts, on a CPU nearly to the array."""

from __future__ import annotations

import mlx.core as mx
import pytest
from conftest import make_model

from grpo.backend.device import on_gpu
from grpo.config import AdapterConfig
from grpo.model.adapters import Adapters
from grpo.model.logprobs import chunk_tokens, chunked_logprobs
from grpo.model.policy import Policy
from grpo.planning.footprint import LOGIT_COPIES, MOST_COPIES

VOCABULARY = 8192


@pytest.mark.skipif(on_gpu(), reason="what is in flight on a GPU varies")
@pytest.mark.parametrize("chunks", [1, 4, 8])
def test_the_head_holds_as_many_logits_as_planned(chunks: int) -> None:
    model = make_model("tied", hidden_size=64, vocab_size=VOCABULARY)
    policy = Policy(model, Adapters(model, AdapterConfig(rank=8), mx.random.key(0)), 1.0)
    assert policy.split is not None
    head, chunk = policy.split[1], chunk_tokens(VOCABULARY, policy.logits)
    hidden, tokens = mx.random.normal((1, chunks * chunk, 64)), mx.zeros((1, chunks * chunk), mx.int32)
    mx.eval(hidden, tokens)
    gradient = mx.grad(lambda states: chunked_logprobs(states, tokens, head, 1.0, chunk, module=model)[0].sum())
    copies = []
    for _ in range(6):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(gradient(hidden))
        copies.append((mx.get_peak_memory() - before) / (4 * VOCABULARY * chunk))
    planned = min(MOST_COPIES[False], chunks * LOGIT_COPIES)
    # Two threads that share a core, as tests do, run less far ahead of each other.
    assert 0.8 * planned <= max(copies) <= 1.1 * planned
