"""Sampling: the stated distribution, under every filter, and what is said of its logprobs."""

import math

import mlx.core as mx
import numpy as np
import pytest

from grpo.backend.random import derive_key
from grpo.generation.filters import repetition_penalised, threshold
from grpo.generation.generator import Request
from grpo.generation.sampling import Sampling, TokenSampler

KEY = derive_key(0, "test")
LOGITS = np.array([1.0, 0.0, -1.0, 2.0, 0.5, -0.5, 1.5, -3.0])
PROMPT = [3, 1]
"""What a penalty has seen already."""


def expected(s: Sampling, logits=LOGITS) -> np.ndarray:
    """The distribution, by the definitions and one token at a time."""
    x = logits.astype(np.float64).copy()
    for token in set(PROMPT):
        x[token] = x[token] / s.repetition_penalty if x[token] > 0 else x[token] * s.repetition_penalty
    x /= s.temperature
    order = np.argsort(-x)
    kept = list(order[: s.top_k] if s.top_k else order)
    p = np.exp(x[kept]) / np.exp(x[kept]).sum()
    nucleus, share = [], 0.0
    for token, probability in zip(kept, p, strict=True):
        if share >= s.top_p:
            break
        nucleus.append(token)
        share += probability
    highest = np.exp(x[order[0]])
    final = [token for token in nucleus if np.exp(x[token]) >= s.min_p * highest]
    out = np.zeros(len(x))
    out[final] = np.exp(x[final]) / np.exp(x[final]).sum()
    return out


WAYS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.6),
    Sampling(temperature=0.8, top_k=3),
    Sampling(temperature=1.0, top_p=0.75),
    Sampling(temperature=1.3, min_p=0.2),
    Sampling(temperature=0.9, repetition_penalty=1.7),
    Sampling(temperature=0.9, top_k=6, top_p=0.9, min_p=0.1, repetition_penalty=1.3),
]


def drawn(sampling: Sampling, rows: int, logprobs: bool = True):
    sampler = TokenSampler(sampling, [], rows, len(LOGITS))
    sampler.admit(list(range(rows)), list(mx.random.split(KEY, rows)), [PROMPT] * rows)
    logits = mx.broadcast_to(mx.array(LOGITS, mx.float32), (rows, len(LOGITS)))
    return sampler.draw(logits, mx.zeros(rows, mx.int32), logprobs)


@pytest.mark.parametrize("sampling", WAYS, ids=str)
def test_draws_follow_the_stated_distribution(sampling: Sampling) -> None:
    rows = 20_000
    found = drawn(sampling, rows)
    counts = np.bincount(np.array(found.tokens), minlength=len(LOGITS))
    wanted = expected(sampling) * rows
    possible = wanted > 0
    assert counts[~possible].sum() == 0
    chi_squared = ((counts - wanted)[possible] ** 2 / wanted[possible]).sum()
    assert chi_squared < 24.4  # 7 degrees of freedom at the most: exceeded by chance once in a thousand keys


@pytest.mark.parametrize("sampling", WAYS, ids=str)
def test_logprobs_are_the_model_s_and_the_sampler_s(sampling: Sampling) -> None:
    found = drawn(sampling, 200)
    tokens = np.array(found.tokens)
    plain = LOGITS / sampling.temperature
    plain = plain - np.log(np.exp(plain).sum())
    np.testing.assert_allclose(np.array(found.logprobs), plain[tokens], atol=2e-6)
    if sampling.reshaped:
        np.testing.assert_allclose(np.array(found.sampler_logprobs), np.log(expected(sampling)[tokens]), atol=2e-6)
    else:
        assert found.sampler_logprobs is None


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.5)], ids=str)
def test_without_logprobs_the_graph_holds_none(sampling: Sampling, tmp_path, monkeypatch) -> None:
    for file in ("backend.maths", "generation.sampling"):  # on a GPU logsumexp is one operation
        monkeypatch.setattr(f"grpo.{file}.on_gpu", lambda: True)
    graphs = {}
    for wanted in (True, False):
        path = tmp_path / f"{wanted}.dot"
        mx.export_to_dot(str(path), *drawn(sampling, 4, wanted).arrays())
        graphs[wanted] = path.read_text()
    assert graphs[True].count("LogSumExp") == (2 if sampling.reshaped else 1)
    assert "LogSumExp" not in graphs[False]


def test_the_penalty_is_numpy_s() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 3
    seen = np.random.default_rng(1).random((5, 40)) < 0.3
    wanted = np.where(seen & (logits > 0), logits / 1.4, np.where(seen, logits * 1.4, logits))
    np.testing.assert_allclose(np.array(repetition_penalised(mx.array(logits), mx.array(seen), 1.4)), wanted, rtol=1e-6)


def test_the_penalty_remembers_prompt_and_completion(make_policy) -> None:
    """With a penalty beyond measure, no token comes twice, nor one of the prompt."""
    toy = make_policy(slots=2)
    toy.generator.stop_ids = frozenset()
    prompts = [[5, 6, 7], [8, 9], [10]]
    groups = toy.generator.generate(
        [Request(ids, 2) for ids in prompts], Sampling(0.0, 12, repetition_penalty=1e6), KEY
    )
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            everything = [*prompt, *completion.token_ids]
            assert len(set(everything)) == len(everything)


def test_tokens_of_equal_logits_stay_or_go_together() -> None:
    logits = mx.array([[2.0, 1.0, 1.0, 0.0]])
    assert threshold(logits, 2, 1.0, 0.0).item() == 1.0
    assert threshold(logits, 0, 1.0, 0.0).item() == -math.inf


def test_a_filter_never_takes_everything() -> None:
    logits = mx.array([[0.0, 5.0, 1.0]])
    assert threshold(logits, 1, 1e-9, 0.99).item() == 5.0


def test_no_stop_token_before_the_least_length(make_policy) -> None:
    toy = make_policy(slots=3)
    toy.generator.stop_ids = frozenset(range(0, 300, 2))
    groups = toy.generator.generate([Request([5, 6], 8)], Sampling(1.0, 9, min_tokens=5), KEY)
    lengths = {len(c.token_ids) for group in groups for c in group}
    assert min(lengths) > 5
    assert all(token % 2 for group in groups for c in group for token in c.token_ids[:5])
