"""What `--check FILE` fails on, with rows whose numbers were made up for it, and the project's own file."""

import json
from pathlib import Path

import pytest

from grpo.backend.device import cpu_cores
from grpo.benchmark import bounds, report
from grpo.benchmark.bounds import Bound, bounds_for, read_bounds, required_bounds
from grpo.benchmark.lengths import GROWTH
from grpo.benchmark.protocol import Measurement
from grpo.benchmark.report import document
from grpo.benchmark.setting import Setting
from grpo.benchmark.verdicts import judge
from grpo.errors import RunError, UserError

OURS = Path(__file__).parents[2] / "scripts/benchmarks/bounds.toml"
FIVE = Setting(shape="qwen3-tiny", runs=5)


def row(ratios: list[float], runs: list[float] | None = None) -> Measurement:
    return Measurement("case", "side", "ms", tuple(runs or [1.0] * len(ratios)), 1.0, tuple(ratios))


def bound(**changes) -> Bound:
    return Bound(**{"benchmark": "b", "side": "side", "unit": "ms", "figure": "overhead", "why": "?", **changes})


@pytest.mark.parametrize(
    ("overheads", "falls_short", "holds"),
    [
        ([0.01, 0.01, 0.02, 0.03, 0.049], False, True),
        ([0.01, 0.30, 0.30, 0.30, 0.30], False, False),  # one turn within the bound: noise is not ruled out
        ([0.06, 0.30, 0.07, 0.30, 0.30], True, False),  # not even the best turn
    ],
)
def test_an_overhead_falls_short_only_if_all_of_its_interval_does(overheads, falls_short, holds) -> None:
    (verdict,) = judge([bound(most=0.05)], [row([1 / (1 + overhead) for overhead in overheads])])
    assert (verdict.falls_short, verdict.holds) == (falls_short, holds)
    assert verdict.figure == pytest.approx(sorted(overheads)[2])
    assert ("FALLS SHORT" in verdict.line()) == falls_short
    assert "asked at most 5.0 %" in verdict.line()


def test_speed_ups_values_and_both_ends() -> None:
    def short(figure: str, one: Measurement, **ends: float) -> bool:
        (verdict,) = judge([bound(figure=figure, **ends)], [one])
        return verdict.falls_short

    assert short("speed-up", row([1.1, 1.2, 1.3, 1.4, 1.49]), least=1.5)
    assert not short("speed-up", row([1.1, 1.2, 1.3, 1.4, 1.51]), least=1.5)
    assert short("value", row([1] * 5, [1.1, 2, 2, 2, 2]), most=1)
    assert not short("value", row([1] * 5, [0.9, 2, 2, 2, 2]), most=1)
    assert short("overhead", row([1.3] * 5), least=-0.1, most=0.1)  # 23 % less is not flat either
    assert not short("overhead", row([1.05] * 5), least=-0.1, most=0.1)


def test_too_few_turns_and_rows_of_other_names_are_not_judged() -> None:
    (verdict,) = judge([bound(most=0.0)], [row([0.5] * 4)])
    assert not verdict.falls_short
    assert not verdict.holds
    assert "undecided: fewer than 5 runs" in verdict.line()
    assert judge([bound(side="other"), bound(unit="s"), bound(case="x*")], [row([0.5] * 5)]) == []
    assert judge([bound()], [row([])]) == []  # held against nothing


def test_the_interval_narrows_with_more_turns() -> None:
    lucky = [1.0] + [0.5] * 7
    (verdict,) = judge([bound(most=0.5)], [row(lucky)])
    assert verdict.falls_short  # one good turn of eight is an accident


def test_where_a_bound_applies(monkeypatch) -> None:
    wanted = {"shape": "qwen3-tiny"}
    table = (bound(where="CPU", setting=wanted), bound(where="H200", setting=wanted), bound(setting={"runs": 7}))
    monkeypatch.setattr(bounds, "machine_words", lambda: frozenset({"CPU"}))
    assert bounds_for(table, "b", FIVE) == [table[0]]
    assert bounds_for(table, "other", FIVE) == []
    monkeypatch.setattr(bounds, "machine_words", lambda: frozenset({"GPU", "CUDA", "NVIDIA", "H200"}))
    assert bounds_for(table, "b", FIVE) == [table[1]]
    with pytest.raises(UserError, match=r"no bound applies to `bench other`"):
        required_bounds(table, "other", FIVE)
    with pytest.raises(UserError, match="--runs 5"):
        required_bounds(table, "b", Setting(shape="qwen3-tiny", runs=4))


@pytest.mark.parametrize(
    ("benchmark", "promised", "count"),
    [
        ("rollout", {"prompts": 8, "completions": 8, "prompt_length": 128, "completion_length": 128}, 1),
        ("train", {"prompts": 2, "completions": 8, "prompt_length": 64, "completion_length": 64}, 4),
        ("train", {"prompts": 4, "completions": 8, "prompt_length": 256, "completion_length": 128}, 2),
    ],
)
def test_a_speed_up_is_bounded_at_its_own_load(
    benchmark: str, promised: dict[str, int], count: int, monkeypatch
) -> None:
    monkeypatch.setattr(bounds, "machine_words", lambda: frozenset({"CPU"}))
    table = read_bounds(OURS)
    assert len(bounds_for(table, benchmark, Setting(**promised))) == count
    assert bounds_for(table, benchmark, Setting(**promised, model="mine")) == []  # random weights were promised for
    for name in promised:
        assert bounds_for(table, benchmark, Setting(**{**promised, name: 1})) == []


@pytest.mark.parametrize(
    ("peer", "judged"),
    [
        ("mlx-lm-lora", [15.0]),
        ("mlx-lm-lora, same BLAS", [8.0]),
        ("unsloth, same BLAS, --no-checkpointing", [5.0, 1.0, 1.0]),
        ("unsloth", []),
    ],
)
def test_a_step_is_bounded_by_the_toolkit_that_it_is_held_against(peer: str, judged: list[float], monkeypatch) -> None:
    monkeypatch.setattr(bounds, "machine_words", lambda: frozenset({"CPU"}))
    setting = Setting(prompts=2, completions=8, prompt_length=64, completion_length=64)
    case = f"step, {setting}, against {peer}"
    rows = [Measurement(case, "grpo", unit, (1.0,) * 5, 1.0, (2.0,) * 5) for unit in ("s", "GB", "GB resident")]
    verdicts = judge(bounds_for(read_bounds(OURS), "train", setting), rows)
    assert [verdict.bound.least for verdict in verdicts] == judged


def test_a_file_that_cannot_be_written_after_all_is_said(tmp_path) -> None:
    with pytest.raises(RunError, match="cannot be written: Is a directory"):
        report.report("b", FIVE, lambda: [row([0.5])], tmp_path, check=None)


def test_the_table_names_what_is_there(run_cli) -> None:
    commands = run_cli("bench", "--help").out
    for one in (table := read_bounds(OURS)):
        assert one.benchmark in commands
        assert one.why
    assert [one.unit for one in table if one.benchmark == "context"] == [GROWTH]
    assert len(table) == 31


GOOD = """[[bound]]
benchmark = "b"
side = "side"
unit = "ms"
figure = "overhead"
most = 0.05
why = "?"
"""


def test_a_shortfall_ends_the_command_and_is_named(tmp_path, capsys) -> None:
    check = tmp_path / "bounds.toml"
    check.write_text(f"{GOOD}{GOOD.replace('overhead', 'value').replace('0.05', '2')}")
    rows = [row([0.5] * 5)]
    with pytest.raises(RunError, match=r"1 of 2 bounds fall short:\ncase: side: overhead 100\.0 %"):
        report.report("b", FIVE, lambda: rows, tmp_path / "out.json", check)
    assert "FALLS SHORT" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert [one["falls_short"] for one in written["bounds"]] == [True, False]
    report.report("b", FIVE, lambda: rows, None, check=None)
    assert "bounds" not in capsys.readouterr().out
    with pytest.raises(RunError, match="none of the bounded rows was measured"):
        report.report("b", FIVE, list, None, check)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("[[bound]]", "[[bond]]"), "may contain only [[bound]] tables"),
        (("[[bound]]", "[[bound]"), "not TOML: "),
        (('why = "?"', ""), "bound 2: why is missing"),
        (("most", "mots"), "bound 2: unknown key mots; the keys are benchmark, side"),
        (("most = 0.05", ""), "bound 2: it has no limit: add least or most"),
        (("0.05", '"5 %"'), "bound 2: most is '5 %'"),
        (("overhead", "over"), "bound 2: figure is 'over'; expected speed-up, overhead, value"),
        (("why", "setting = {shap = 1}\nwhy"), "bound 2: there is no setting shap"),
    ],
)
def test_a_mistake_in_a_file_of_bounds_is_named(tmp_path, change: tuple[str, str], said: str) -> None:
    file = tmp_path / "bounds.toml"
    file.write_text(GOOD + GOOD.replace(*change))
    with pytest.raises(UserError) as raised:
        read_bounds(file)
    assert str(raised.value).startswith(f"--check {file}: ")
    assert said in str(raised.value)


def test_a_file_of_bounds_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"nope\.toml: cannot be read: No such file"):
        read_bounds(tmp_path / "nope.toml")


def test_the_document_for_programs() -> None:
    one = Measurement("case", "grpo", "tok/s", (1.0, 3.0), 9.0, (2.0, 4.0))
    found = document("b", FIVE, [one], [])
    assert set(found) == {"benchmark", "setting", "machine", "versions", "rows", "bounds"}
    assert {"python", "mlx", "mlx-lm", "grpo"} <= set(found["versions"])
    assert f"{cpu_cores()} cores (" in found["machine"]
    assert found["setting"]["shape"] == "qwen3-tiny"
    assert document("b", Setting(model="mine"), [], [])["setting"]["shape"] is None  # of a model it says nothing
    assert json.loads(json.dumps(found))["rows"] == [
        {
            "case": "case", "side": "grpo", "unit": "tok/s", "runs": [1.0, 3.0], "cold": 9.0, "ratios": [2.0, 4.0],
            "mean": 2.0, "sd": pytest.approx(2**0.5), "spread": 1.0, "ratio": 3.0, "ratio_low": 2.0, "ratio_high": 4.0,
        }
    ]  # fmt: skip
