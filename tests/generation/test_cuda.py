"""The CUDA kernels against stock operations, and decoding by them against teacher forcing. Needs a CUDA device."""

import math
from statistics import fmean

import mlx.core as mx
import pytest

from grpo.backend import cuda
from grpo.backend.device import setup
from grpo.backend.random import derive_key
from grpo.generation.filters import cut, repetition_penalised, threshold
from grpo.generation.generator import Generator, Request
from grpo.generation.rows import Submission
from grpo.generation.sampling import Sampling
from grpo.model.drawn import NoTokenizer, random_model, trained_adapters
from grpo.model.logprobs import scaled, token_logprobs

pytestmark = pytest.mark.skipif(not cuda.available(), reason="no CUDA device")

if cuda.available():
    from grpo.generation import cuda_sampling

KEY = derive_key(0, "test")
ROWS, VOCABULARY = 16, 5000


def shaped(values: mx.array, seen: mx.array, stops: mx.array, temperature: float, penalty: float) -> mx.array:
    logits = repetition_penalised(values.astype(mx.float32), seen, penalty) / temperature
    return mx.where(stops[None], -math.inf, logits)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("filters", [(50, 1.0, 0.0), (0, 0.9, 0.0), (40, 0.8, 0.05), (0, 1.0, 0.1), (1, 1.0, 0.0)])
def test_thresholds_and_logprobs_are_those_of_stock_operations(dtype: mx.Dtype, filters) -> None:
    values = (2 * mx.random.normal((ROWS, VOCABULARY), key=KEY)).astype(dtype)
    seen = mx.random.uniform(shape=(ROWS, VOCABULARY), key=KEY) < 0.1
    stops = mx.zeros(VOCABULARY, mx.bool_)
    stops[7] = True
    decoded = mx.zeros(ROWS, mx.int32)
    logits = cuda_sampling.Logits(values, 0.7, decoded, stops, 1, seen, 1.3)
    reference = shaped(values, seen, stops, 0.7, 1.3)
    lowest = cuda_sampling.threshold(logits, *filters)
    # A share that reaches p within rounding may keep one token more or less.
    kept, wanted = (reference >= lowest).sum(axis=-1), (reference >= threshold(reference, *filters)).sum(axis=-1)
    assert mx.abs(kept - wanted).max().item() <= max(1, 0.02 * wanted.max().item())
    keys = mx.random.split(KEY, ROWS)
    tokens, logprobs, sampler_logprobs = cuda_sampling.draw(logits, lowest, keys, True)
    assert mx.allclose(logprobs, token_logprobs(scaled(values, 0.7), tokens), atol=1e-5)
    assert mx.allclose(sampler_logprobs, token_logprobs(cut(reference, lowest), tokens), atol=1e-5)
    assert (tokens != 7).all().item()


def test_draws_follow_the_distribution() -> None:
    logits, rows = mx.array([1.0, 0.0, -1.0, 2.0, 0.5]), 100_000
    values = mx.broadcast_to(logits, (rows, 5)) + 0
    settings = cuda_sampling.Logits(values, 0.8, mx.arange(rows).astype(mx.int32), mx.zeros(5, mx.bool_))
    keys = mx.broadcast_to(mx.array([[1, 2]], mx.uint32), (rows, 2)) + 0  # the step alone tells rows apart
    tokens, _, _ = cuda_sampling.draw(settings, None, keys, False)
    expected = mx.softmax(logits / 0.8) * rows
    counts = (tokens[:, None] == mx.arange(5)[None]).sum(axis=0)
    assert ((counts - expected) ** 2 / expected).sum().item() < 18.5


@pytest.mark.parametrize("slots", [64, 5])
def test_decoding_by_kernels_is_teacher_forcing_to_rounding(slots: int) -> None:
    setup()
    model = random_model("qwen3-25m")
    trained_adapters(model)
    generator = Generator(model, NoTokenizer(), slots)
    assert generator.decoding.description == "joined layers, shared prompts, CUDA kernels"
    prompts = [list(range(5, 105)), [7], list(range(200, 233))]
    groups = generator.generate([Request(ids, 4) for ids in prompts], Sampling(max_tokens=40), KEY)
    gaps: list[float] = []
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            tokens = mx.array([[*prompt, *completion.token_ids]])
            logits = scaled(model(tokens[:, :-1])[0, len(prompt) - 1 :], 1.0)
            forced = token_logprobs(logits, tokens[0, len(prompt) :])
            gaps += mx.abs(forced - mx.array(completion.behaviour)).tolist()
    assert fmean(gaps) < 1e-2  # bfloat16


def test_extended_rows_are_teacher_forcing_to_rounding_while_others_decode() -> None:
    """Rows come and go, their rings wrap, and what they keep is put back among steps that are launched ahead."""
    setup()
    model = random_model("qwen3-25m")
    trained_adapters(model)
    generator = Generator(model, NoTokenizer(), 4)
    generator.stop_ids = frozenset(range(0, 150_000, 16))
    engine = generator.open()
    prompts = [tuple(range(5, 105)), (7,), tuple(range(200, 233))]
    sampling = Sampling(max_tokens=120)
    submissions = {ids: Submission(ids, sampling, seed, n=3, keep=True) for seed, ids in enumerate(prompts)}
    rows = {row: ids for ids, submission in submissions.items() for row in engine.submit(submission)}
    while engine.busy:
        for row in engine.step().ended:
            if row.room >= 7 and len(row.injected) < 4:
                engine.extend(row, [33, 35, 37, 39, 41, 43, 45])
    assert any(len(row.injected) > 1 for row in rows)
    gaps: list[float] = []
    for row, prompt in rows.items():
        tokens = mx.array([[*prompt, *row.token_ids]])
        logits = scaled(model(tokens[:, :-1])[0, len(prompt) - 1 :], 1.0)
        apart = mx.abs(token_logprobs(logits, tokens[0, len(prompt) :]) - mx.array(row.logprobs)).tolist()
        gaps += [gap for gap, trained in zip(apart, row.trained, strict=True) if trained]
    assert fmean(gaps) < 1e-2  # bfloat16
