"""Every `grpo bench` command at the smallest sizes: what it measures, of random weights and of a real model."""

import inspect
import json
import math
import sys

import mlx.core as mx
import pytest

from grpo.benchmark import lengths, roofline, scale, streaming
from grpo.benchmark.breakdown import shares, watched
from grpo.benchmark.commands import app
from grpo.benchmark.lengths import growth
from grpo.benchmark.models import model_for
from grpo.benchmark.protocol import Measurement
from grpo.benchmark.resident import RESIDENT
from grpo.benchmark.sampling import FILTERS
from grpo.benchmark.setting import Setting
from grpo.model.costs import Demand
from grpo.model.drawn import SHAPES, config_of
from grpo.model.outline import costs_of, costs_of_config

LOAD = ["--prompts", 1, "--completions", 2, "--prompt-length", 3, "--completion-length", 3]
ROWS = {
    "rollout": (LOAD, {"mlx-lm", "grpo"}, {"tok/s", "GB"}),
    "train": (LOAD, {"grpo"}, {"s", "s rollout", "s reward", "s logprobs", "s update", "s other", "GB", RESIDENT}),
    "overlap": (
        [*LOAD, "--seconds", 0],
        {"scored after all", "scored while others decode", "without the reward's time", "the reward's time"},
        {"s"},
    ),
    "waiting": (
        [*LOAD, "--seconds", 0.01, "--turns", 2],
        {"a barrier each turn", "nobody waits", "the longest row alone"},
        {"s"},
    ),
    "serve": (
        ["--shape", "qwen3-1m", "--prompt-length", 20, "--completion-length", 3, "--clients", "1,2", "--alone"],
        {"generator alone", "grpo serve", "grpo serve, streamed"},
        {"tok/s"},
    ),
    "sampling": (LOAD, {"plain", *FILTERS}, {"tok/s", "GB"}),
    "logprobs": (LOAD, {"without", "with logprobs"}, {"tok/s", "GB"}),
    "head": ([*LOAD, "--dtype", "bfloat16"], {"model", "float32"}, {"tok/s", "s", "GB", "GB planned"}),
    "length": (LOAD[:-2], {"3 tokens", "6 tokens"}, {"ms"}),
    "context": ([], {"10 tokens", "11 tokens", "30 tokens", "10 → 11 tokens"}, {"ms", lengths.GROWTH}),
    "ops": (
        [*LOAD, "--shape", "qwen3-moe-2m"],
        {"SwiGLU", "norm", "attention, decoding", "attention, one prompt", "matmul, MLP", "matmul, head", "experts"},
        {"ms build", "ms run"},
    ),
    "breakdown": (
        LOAD,
        {"decoding step", "GRPO step"},
        {"ms"}
        | {f"{unit} {part}" for unit in ("ms", "%")
           for part in ("forward building", "sampling", "evaluation", "waiting", "other", "rollout", "reward",
                        "logprobs", "update", "checkpoint", "logging")},
    ),
    "streaming": ([], {"plain", "stream", "stream, formatting", "stream, accumulating", "asyncio"}, {"ms"}),
    "adapter": ([], {"same adapter", "after a switch", "adapter"}, {"ms", "ms switch", "ms load", "ms merge"}),
    "quantized": (LOAD, {"as stored", "4 bits, at load", "4 bits, stored"}, {"tok/s", "GB", "ms load"}),
    "roofline": (
        LOAD,
        {"machine", "rollout", "update"},
        {"GB/s", "Gflop/s", "ms", "ms by bytes", "ms by operations", "of roofline", "GB moved", "Gflop"},
    ),
    "scale": (LOAD, {"1 × 2 rows", "2 × 2 rows"}, {"tok/s", "s", scale.GROWTH}),
}  # fmt: skip


@pytest.mark.parametrize("command", ROWS)
def test_a_command_prints_its_rows_and_writes_them(run_cli, tmp_path, monkeypatch, command: str) -> None:
    monkeypatch.setattr(lengths, "LENGTHS", (3, 6))
    monkeypatch.setattr(lengths, "CONTEXTS", (10, 11, 30))
    monkeypatch.setattr(streaming, "LENGTHS", (3,))
    monkeypatch.setattr(scale, "TIMES", (1, 2))
    monkeypatch.setattr(roofline, "COPIED", {False: 2**16})
    monkeypatch.setattr(roofline, "SQUARE", {False: 16})
    arguments, sides, units = ROWS[command]
    ran = run_cli("bench", command, "--shape", "qwen3-tiny", *arguments, "--runs", 1, "--json", tmp_path / "out.json")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    assert "one run after the cold run" in ran.out
    assert "± sd" not in ran.out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["benchmark"] == command
    assert {row["side"] for row in found["rows"]} == sides
    assert {row["unit"] for row in found["rows"]} == units - (set() if sys.platform == "linux" else {RESIDENT})
    assert all(len(row["runs"]) == 1 for row in found["rows"])
    assert all(side in ran.out for side in sides)
    assert f"mlx {found['versions']['mlx']}" in ran.out


@pytest.mark.parametrize("command", ["rollout", "streaming", "quantized", "train"])
def test_a_real_model_instead_of_random_weights(run_cli, toy_folder, monkeypatch, command: str) -> None:
    monkeypatch.setattr(streaming, "LENGTHS", (3,))
    ran = run_cli("bench", command, "--model", toy_folder, *([] if command == "streaming" else LOAD), "--runs", 1)
    assert ran.code == 0, ran.err
    assert str(toy_folder) in ran.out


def test_every_shape_is_in_the_help(run_cli) -> None:
    said = "".join(run_cli("bench", "rollout", "--help").out.split())
    assert all(f"{shape.removeprefix('qwen3')}" in said for shape in SHAPES)


def test_options_that_mean_nothing_to_a_command_are_refused(run_cli) -> None:
    ran = run_cli("bench", "context", "--prompts", 3)
    assert ran.code == 2
    assert "No such option" in ran.err


def test_growth_is_from_neighbour_to_neighbour_turn_by_turn() -> None:
    def row(length: int, *ms: float) -> Measurement:
        return Measurement("case", f"{length} tokens", "ms", ms, ms[0])

    lengths_ = (64, 127, 128, 129)
    found = growth([row(64, 1, 1), row(127, 2, 4), row(128, 3, 4), row(129, 6, 2)], lengths_)
    assert [(one.side, one.runs) for one in found] == [
        ("127 → 128 tokens", (1.5, 1.0)),
        ("128 → 129 tokens", (2.0, 0.5)),
    ]


def test_shares_add_up() -> None:
    values = shares(2.0, {"a": 0.5, "b": 1.0}, times=4)
    assert values["ms"] == 500
    assert (values["ms a"], values["% a"]) == (125, 25)
    assert values["% other"] == 25


def test_time_in_a_method_is_counted_inside_the_block_alone() -> None:
    class Clocked:
        def work(self) -> int:
            return 1

    original = Clocked.work
    with watched({"part": (Clocked, "work")}) as spent:
        assert Clocked().work() == 1
    assert spent["part"] > 0
    assert Clocked.work is original


@pytest.mark.parametrize("gpu", [False, True])
def test_the_roofline_s_arrays_fit_mlx_s_shapes(gpu: bool) -> None:
    """A dimension is an int of 32 bits, and MLX refuses a larger one before it computes anything: on a CPU, too."""
    copied, squared, dtype = roofline.shapes(gpu)
    for shape in (copied, squared):
        assert mx.zeros(shape, dtype).size == math.prod(shape) < 2**31
    assert copied[0] * dtype.size >= 2**28
    with pytest.raises((ValueError, TypeError, OverflowError)):
        mx.zeros((2**31,), dtype)


def test_the_share_of_the_roofline() -> None:
    values = roofline.Rates(flops_per_second=100.0, bytes_per_second=10.0).reached(
        Demand(flops=100, bytes=40), seconds=8
    )
    assert (values["ms by operations"], values["ms by bytes"]) == (1000, 4000)
    assert values["of roofline"] == 0.5


@pytest.mark.parametrize("shape", ["qwen3-tiny", "qwen3-moe-2m"])
def test_a_shape_s_model_is_what_its_config_costs(shape: str) -> None:
    assert costs_of(model_for(Setting(shape, lora=False))).parameters == costs_of_config(config_of(shape)).parameters


def test_shapes_are_as_large_as_their_names_say() -> None:
    sizes = {"1m": 1, "2m": 2, "25m": 25, "0.6b": 600, "1.7b": 1700, "4b": 4000, "8b": 8000}
    for shape in SHAPES.keys() - {"qwen3-tiny"}:
        millions = costs_of_config(config_of(shape)).parameters / 1e6
        assert millions == pytest.approx(sizes[shape.rpartition("-")[2]], rel=0.2)


def test_the_reward_of_overlap_sleeps_for_at_most_three_quarters_of_a_minute_by_default() -> None:
    """Three sides wait for each group's reward, in the warm-up and in every turn: no machine shortens that."""
    (overlap,) = (command for command in app.registered_commands if command.name == "overlap")
    default = {name: option.default for name, option in inspect.signature(overlap.callback).parameters.items()}
    assert 3 * default["prompts"] * default["seconds"] * (1 + default["runs"]) <= 45
    assert default["prompts"] > 1  # or no group would decode while another is scored
    assert default["seconds"] > 0
