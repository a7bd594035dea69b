"""`grpo bench rollout`, `sampling`, `length` and `context` at the smallest sizes: what they measure and refuse."""

import json

import pytest

from grpo.backend import blas
from grpo.benchmark import decoding, peer, rollout
from grpo.benchmark.protocol import Row
from grpo.benchmark.rollout import Load
from grpo.errors import RunError, UserError

TINY = Load(2, 2, 3, 4)
SHAPE = "qwen3-1m"


def test_both_sides_sample_the_same_prompts_and_lengths() -> None:
    model = rollout.model_for(SHAPE, lora=True)
    prompts = TINY.draw(2048)
    assert [len(ids) for ids in prompts] == [3, 3]
    assert prompts == TINY.draw(2048)
    theirs = rollout._batch_generate(model, [ids for ids in prompts for _ in range(2)], TINY)
    assert [len(logprobs) for logprobs in theirs] == [4] * 4
    assert all(-30 < logprob < 0 for logprobs in theirs for logprob in logprobs)


@pytest.mark.parametrize("load", [TINY, Load(1, 1, 3, 4)], ids=str)
def test_the_generator_is_held_against_mlx_lm_s(load: Load) -> None:
    rows = rollout.against_mlx_lm(SHAPE, load, lora=True, runs=2)
    assert [(row.side, row.unit) for row in rows] == [
        ("mlx-lm", "tok/s"), ("mlx-lm", "GB"), ("grpo", "tok/s"), ("grpo", "GB"),
    ]  # fmt: skip
    assert rows[2].ratio == pytest.approx(rows[2].mean / rows[0].mean)
    assert rows[3].ratio == pytest.approx(rows[1].mean / rows[3].mean)
    assert {len(row.runs) for row in rows} == {2}


def test_a_peer_that_samples_less_is_not_measured(monkeypatch) -> None:
    from mlx_lm.generate import BatchGenerator

    monkeypatch.setattr(BatchGenerator, "next_generated", lambda _: [])
    with pytest.raises(RunError, match="has not sampled what it was asked for"):
        rollout._batch_generate(rollout.model_for(SHAPE, lora=False), [[5, 6]], Load(1, 1, 2, 4))


@pytest.mark.skipif(not blas.loaded(), reason="grpo has loaded no BLAS here")
def test_mlx_lm_on_its_wheel_s_blas_runs_in_a_process_of_its_own() -> None:
    rows = peer.against_wheel(SHAPE, Load(1, 1, 2, 2), lora=False, runs=1)
    assert [row.side for row in rows[::2]] == ["mlx-lm, its wheel's BLAS", "grpo"]
    assert all(row.mean > 0 for row in rows)


def test_without_a_blas_of_our_own_there_is_nothing_to_tell_apart(monkeypatch) -> None:
    monkeypatch.setattr(blas, "loaded", lambda: False)
    with pytest.raises(UserError, match="--wheel-blas would change nothing here"):
        peer.against_wheel(SHAPE, TINY, lora=False, runs=1)


def test_each_filter_is_held_against_plain_sampling() -> None:
    rows = [row for row in decoding.sampling_costs(SHAPE, TINY, False, 1) if row.unit == "tok/s"]
    assert [row.side for row in rows] == ["plain", "no logprobs", *decoding.FILTERS]
    assert rows[0].ratio is None
    assert all(row.ratio for row in rows[1:])


def test_a_step_s_time_by_the_completion_s_length(monkeypatch) -> None:
    monkeypatch.setattr(decoding, "LENGTHS", (3, 6))
    rows = decoding.length_costs(SHAPE, TINY, False, 1)
    assert [(row.side, row.unit) for row in rows] == [("3 tokens", "ms"), ("6 tokens", "ms")]


def test_a_cliff_is_found_between_near_lengths_only() -> None:
    def row(length: int, ms: float) -> Row:
        return Row("case", f"{length} tokens", "ms", ms, 0.0, (ms, ms * 2), ms, None)

    assert decoding.cliffs([row(64, 1.0), row(127, 2.0), row(128, 2.1), row(129, 3.0)]) == [
        "128 tokens → 129 tokens: 2.10 → 3.00 ms"
    ]


def test_the_commands_print_rows_and_write_them(run_cli, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(decoding, "CONTEXTS", (2, 3))
    sizes = ["--prompts", 2, "--completions", 1, "--prompt-length", 2, "--completion-length", 2, "--runs", 1]
    ran = run_cli("bench", "rollout", *sizes, "--json", tmp_path / "out.json")
    assert ran.code == 0, ran.err
    assert "mlx-lm" in ran.out
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["side"] for row in rows} == {"mlx-lm", "grpo"}
    ran = run_cli("bench", "context", "--runs", 1)
    assert ran.code == 0, ran.err
    assert "3 tokens" in ran.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "nope"], "no shape 'nope'"),
        (["--shape", "nope", "--wheel-blas"], "no shape 'nope'"),
        (["--json", "/nowhere/at/all.json"], "cannot be written"),
    ],
)
def test_mistakes_are_said_before_anything_is_measured(run_cli, arguments: list[str], said: str) -> None:
    ran = run_cli("bench", "rollout", *arguments)
    assert ran.code == 2
    assert said in " ".join(ran.err.split())
    assert "Traceback" not in ran.err
