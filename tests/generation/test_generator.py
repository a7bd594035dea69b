"""The generator: what it samples, what it says about it, and that nothing depends on how it is packed."""

import mlx.core as mx
import pytest

from grpo.backend.random import derive_key
from grpo.config import AdapterConfig
from grpo.generation import buffers, prefilling, shared
from grpo.generation import slots as slots_module
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.model.adapters import Adapters

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
        for here, there in zip(completion.behaviour, forced(policy, prompt, completion), strict=True)
    ]


@pytest.mark.each_value
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("slots", [64, 3, 1])
def test_logprobs_agree_with_teacher_forcing(make_policy, temperature: float, slots: int) -> None:
    toy = make_policy(temperature, slots=slots)
    groups = toy.generator.generate([Request(ids, 3) for ids in MIXED], Sampling(temperature, 12), KEY)
    found = gaps(toy.policy, MIXED, groups)
    assert len(found) > 100
    assert max(found) < 1e-4


def test_prompts_longer_than_a_prefill_chunk(make_policy, monkeypatch) -> None:
    monkeypatch.setattr(buffers, "PREFILL_CHUNK", 5)
    monkeypatch.setattr(shared, "PREFILL_TOKENS", 50)
    toy = make_policy()
    groups = toy.generator.generate([Request(ids, 2) for ids in MIXED], Sampling(1.0, 6), KEY)
    assert max(gaps(toy.policy, MIXED, groups)) < 1e-4


def test_completions_longer_than_a_width_step_and_rows_that_reuse_the_ring(make_policy, monkeypatch) -> None:
    monkeypatch.setattr(slots_module, "width_step", lambda: 4)
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
        assert len(completion.behaviour) == len(completion.token_ids)
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

    def counting(model, prompts, *places):
        seen.extend(map(list, prompts))
        return prefilling.prefill(model, prompts, *places)

    toy = make_policy(slots=3)
    monkeypatch.setattr(shared, "prefill", counting)
    toy.generator.generate([Request(ids, 5) for ids in MIXED], Sampling(1.0, 4), KEY)
    assert sorted(seen) == sorted(MIXED)


def test_without_logprobs_a_completion_has_none(make_policy) -> None:
    (completion,) = make_policy().generator.generate([Request([5, 6])], Sampling(1.0, 4), KEY, logprobs=False)[0]
    assert completion.behaviour is None


def test_every_row_and_position_has_a_draw_of_its_own(make_policy) -> None:
    toy = make_policy()
    toy.generator.stop_ids = frozenset()
    hot = Sampling(temperature=50.0, max_tokens=30)  # as good as uniform
    (group,) = toy.generator.generate([Request([5, 6], 8)], hot, KEY)
    for completion in group:
        assert len(set(completion.token_ids)) > 20
    assert len({completion.token_ids for completion in group}) == 8


def test_a_seeded_request_is_the_same_alone_and_in_a_crowd(make_policy) -> None:
    toy = make_policy(slots=3)
    seeded = Request(MIXED[0], 3, seed=17)
    ((alone),) = toy.generator.generate([seeded], Sampling(1.0, 12), KEY)
    crowd = [Request(ids, 2) for ids in MIXED]
    *_, among, _ = toy.generator.generate([*crowd, seeded, Request([3, 4])], Sampling(1.0, 12), derive_key(9, "other"))
    assert [c.token_ids for c in alone] == [c.token_ids for c in among]
    assert [c.behaviour for c in alone] == [pytest.approx(c.behaviour, abs=1e-5) for c in among]


@pytest.mark.parametrize("seed", [None, 17])
def test_neither_n_nor_later_requests_change_a_row_s_draws(make_policy, seed: int | None) -> None:
    generator, hot = make_policy(slots=3).generator, Sampling(5.0, 12)
    (few,) = generator.generate([Request(MIXED[0], 2, seed)], hot, KEY, logprobs=False)
    many, *_ = generator.generate([Request(MIXED[0], 5, seed), Request(MIXED[2], 3)], hot, KEY, logprobs=False)
    assert [c.token_ids for c in many[:2]] == [c.token_ids for c in few]
    assert len({c.token_ids for c in many}) == 5


def test_without_a_seed_draws_depend_on_the_key_and_on_the_request_s_number(make_policy) -> None:
    generator, hot = make_policy().generator, Sampling(5.0, 12)
    same = [Request(MIXED[0]), Request(MIXED[0])]
    drawn = [generator.generate(same, hot, key, logprobs=False) for key in (KEY, derive_key(0, "other"))]
    assert len({group[0].token_ids for groups in drawn for group in groups}) == 4


def test_with_a_seed_draws_depend_on_the_seed_alone(make_policy) -> None:
    generator, hot = make_policy().generator, Sampling(5.0, 12)
    requests = [Request(MIXED[0], 1, seed) for seed in (3, 3, 4)]
    (one,), (same,), (other,) = generator.generate(requests, hot, KEY, logprobs=False)
    assert one.token_ids == same.token_ids != other.token_ids


def test_one_token_prompts_alone(make_policy) -> None:
    toy = make_policy()
    groups = toy.generator.generate([Request([5], 3), Request([9], 2)], Sampling(1.0, 6), KEY)
    assert max(gaps(toy.policy, [[5], [9]], groups)) < 1e-4


@pytest.mark.parametrize("switched", [False, True])
def test_the_state_in_use_is_what_is_decoded(make_policy, switched: bool) -> None:
    """Joined weights follow the adapter when it is switched or trained between two calls."""
    toy = make_policy()
    toy.generator.generate([Request(MIXED[0])], Sampling(1.0, 4), KEY)
    if switched:
        with toy.policy.use("reference"):
            groups = toy.generator.generate([Request(ids, 2) for ids in MIXED], Sampling(1.0, 8), KEY)
            assert max(gaps(toy.policy, MIXED, groups)) < 1e-4
    state = {path: array * 0.5 for path, array in toy.policy.adapters.state().items()}
    toy.policy.adapters.load_state(state)
    groups = toy.generator.generate([Request(ids, 2) for ids in MIXED], Sampling(1.0, 8), KEY)
    assert max(gaps(toy.policy, MIXED, groups)) < 1e-4


def test_base_weights_that_change_are_followed(make_policy) -> None:
    toy = make_policy()
    toy.generator.generate([Request(MIXED[0])], Sampling(1.0, 4), KEY)
    model = toy.policy.model
    for layer in model.layers:
        layer.self_attn.q_proj.linear.weight = layer.self_attn.q_proj.linear.weight * 1.5
        layer.input_layernorm.weight = layer.input_layernorm.weight * 0.7
    groups = toy.generator.generate([Request(ids, 2) for ids in MIXED], Sampling(1.0, 8), KEY)
    assert max(gaps(toy.policy, MIXED, groups)) < 1e-4


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_between_calls_joined_weights_are_held_unless_they_train(toy, kind: str) -> None:
    """Joined anew at every call they would cost a LoRA run time; held through an update they would be there twice."""
    model, tokenizer = toy
    Adapters(model, AdapterConfig(type=kind), KEY, reference=False)
    generator = Generator(model, tokenizer, 2)
    products = generator.decoding.decoder.blocks.products
    generator.generate([Request([5, 6], 1)], Sampling(1.0, 3), KEY)
    first = [product.joined.get("weight") for product in products]
    assert all((weight is None) == (kind == "full") for weight in first)
    generator.generate([Request([5, 6], 1)], Sampling(1.0, 3), KEY)
    assert all(product.joined.get("weight") is weight for product, weight in zip(products, first, strict=True))


def test_the_policy_forward_is_the_same_after_its_weights_were_joined(toy) -> None:
    model, tokenizer = toy
    tokens = mx.array([[5, 6, 7, 8]])
    before = model(tokens)
    weights = sum(array.nbytes for array in buffers_of(model))
    mx.eval(before)
    held = mx.get_active_memory()
    Generator(model, tokenizer, 2)
    mx.clear_cache()
    assert mx.array_equal(model(tokens), before)
    assert mx.get_active_memory() - held < weights / 4  # nothing is held twice


def buffers_of(model) -> list[mx.array]:
    from mlx.utils import tree_flatten

    return [array for _, array in tree_flatten(model.parameters())]


@pytest.mark.parametrize("many", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_many_requests_through_few_slots_leak_no_memory(make_policy, many: int) -> None:
    toy = make_policy(slots=16)
    requests = [Request([1 + i % 200, 2, 3 + i % 7][: 1 + i % 3], 1) for i in range(many)]
    toy.generator.generate(requests[:50], Sampling(1.0, 6), KEY)
    mx.clear_cache()
    before = mx.get_active_memory()
    groups = toy.generator.generate(requests, Sampling(1.0, 6), KEY)
    assert len(groups) == many
    assert all(1 <= len(c.token_ids) <= 6 for group in groups for c in group)
    mx.clear_cache()
    assert mx.get_active_memory() - before < 50_000


def test_a_stream_yields_the_tokens_and_text_of_the_same_completion(make_policy) -> None:
    toy = make_policy()
    events = list(toy.generator.stream(Request(MIXED[0]), Sampling(1.0, 10), KEY))
    (completion,) = toy.generator.generate([Request(MIXED[0])], Sampling(1.0, 10), KEY)[0]
    assert "".join(event.text for event in events) == completion.text
    assert tuple(event.token_id for event in events) == completion.token_ids
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [completion.finish_reason]


def test_a_stream_that_is_left_early_holds_no_weights(make_policy, monkeypatch) -> None:
    """An update may replace them: then the old ones would stay in memory beside the new."""
    toy = make_policy()
    forgotten: list[bool] = []
    monkeypatch.setattr(toy.generator.decoding, "forget", lambda: forgotten.append(True))
    events = toy.generator.stream(Request(MIXED[0]), Sampling(50.0, 400), KEY)
    next(events)
    assert not forgotten
    events.close()
    assert forgotten


def test_a_stream_can_be_left_early_and_does_not_change_the_caller_s_stream(make_policy) -> None:
    toy = make_policy()
    before = mx.default_stream(mx.default_device())
    events = toy.generator.stream(Request(MIXED[0]), Sampling(1.0, 10), KEY)
    next(events)
    assert mx.default_stream(mx.default_device()) == before
    events.close()
    assert toy.generator.generate([Request(MIXED[0])], Sampling(1.0, 3), KEY)


def test_bf16_decoding_is_as_near_to_teacher_forcing_as_rounding_allows(make_policy) -> None:
    from statistics import fmean

    from mlx.utils import tree_map

    toy = make_policy()
    model = toy.policy.model
    model.update(tree_map(lambda a: a.astype(mx.bfloat16), model.parameters()))
    generator = Generator(model, toy.tokenizer, 4)
    groups = generator.generate([Request(ids, 2) for ids in MIXED], Sampling(1.0, 6), KEY)
    assert fmean(gaps(toy.policy, MIXED, groups)) < 1e-2


def test_nothing_asked_for_is_nothing_given(make_policy) -> None:
    generator = make_policy().generator
    assert generator.generate([], Sampling(), KEY) == []
    assert generator.generate([Request([5], 0)], Sampling(), KEY) == [[]]
