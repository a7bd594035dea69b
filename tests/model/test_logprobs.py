"""Logprobs and entropies: exact, chunked, and without full logits."""

import math

import mlx.core as mx
import pytest

from grpo.model.head import Unsplit, split_head
from grpo.model.logprobs import LOGITS, chunk_tokens, chunked_logprobs, logprobs_and_entropies, scaled, token_logprobs


def test_by_hand() -> None:
    logits = mx.log(mx.array([[0.5, 0.25, 0.25]]))
    assert token_logprobs(logits, mx.array([1])).item() == pytest.approx(math.log(0.25), abs=1e-6)
    chosen, entropy = logprobs_and_entropies(logits, mx.array([1]))
    assert chosen.item() == pytest.approx(math.log(0.25), abs=1e-6)
    assert entropy.item() == pytest.approx(1.5 * math.log(2), abs=1e-6)


def test_temperature_comes_before_the_softmax_and_in_fp32() -> None:
    logits = mx.array([[1.0, 3.0]], mx.float16)
    rows = scaled(logits, 2.0)
    assert rows.dtype == mx.float32
    assert token_logprobs(rows, mx.array([0])).item() == pytest.approx(-math.log(1 + math.e), abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_change_neither_values_nor_gradients(chunk: int) -> None:
    hidden, weight = mx.random.normal((2, 5, 8)), mx.random.normal((8, 11))
    tokens = mx.random.randint(0, 11, (2, 5))

    def whole(hidden):
        return token_logprobs(scaled(hidden @ weight, 0.7), tokens)

    def in_chunks(hidden):
        return chunked_logprobs(hidden, tokens, lambda h: h @ weight, 0.7, chunk)

    got, entropy = in_chunks(hidden)
    assert mx.allclose(got, whole(hidden), atol=1e-6)
    assert mx.allclose(entropy, logprobs_and_entropies(scaled(hidden @ weight, 0.7), tokens)[1], atol=1e-6)
    expected = mx.grad(lambda h: (whole(h) ** 2).sum())(hidden)
    assert mx.allclose(mx.grad(lambda h: (in_chunks(h)[0] ** 2).sum())(hidden), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["tied", "untied", "quantised", "gemma2", "gemma3_text", "cohere", "granite", "llama"])
def test_body_and_head_make_the_model(zoo, kind: str) -> None:
    model = zoo(kind)
    tokens = mx.array([[5, 6, 7], [8, 9, 10]])
    body, head = split_head(model)
    assert mx.allclose(head(body(tokens)), model(tokens), atol=1e-6)
    assert mx.allclose(head(body(tokens)[0]), model(tokens)[0], atol=1e-5)  # of any number of axes


def test_a_head_that_reads_the_tokens_is_not_split(toy) -> None:
    model, _ = toy
    plain = type(model).__call__
    kind = type("Odd", (type(model),), {"__call__": lambda self, x, *a, **k: plain(self, x) * x.sum()})
    model.__class__ = kind
    with pytest.raises(Unsplit, match="give other logits than the model"):
        split_head(model)


def test_a_model_that_cannot_be_split_gives_the_same_logprobs(make_policy) -> None:
    policy = make_policy(temperature=0.8).policy
    tokens, lengths = mx.array([[5, 6, 7, 8, 9, 0], [5, 6, 7, 8, 9, 10]]), mx.array([2, 3])
    ids = mx.array([[7, 8, 9], [8, 9, 10]])
    split, whole = policy.logprobs(tokens, lengths, ids), None
    policy.split = None
    whole = policy.logprobs(tokens, lengths, ids)
    assert mx.allclose(split[0], whole[0], atol=1e-5)
    assert mx.allclose(split[1], whole[1], atol=1e-5)


def test_padding_on_the_right_changes_nothing(make_policy) -> None:
    policy = make_policy().policy
    alone, _ = policy.logprobs(mx.array([[5, 6, 7, 8]]), mx.array([2]), mx.array([[7, 8]]))
    padded, _ = policy.logprobs(mx.array([[5, 6, 7, 8, 3, 3, 3]]), mx.array([2]), mx.array([[7, 8, 0, 0]]))
    assert mx.allclose(alone, padded[:, :2], atol=1e-5)
    assert mx.isfinite(padded).all().item()


def peak_of_the_loss(vocabulary: int, logits: int) -> int:
    """Bytes that the loss of 2,048 tokens takes in both passes, beside the head's weights and its inputs."""
    hidden, weight = mx.random.normal((2, 1024, 16)), mx.random.normal((16, vocabulary))
    tokens, chunk = mx.zeros((2, 1024), mx.int32), chunk_tokens(vocabulary, logits)

    def loss(states: mx.array) -> mx.array:
        return chunked_logprobs(states, tokens, lambda h: h @ weight, 1.0, chunk)[0].sum()

    mx.eval(hidden, weight, tokens)
    resting = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.value_and_grad(loss)(hidden))
    return mx.get_peak_memory() - resting


@pytest.mark.parametrize(
    ("gpu", "vocabulary", "tokens"),
    [(False, 2048, 256), (False, 6144, 80), (False, 151936, 32), (True, 2048, 1024), (True, 151936, 208)],
)
def test_a_chunk_has_as_many_tokens_as_the_machine_takes_well(gpu, vocabulary, tokens) -> None:
    assert chunk_tokens(vocabulary, LOGITS[gpu]) == tokens


@pytest.mark.slow
def test_memory_of_the_loss_is_flat_in_the_vocabulary() -> None:
    most = 2**23  # more than `LEAST` tokens of any of them
    peaks = [peak_of_the_loss(vocabulary, most) for vocabulary in (1_000, 20_000, 150_000)]
    assert all(peak < 15 * 4 * most for peak in peaks)  # 150,000 × 2,048 logits alone would be 1.2 GB
    assert peaks[2] < 1.1 * peaks[1]
