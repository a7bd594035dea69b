"""`grpo bench speculate`: drafts of which a known number is accepted, and a recipe's steps over epochs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from grpo.benchmark import epochs, speculation
from grpo.benchmark.commands import app
from grpo.benchmark.epochs import Pool, epochs_of, ways_of
from grpo.benchmark.protocol import Measurement
from grpo.benchmark.setting import Setting
from grpo.benchmark.speculation import KnownDrafts, counts, speculation_gains
from grpo.errors import RunError, UserError

SMALL = Setting("qwen3-tiny", prompts=2, completions=2, prompt_length=4, completion_length=24, runs=1)
RECIPES = Path(__file__).parents[2] / "recipes/learning"


@dataclass(eq=False)
class Said:
    """As much of a row as drafts are asked about."""

    token_ids: list[int] = field(default_factory=list)


def known(accepted: int, *truths: list[int]) -> tuple[KnownDrafts, list[Any]]:
    drafts, rows = KnownDrafts(accepted, vocabulary=10), [Said() for _ in truths]
    drafts.know(rows, truths)  # type: ignore[arg-type]
    return drafts, rows


def test_so_many_drafts_are_right_and_the_next_is_wrong() -> None:
    drafts, (row, other) = known(2, [1, 2, 3, 4, 5], [6, 7, 8, 9, 0])
    assert drafts.fed == 4
    assert drafts.propose([row, None, other], 4) == [[1, 2, 4], [], [6, 7, 9]]
    row.token_ids = [1, 2, 3]
    assert drafts.propose([row], 4) == [[4, 5, 1]]
    row.token_ids = [1, 2, 3, 4, 5]
    assert drafts.propose([row], 4) == [[1, 1, 1]]  # anything: the row has ended
    assert drafts.propose([other], 2) == [[6]]


@pytest.mark.parametrize(("accepted", "fed"), [(0, 2), (1, 2), (2, 4), (3, 4), (4, 8), (7, 8)])
def test_steps_are_as_wide_as_the_drafts_ask_for(accepted: int, fed: int) -> None:
    assert KnownDrafts(accepted, 10).fed == fed


def test_what_was_accepted_is_counted_at_wide_steps() -> None:
    drafts, rows = known(1, [1, 2, 3], [4, 5, 6])
    drafts.stepped([*rows, None], 1, [1, 1, 0], 0.1)
    assert drafts.mean == 0
    drafts.stepped([*rows, None], 2, [2, 1, 0], 0.1)
    assert drafts.mean == 0.5


def test_counts_of_drafts_are_read() -> None:
    assert counts("0, 1,7") == [0, 1, 7]
    for text in ("8", "", "x", "1,", "-1"):
        with pytest.raises(UserError, match=r"expected numbers from 0 to 7"):
            counts(text)


def test_more_accepted_drafts_are_measured_as_such_and_tokens_stay() -> None:
    rows = {(row.side, row.unit): row.mean for row in speculation_gains(SMALL, [0, 1, 3])}
    assert {side for side, _ in rows} == {"plain", "0 accepted", "1 accepted", "3 accepted"}
    assert [rows[side, "same rows"] for side in ("plain", "0 accepted", "1 accepted", "3 accepted")] == [1] * 4
    assert rows["plain", "accepted"] == 0
    assert rows["0 accepted", "accepted"] < 0.1
    assert rows["1 accepted", "accepted"] == pytest.approx(1, abs=0.1)
    assert rows["3 accepted", "accepted"] == pytest.approx(3, abs=0.4)  # a row's last step has fewer


def test_on_a_gpu_drafts_are_what_wide_steps_draw(monkeypatch) -> None:
    """Wide steps may round otherwise than narrow ones there: drafts by what narrow ones drew would not be accepted."""
    monkeypatch.setattr(speculation, "on_gpu", lambda: True)
    bench = speculation._Bench(SMALL)
    plain = bench.sample(None, ())
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        bench, "sample", lambda drafts, truth: asked.append((drafts.accepted, drafts.fed)) or [[drafts.fed]]
    )
    assert [bench._truth(KnownDrafts(count, 256), plain) for count in (1, 2, 3, 4)] == [[[2]], [[4]], [[4]], [[8]]]
    assert asked == [(0, 2), (0, 4), (0, 8)]


def test_other_tokens_are_an_error_on_a_cpu(monkeypatch) -> None:
    sample = speculation._Bench.sample

    def spoiled(self, drafts, truth):
        drawn = sample(self, drafts, truth)
        if drafts is not None:
            drawn[0][-1] += 1
        return drawn

    monkeypatch.setattr(speculation._Bench, "sample", spoiled)
    with pytest.raises(RunError, match=r"25\.0 % of the rows have other tokens"):
        speculation_gains(SMALL, [1])


def test_a_model_without_wide_steps_is_said_to_have_none(monkeypatch) -> None:
    monkeypatch.setattr(KnownDrafts, "width", lambda *_: 1)
    with pytest.raises(RunError, match="decodes one token at a time"):
        speculation_gains(SMALL, [1])


def test_a_pool_of_tasks_comes_round_and_round() -> None:
    pool = Pool(SimpleNamespace(take=lambda n: list(range(n))), 3)  # type: ignore[arg-type]
    assert [pool.take(2), pool.take(2)] == [[0, 1], [2, 0]]
    again = Pool(SimpleNamespace(take=lambda n: list(range(n))), 3)  # type: ignore[arg-type]
    again.load_state(pool.state())
    assert again.take(3) == [1, 2, 0]


def test_the_first_epoch_is_told_apart() -> None:
    row = Measurement("steps", "auto", "s", (1, 2, 3, 4), 9, (5, 6, 7, 8))
    parts = list(epochs._parted([row], 1))
    assert [(part.case, part.runs, part.ratios) for part in parts] == [
        ("steps: first epoch", (1,), (5,)),
        ("steps: later epochs", (2, 3, 4), (6, 7, 8)),
    ]
    assert [part.case for part in epochs._parted([row], 0)] == ["steps: later epochs"]


def test_a_pool_without_a_second_epoch_is_refused(recipe) -> None:
    with pytest.raises(UserError, match=r"--runs 1: an epoch is 2 steps of 2 prompts, .* begins with --runs 2"):
        list(epochs_of(recipe, 4, ["auto"], runs=1))
    with pytest.raises(UserError, match=r"--pool 1: a step of this recipe takes 2 prompts"):
        list(epochs_of(recipe, 1, ["auto"], runs=9))


def test_ways_to_speculate_are_read() -> None:
    assert ways_of("auto, 1,3,7") == ["auto", "1", "3", "7"]
    for text in ("2", "", "on", "off", "auto,"):
        with pytest.raises(UserError, match=rf"--ways {text}: expected some of auto, 1, 3, 7, with"):
            ways_of(text)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--pool", "4"], "nothing without --recipe"),
        (["--ways", "3"], "nothing without --recipe"),
        (["--recipe", str(RECIPES / "sorting.yaml"), "--accepted", "2"], "--accepted has no effect with --recipe"),
        (["--recipe", str(RECIPES / "sorting.yaml"), "--prompts", "4"], "remove the options for these"),
        (["--recipe", str(RECIPES / "sorting.yaml"), "--no-lora"], "remove the options for these"),
    ],
)
def test_options_of_the_other_protocol_are_refused(given, said) -> None:
    result = CliRunner().invoke(app, ["speculate", *given])
    assert isinstance(result.exception, UserError)
    assert said in str(result.exception)


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "recipes/quickstart.yaml"])
def test_a_bundled_recipe_is_known_by_its_name(name, monkeypatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(epochs, "epochs_of", lambda recipe, *_: asked.append(recipe) or [])
    result = CliRunner().invoke(app, ["speculate", "--recipe", name])
    assert (result.exit_code, [recipe.name for recipe in asked]) == (0, ["quickstart.yaml"])
    assert asked[0].is_file()


def test_a_recipe_that_is_not_there_is_named() -> None:
    result = CliRunner().invoke(app, ["speculate", "--recipe", "quickstat"])
    assert isinstance(result.exception, UserError)
    assert "quickstat: there is no such recipe. Did you mean" in str(result.exception)


def test_steps_with_speculation_and_without_sample_the_same(recipe) -> None:
    rows = list(epochs_of(recipe, 4, ["auto", "3"], runs=3))
    same = [row for row in rows if row.unit == "same rows"]
    assert [(row.side, {row.cold, *row.runs}) for row in same] == [("off", {1}), ("auto", {1}), ("3", {1})]
    later = {(row.side, row.unit): row for row in rows if row.case.endswith("later epochs")}
    assert len(later["auto", "s"].ratios) == 2
    assert later["off", "tokens"].runs == later["3", "tokens"].runs
    assert later["off", "width"].mean == 0
    assert later["3", "width"].mean > 1
    assert not any(row.unit == "gain" for row in rows)  # steps do not always know it, and it would count as 0


def test_runs_that_differ_are_an_error_on_a_cpu() -> None:
    trainings: Any = {"off": SimpleNamespace(tokens=[[(1, 2), (3,)]]), "3": SimpleNamespace(tokens=[[(1, 2), (4,)]])}
    with pytest.raises(RunError, match=r"speculate 3: 50\.0 % of the rows"):
        list(epochs._same(trainings, "case"))
