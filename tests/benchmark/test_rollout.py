"""`grpo bench rollout`: both sides do the same work, and one that does less is refused."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from grpo.backend import blas
from grpo.benchmark import peer, rollout
from grpo.benchmark.models import model_for
from grpo.benchmark.setting import Setting
from grpo.errors import RunError, UserError

TINY = Setting("qwen3-tiny", prompts=2, completions=2, prompt_length=3, completion_length=4, runs=2)
OURS = Path(__file__).parents[2] / "scripts/benchmarks/bounds.toml"
ALONE = Setting("qwen3-tiny", lora=False, prompt_length=2, completion_length=4)


def test_both_sides_sample_the_same_prompts_and_lengths() -> None:
    prompts = TINY.draw(256)
    assert [len(ids) for ids in prompts] == [3, 3]
    assert prompts == TINY.draw(256)
    theirs = rollout._batch_generate(model_for(TINY), prompts, [4] * 4, TINY)
    assert [len(logprobs) for logprobs in theirs] == [4] * 4
    assert all(-30 < logprob < 0 for logprobs in theirs for logprob in logprobs)


@pytest.mark.parametrize("setting", [TINY, ALONE], ids=["rows", "one row"])
def test_the_generator_is_held_against_mlx_lm_s(setting: Setting) -> None:
    rows = rollout.against_mlx_lm(setting)
    assert [(row.side, row.unit) for row in rows] == [
        ("mlx-lm", "tok/s"), ("mlx-lm", "GB"), ("grpo", "tok/s"), ("grpo", "GB"),
    ]  # fmt: skip
    assert rows[2].ratios == tuple(a / b for a, b in zip(rows[2].runs, rows[0].runs, strict=True))
    assert rows[3].ratios == tuple(b / a for a, b in zip(rows[3].runs, rows[1].runs, strict=True))
    assert {len(row.runs) for row in rows} == {setting.runs}


def test_mlx_lm_can_be_left_out() -> None:
    assert [(row.side, row.unit) for row in rollout.by_itself(TINY)] == [("grpo", "tok/s"), ("grpo", "GB")]


def test_one_row_is_mlx_lm_s_own_loop_in_its_own_process_too(monkeypatch) -> None:
    def no_batches(*_: object) -> None:
        raise AssertionError("a batch of one row is not what mlx-lm would do")

    monkeypatch.setattr(rollout, "mlx_lm_batched", no_batches)
    monkeypatch.setattr("sys.argv", ["peer", json.dumps(asdict(ALONE))])
    monkeypatch.setattr("sys.stdin", ["run\n"])
    peer.main()


def test_a_peer_that_samples_less_is_not_measured(monkeypatch) -> None:
    from mlx_lm.generate import BatchGenerator

    monkeypatch.setattr(BatchGenerator, "next_generated", lambda _: [])
    with pytest.raises(RunError, match="has not sampled the requested lengths"):
        rollout._batch_generate(model_for(ALONE), [[5, 6]], [4], ALONE)


@pytest.mark.skipif(not blas.loaded(), reason="grpo has loaded no BLAS here")
def test_mlx_lm_on_its_wheel_s_blas_runs_in_a_process_of_its_own() -> None:
    rows = peer.against_wheel(ALONE)
    assert [row.side for row in rows if row.unit == "tok/s"] == ["mlx-lm, its wheel's BLAS", "grpo"]
    assert all(row.mean > 0 for row in rows)


def test_without_a_blas_of_our_own_there_is_nothing_to_tell_apart(monkeypatch) -> None:
    monkeypatch.setattr(blas, "loaded", lambda: False)
    with pytest.raises(UserError, match="--wheel-blas would change nothing here"):
        peer.against_wheel(TINY)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "nope"], "no shape 'nope'"),
        (["--shape", "nope", "--wheel-blas"], "no shape 'nope'"),
        (["--model", "./nope"], "there is no such folder"),
        (["--json", "/nowhere/at/all.json"], "cannot be written"),
        (["--check", OURS, "--runs", 1], "--runs 5"),
        (["--check", "nope.toml"], "nope.toml: cannot be read"),
        (["--alone", "--wheel-blas"], "--alone: mlx-lm is not measured"),
        (["--alone", "--peer-slots", 3], "--alone: mlx-lm is not measured"),
        (["--check", OURS, "--shape", "qwen3-tiny"], "no bound applies to `bench rollout`"),
    ],
)
def test_mistakes_are_said_before_anything_is_measured(run_cli, arguments: list[str], said: str) -> None:
    ran = run_cli("bench", "rollout", *arguments)
    assert ran.code == 2
    assert said in " ".join(ran.err.split())
    assert "Traceback" not in ran.err
