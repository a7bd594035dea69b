"""The generator: what it samples, what it says about it, and that nothing depends on how it is packed."""

import mlx.core as mx
import pytest

from grpo.backend.random import derive_key
from grpo.errors import UserError
from grpo.generation import cache, generator
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling, sample

MIXED = [[5, 6, 7, 8, 9], [11], [20, 21], list(range(30, 72)), [9, 8, 7, 6]]
KEY = derive_key(0, "test")


def forced(policy, prompt, completion) -> list[float]:
    """The trainer's logprobs of a completion, row by row."""
    tokens = mx.array([[*prompt, *completion.token_ids]])
    logprobs, _ = policy.logprobs(tokens, mx.array([len(prompt)]), mx.array([completion.token_ids]))
    return logprobs[0].tolist()


def gaps(policy, prompts, groups) -> list[float]:
    return [
        abs(here - there)
        for prompt, group in zip(prompts, groups, strict=True)
        for completion in group
        for here, there in zip(completion.logprobs, forced(policy, prompt, completion), strict=True)
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("slots", [64, 3, 1])
def test_logprobs_agree_with_teacher_forcing(make_policy, temperature: float, slots: int) -> None:
    toy = make_policy(temperature, slots=slots)
    groups = toy.generator.generate([Request(ids, 3) for ids in MIXED], Sampling(temperature, 12), KEY)
    found = gaps(toy.policy, MIXED, groups)
    assert len(found) > 100
    assert max(found) < 1e-4


def test_prompts_longer_than_a_prefill_chunk(make_policy, monkeypatch) -> None:
    monkeypatch.setattr(cache, "PREFILL_CHUNK", 5)
    monkeypatch.setattr(generator, "PREFILL_TOKENS", 50)
    toy = make_policy()
    groups = toy.generator.generate([Request(ids, 2) for ids in MIXED], Sampling(1.0, 6), KEY)
    assert max(gaps(toy.policy, MIXED, groups)) < 1e-4


def test_completions_longer_than_a_width_step_and_rows_that_reuse_the_ring(make_policy, monkeypatch) -> None:
    monkeypatch.setattr(cache, "WIDTH_STEP", 4)
    toy = make_policy(slots=2)
    groups = toy.generator.generate([Request(ids, 3) for ids in MIXED], Sampling(1.0, 9), KEY)
    assert max(gaps(toy.policy, MIXED, groups)) < 1e-4


def test_results_do_not_depend_on_slots_or_company(make_policy) -> None:
    requests = [Request(ids, 3) for ids in MIXED]
    everything = [make_policy(slots=slots).generator.generate(requests, Sampling(1.0, 10), KEY) for slots in (64, 4, 1)]
    ids = [[[c.token_ids for c in group] for group in groups] for groups in everything]
    assert ids[0] == ids[1] == ids[2]
    assert len({c for group in ids[0] for c in group}) > 10  # and they are samples, not copies


def test_greedy_is_what_mlx_lm_generates(make_policy) -> None:
    from mlx_lm.generate import generate_step

    toy = make_policy()
    groups = toy.generator.generate([Request(ids) for ids in MIXED], Sampling(0.0, 15), KEY, logprobs=False)
    for prompt, (completion,) in zip(MIXED, groups, strict=True):
        theirs = []
        for token, _ in generate_step(mx.array(prompt), toy.policy.model, max_tokens=15):
            theirs.append(int(token))
            if theirs[-1] in toy.generator.stop_ids:
                break
        assert list(completion.token_ids) == theirs


def stopping(toy) -> Generator:
    """The toy's generator with half of its vocabulary as stop tokens."""
    toy.generator.stop_ids = frozenset(range(0, 300, 2))
    return toy.generator


def test_the_stop_token_is_kept_with_its_logprob(make_policy) -> None:
    toy = make_policy()
    groups = stopping(toy).generate([Request(ids, 8) for ids in MIXED], Sampling(1.0, 4), KEY)
    completions = [completion for group in groups for completion in group]
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        *inner, last = completion.token_ids
        assert all(token % 2 for token in inner)
        assert (last % 2 == 0) == (completion.finish_reason == "stop")
        assert len(completion.logprobs) == len(completion.token_ids)
        shown = inner if completion.finish_reason == "stop" else completion.token_ids
        assert completion.text == toy.tokenizer.decode(list(shown), skip_special_tokens=True)
    assert max(gaps(toy.policy, MIXED, groups)) < 1e-4


def test_all_rows_stop_at_once(make_policy) -> None:
    toy = make_policy()
    toy.generator.stop_ids = frozenset(range(300))
    groups = toy.generator.generate([Request(ids, 4) for ids in MIXED], Sampling(1.0, 4), KEY)
    assert {len(c.token_ids) for group in groups for c in group} == {1}


def test_each_prompt_is_prefilled_once(make_policy, monkeypatch) -> None:
    seen: list[list[int]] = []

    def counting(model, prompts, width):
        seen.extend(map(list, prompts))
        return cache.prefill(model, prompts, width)

    monkeypatch.setattr(generator, "prefill", counting)
    make_policy(slots=3).generator.generate([Request(ids, 5) for ids in MIXED], Sampling(1.0, 4), KEY)
    assert sorted(seen) == sorted(MIXED)


def test_without_logprobs_none_are_computed(make_policy, tmp_path) -> None:
    logits = mx.random.normal((4, 50))
    keys = mx.random.split(KEY, 4)
    graphs = {}
    for wanted in (True, False):
        path = tmp_path / f"{wanted}.dot"
        tokens, logprobs = sample(logits, keys, 1.0, wanted)
        mx.export_to_dot(str(path), *[array for array in (tokens, logprobs) if array is not None])
        graphs[wanted] = path.read_text()
    assert "LogSumExp" in graphs[True]
    assert "LogSumExp" not in graphs[False]
    (completion,) = make_policy().generator.generate([Request([5, 6])], Sampling(1.0, 4), KEY, logprobs=False)[0]
    assert completion.logprobs is None


def test_every_position_has_a_draw_of_its_own(make_policy) -> None:
    """With the model's opinion taken away, rows and positions do not repeat each other."""
    toy = make_policy()
    toy.generator.model = Flat(toy.policy.model)
    toy.generator.stop_ids = frozenset()
    (group,) = toy.generator.generate([Request([5, 6], 8)], Sampling(1.0, 30), KEY)
    for completion in group:
        assert len(set(completion.token_ids)) > 20
    assert len({completion.token_ids for completion in group}) == 8


class Flat:
    """A model whose logits are all equal."""

    def __init__(self, model) -> None:
        self.model, self.layers = model, model.layers

    def __call__(self, tokens, cache):
        return 0 * self.model(tokens, cache=cache)


def test_sampling_follows_the_distribution() -> None:
    logits = mx.array([1.0, 0.0, -1.0, 2.0, 0.5])
    rows, temperature = 20_000, 0.8
    tokens, _ = sample(mx.broadcast_to(logits, (rows, 5)), mx.random.split(KEY, rows), temperature, False)
    expected = mx.softmax(logits / temperature) * rows
    counts = (tokens[:, None] == mx.arange(5)[None]).sum(axis=0)
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_squared < 18.5  # 4 degrees of freedom: exceeded by chance once in a thousand keys


def test_stream_yields_the_text_of_the_same_completion(make_policy) -> None:
    toy = make_policy()
    pieces = list(toy.generator.stream(MIXED[0], Sampling(1.0, 10), KEY))
    (completion,) = toy.generator.generate([Request(MIXED[0])], Sampling(1.0, 10), KEY)[0]
    assert "".join(pieces) == completion.text
    assert len(pieces) > 2


def test_a_model_with_another_cache_is_refused(toy) -> None:
    from mlx_lm.models.cache import RotatingKVCache

    model, tokenizer = toy
    model.make_cache = lambda: [RotatingKVCache(8) for _ in model.layers]
    with pytest.raises(UserError, match="RotatingKVCache"):
        Generator(model, tokenizer, 4)
