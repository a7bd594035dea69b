"""`grpo bench rollout --lengths`: both sides sample rows of the same lengths, with fewer slots than rows."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest

from grpo.benchmark import forced, rollout
from grpo.benchmark.distributions import draw_lengths
from grpo.benchmark.models import model_for
from grpo.benchmark.setting import Setting
from grpo.errors import RunError, UserError
from grpo.generation.sampling import Sampling
from grpo.model.mlxlm import BatchGenerator

VARIED = Setting("qwen3-tiny", prompts=3, completions=2, prompt_length=4, completion_length=9, runs=1,
                 lengths="exponential:3", slots=4)  # fmt: skip


@pytest.mark.parametrize("kind", ["exponential", "log-normal"])
def test_lengths_have_the_mean_that_was_asked_for(kind: str) -> None:
    lengths = draw_lengths(f"{kind}:32", 20_000, limit=10_000)
    assert fmean(lengths) == pytest.approx(32.5, rel=0.03)  # rounded up
    assert lengths == draw_lengths(f"{kind}:32", 20_000, limit=10_000)


def test_lengths_are_cut_off_at_the_limit_and_never_empty() -> None:
    lengths = draw_lengths("exponential:8", 1000, limit=10)
    assert min(lengths) == 1
    assert max(lengths) == 10
    assert draw_lengths("fixed", 3, limit=10) == [10, 10, 10]


@pytest.mark.parametrize("lengths", ["exponential", "exponential:0", "exponential:x", "normal:3", "log-normal:nan", ""])
def test_words_that_are_no_lengths_are_refused(lengths: str) -> None:
    with pytest.raises(UserError, match=r"expected fixed, exponential:MEAN, log-normal:MEAN"):
        draw_lengths(lengths, 1, 1)


def test_a_setting_counts_the_tokens_that_are_sampled() -> None:
    assert VARIED.tokens == sum(VARIED.completion_lengths) < VARIED.rows * VARIED.completion_length
    assert (VARIED.at_once, replace(VARIED, slots=None).at_once, replace(VARIED, slots=99).at_once) == (4, 6, 6)
    assert str(VARIED) == "qwen3-tiny 3x2 4+9 (exponential:3), 4 slots"


def test_our_rows_stop_where_they_are_told_to() -> None:
    model, lengths = model_for(VARIED), VARIED.completion_lengths
    generator = rollout.untold(model, VARIED.at_once)
    rows = forced.sample(generator, rollout.requests_of(VARIED, model), lengths, Sampling(max_tokens=9), logprobs=True)
    assert [len(row.token_ids) for row in rows] == [len(row.logprobs) for row in rows] == lengths
    assert {row.finish_reason for row in rows} == {"stop"}
    assert len(set(lengths)) > 1


def test_rows_that_cannot_be_as_long_as_they_were_told_are_refused() -> None:
    model = model_for(VARIED)
    generator = rollout.untold(model, VARIED.at_once)
    with pytest.raises(RunError, match="has not sampled the requested lengths"):
        forced.sample(generator, rollout.requests_of(VARIED, model), [2] * 6, Sampling(max_tokens=1), logprobs=False)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("peer_slots", [None, 3])
def test_mlx_lm_samples_the_same_lengths(peer_slots: int | None, once: bool) -> None:
    setting = replace(VARIED, peer_slots=peer_slots, peer_prompts_once=once)
    lengths = setting.completion_lengths
    logprobs = rollout._batch_generate(model_for(setting), setting.draw(256), lengths, setting)
    assert [len(row) for row in logprobs] == lengths


def test_mlx_lm_gets_prompts_that_were_computed_once(monkeypatch) -> None:
    given: list[tuple[list[list[int]], Any]] = []
    insert = BatchGenerator.insert

    def spy(self, prompts, max_tokens=None, caches=None):
        given.append((prompts, caches and [cache[0].offset for cache in caches]))
        return insert(self, prompts, max_tokens, caches)

    monkeypatch.setattr(BatchGenerator, "insert", spy)
    prompts = VARIED.draw(256)
    for setting in (VARIED, replace(VARIED, peer_prompts_once=True)):
        rollout._batch_generate(model_for(setting), prompts, setting.completion_lengths, setting)
    rows = [ids for ids in prompts for _ in range(2)]
    assert given == [(rows, None), ([ids[-1:] for ids in rows], [3] * 6)]


def test_mlx_lm_s_settings_are_those_that_were_asked_for(monkeypatch) -> None:
    asked: list[dict[str, object]] = []

    def spy(*args, **kwargs):
        asked.append(kwargs)
        return BatchGenerator(*args, **kwargs)

    monkeypatch.setattr(rollout, "BatchGenerator", spy)
    for setting in (VARIED, replace(VARIED, peer_slots=2)):
        rollout._batch_generate(model_for(setting), setting.draw(256), setting.completion_lengths, setting)
    assert [one["completion_batch_size"] for one in asked] == [4, 2]


def test_both_sides_count_the_tokens_that_they_sample_and_ours_has_the_slots(monkeypatch) -> None:
    counted: list[int] = []
    slots: list[int] = []
    untold = rollout.untold
    monkeypatch.setattr(rollout, "timed", lambda _, tokens: counted.append(tokens) or {"tok/s": 1.0})
    monkeypatch.setattr(rollout, "untold", lambda model, at_once: slots.append(at_once) or untold(model, at_once))
    rollout.against_mlx_lm(VARIED)
    assert set(counted) == {VARIED.tokens}
    assert slots == [4]


def test_sides_are_measured_by_the_tokens_that_they_sampled(run_cli) -> None:
    options = ["--prompts", 3, "--completions", 2, "--prompt-length", 4, "--completion-length", 9, "--slots", 4]
    ran = run_cli("bench", "rollout", "--shape", "qwen3-tiny", *options, "--lengths", "exponential:3", "--runs", 1)
    assert ran.code == 0, ran.err
    assert str(VARIED) in ran.out
    refused = run_cli("bench", "rollout", "--shape", "qwen3-tiny", *options, "--lengths", "short", "--runs", 1)
    assert refused.code == 2
    assert "--lengths short" in refused.err
