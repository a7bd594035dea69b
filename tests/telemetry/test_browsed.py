"""Which completions the page has to read, within how many bytes, and what it says of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from grpo.config.log import CompletionsConfig
from grpo.recipes import load_recipe
from grpo.runs.completions import read_groups, store_completions, store_failed
from grpo.runs.folder import COMPLETIONS, FAILED
from grpo.runs.spans import characters
from grpo.telemetry.page import browsed as room
from grpo.telemetry.page.browsed import browsed
from grpo.telemetry.page.data import page_data
from grpo.telemetry.page.text import counts, shortened, size_of, spans_of, surprises
from grpo.telemetry.recorded import RecordedRun
from grpo.telemetry.report import page
from grpo.types import Failure, Group, Rollout, StepMetrics, Task, Trajectory


def group(index: int, rewards: Sequence[float | None], text: str = "four", source: str = "data") -> Group:
    trajectory = Trajectory.sampled((1, 2), (-0.25, -1.0), text, "stop")
    rollouts = [Rollout(trajectory, {"exact": reward}, reward=reward, advantage=0.5) for reward in rewards]
    return Group(Task(index, f"ask {index}", (), {"prompt": f"ask {index}", "answer": 4}, source), tuple(rollouts))


def recorded(
    recipe: Path, folder: Path, steps: dict[int, list[Group]], pieces: dict[int, str] | None = None
) -> RecordedRun:
    for step, groups in steps.items():
        decode = None if pieces is None else pieces.__getitem__
        store_completions(folder / COMPLETIONS, step, groups, CompletionsConfig(), 0, len(groups), decode)
    return RecordedRun(folder, load_recipe(recipe), [], [])


def test_a_small_run_is_there_as_a_whole(recipe: Path, tmp_path: Path) -> None:
    steps = {step: [group(7, [1.0, 0.0]), group(step, [None, 0.5], source="other")] for step in (1, 2, 3)}
    told = browsed(recorded(recipe, tmp_path, steps, {1: "fo", 2: "ur"}))
    assert told is not None
    assert (told["stored"], told["total"], len(told["rows"])) == (3, 12, 12)
    places = [(row["step"], row["group"], row["index"]) for row in told["rows"]]
    assert places == [(step, place, index) for step in (1, 2, 3) for place in (0, 1) for index in (0, 1)]
    assert len(told["prompts"]) == len(told["tasks"]) == 4  # said once each
    first = told["rows"][0]
    assert told["tasks"][first["task"]] == {"source": "data", "index": 7, "columns": {"answer": "4"}}
    assert told["prompts"][first["prompt"]] == [["", "ask 7"]]
    kept = {name: first[name] for name in ("reward", "advantage", "tokens", "finish", "text", "scores")}
    expected = {"reward": 1, "advantage": 0.5, "tokens": 2, "finish": "stop", "text": "four", "scores": {"exact": 1}}
    assert kept == expected
    assert (first["characters"], first["columns"]) == ("CC", {"surprise": "IQ"})  # 16 √0.25 and 16 √1
    assert told["rows"][2]["reward"] is None


def test_what_a_step_replayed_is_shown_where_it_was_sampled(recipe: Path, tmp_path: Path) -> None:
    """The policy may have learned since it sampled, without a replay. Older files have a lag for replays alone."""

    def told_of(lag: int, replayed: bool) -> list[int]:
        one = group(1, [1.0])
        rollouts = tuple(replace(rollout, lag=lag, replayed=replayed) for rollout in one.rollouts)
        told = browsed(recorded(recipe, tmp_path, {2: [group(0, [0.5]), replace(one, rollouts=rollouts)]}))
        assert told is not None
        assert told["total"] == len(told["rows"])
        return [told["tasks"][row["task"]]["index"] for row in told["rows"]]

    assert told_of(1, replayed=False) == [0, 1]
    assert told_of(1, replayed=True) == [0]
    path = tmp_path / COMPLETIONS / "step-000002.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["replayed", "characters"]), path)
    told = browsed(RecordedRun(tmp_path, load_recipe(recipe), [], []))
    assert told is not None
    assert told["total"] == 1


def test_the_step_that_a_broken_reward_ended_is_there(recipe: Path, tmp_path: Path) -> None:
    run = recorded(recipe, tmp_path, {1: [group(1, [1.0])]})
    store_failed(tmp_path / FAILED, 2, [group(2, [None])])
    told = browsed(run)
    assert told is not None
    assert [(row["step"], row["reward"]) for row in told["rows"]] == [(1, 1), (2, None)]
    assert (told["stored"], told["total"]) == (2, 2)


def test_failures_and_extras_are_told(recipe: Path, tmp_path: Path) -> None:
    failed = Rollout(
        Trajectory.sampled((1,), None, "</script>", "length"),
        {"slow": None},
        {"slow": Failure("timeout", "no answer in 1 s")},
        {"parsed": {"value": 4}},
        failed=True,
        penalty=0.125,
    )
    run = recorded(recipe, tmp_path, {1: [Group(Task(0, "ask", (), {"prompt": "ask"}), (failed,))]})
    told = browsed(run)
    assert told is not None
    (row,) = told["rows"]
    assert row["failures"] == {"slow": "timeout: no answer in 1 s"}
    assert (row["extras"], row["penalty"], row["reward"]) == ({"parsed": "{'value': 4}"}, 0.125, None)
    assert "characters" not in row
    assert "columns" not in row
    assert page(page_data([run])).count("</script>") == 3  # the page's own


def test_one_prompt_over_time_comes_before_the_rest(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for few groups: of the one prompt that returns, and of the first and the last step."""
    monkeypatch.setattr(room, "TIMES", 3)
    steps = {step: [group(100 + step, [1.0]), *([group(7, [0.5])] if step % 2 else [])] for step in range(1, 10)}
    run = recorded(recipe, tmp_path, steps)
    whole = browsed(run)
    assert whole is not None
    assert len(whole["rows"]) == 14
    monkeypatch.setattr(room, "MOST_BYTES", 1_500)
    few = browsed(run)
    assert few is not None
    assert size_of(few) < 1_600
    seven = [row["step"] for row in few["rows"] if few["tasks"][row["task"]]["index"] == 7]
    assert seven == [1, 5, 9]
    assert 3 < len(few["rows"]) < 14
    assert few["total"] == 14


def test_of_a_large_group_the_best_and_the_worst_are_kept(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MOST_BYTES", 24 * 700)
    run = recorded(recipe, tmp_path, {1: [group(1, [0.5, 1.0, 0.25, None, 0.0, 0.75], "x" * 200)]})
    told = browsed(run)
    assert told is not None
    assert [row["reward"] for row in told["rows"]] == [1, None]


def test_runs_share_the_room(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MOST_BYTES", 20_000)
    steps = {step: [group(step, [1.0, 0.0], "x" * 500)] for step in range(1, 30)}
    runs = [recorded(recipe, tmp_path / name, steps) for name in ("a", "b")]
    sizes = [size_of(run["completions"]) for run in page_data(runs)["runs"]]
    assert max(sizes) < 10_500
    assert min(sizes) > 8_000


def test_long_prompts_take_no_room_beside_the_rest(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step has a prompt of its own, of many long messages; those whose completions have no room are left out."""
    monkeypatch.setattr(room, "MOST_BYTES", 100_000)

    def asked(step: int) -> Group:
        prompt = tuple({"role": "user", "content": f"{step} " + "x" * 9_000} for _ in range(20))
        answer = group(step, [1.0])
        return replace(answer, task=replace(answer.task, prompt=prompt))

    told = browsed(recorded(recipe, tmp_path, {step: [asked(step)] for step in range(1, 25)}))
    assert told is not None
    assert size_of(told) < 100_500
    assert len(told["prompts"]) == len(told["rows"]) >= 1
    assert sum(len(text) for _, text in told["prompts"][0]) < 4.2 * room.LONGEST_PROMPT


def test_a_thousand_steps_are_a_page_of_less_than_five_megabytes(recipe: Path, tmp_path: Path) -> None:
    """64 completions of 2,000 characters a step, in as many files as one can write in a second, and 100 metrics."""
    text = "<think> Let me see. </think>\n" * 69
    groups = [group(index, [n % 3 / 2 for n in range(8)], text) for index in range(8)]
    run = recorded(recipe, tmp_path, {step: groups for step in range(1, 1001, 40)})
    values = {f"metric/{name}": 1 / (name + 3) for name in range(100)}
    steps = [
        StepMetrics(n, {name: value * n for name, value in values.items()} | {"reward": n / 1e3})
        for n in range(1, 1001)
    ]
    data = page_data([RecordedRun(tmp_path, run.recipe, steps, [])])
    (told,) = data["runs"]
    assert (len(told["x"]), told["every"]) == (1000, 1)
    assert len(told["completions"]["rows"]) > 500
    assert 2.5e6 < len(page(data).encode()) < 5e6
    three = page_data([RecordedRun(tmp_path, run.recipe, steps, [])] * 3)
    assert len(page(three).encode()) < 5e6


def test_groups_are_read_one_by_one(tmp_path: Path) -> None:
    path = store_completions(tmp_path, 3, [group(1, [1.0]), group(2, [0.0, 0.5])], CompletionsConfig(), 0, 2)
    assert path is not None
    (step, read, spans), *rest = read_groups(path, [1])
    assert (step, read.task.index, [one.reward for one in read.rollouts], spans, rest) == (
        3,
        2,
        [0, 0.5],
        [None] * 2,
        [],
    )


PIECES = {1: "Hel", 2: "lo", 3: "", 4: "\ufffd", 5: "\ufffd", 6: "!", 7: "wor", 8: " wor", 9: "stop it", 10: "x"}


@pytest.mark.parametrize(
    ("tokens", "text", "expected"),
    [
        ((1, 2, 3), "Hello", [3, 2, 0]),  # the stop token adds nothing
        ((1, 4, 5, 6), "Hel😀!", [3, 0, 1, 1]),  # two tokens spell one character
        ((4, 5), "😀", [0, 1]),
        ((1, 7), "Hel wor", [3, 4]),  # a token that lost its space by itself
        ((1, 8), "Hel wor", [3, 4]),
        ((1, 9), "Helst", [3, 2]),  # a stop string ends the text in the middle of a token
        ((1, 9, 10), "Hel", [3, 0, 0]),
        ((1, 10), "Hello", None),  # not the tokens of this text
        ((1,), "Hello", None),
        ((4, 10), "Hello", None),
        ((), "", []),
    ],
)
def test_which_part_of_a_text_each_token_is(tokens: tuple[int, ...], text: str, expected: list[int] | None) -> None:
    assert characters(tokens, text, PIECES.__getitem__) == expected


def test_columns_of_tokens_take_a_byte_each() -> None:
    """By hand: the digits of 0, 62, and of 63 + 0 and 2 × 63 + 1; of 16 √0.25, of more than 15.5 nats, and of NaN."""
    assert counts([0, 62, 63, 127]) == "A-_A__B"
    assert surprises([-0.25, -99.0, float("nan"), float("-inf"), 0.0], [True, True, False, True, True]) == "I_A_A"
    assert (spans_of([True, False, False, True]), spans_of([False, True]), spans_of([])) == ([1, 2, 1], [0, 1, 1], [])
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 4) == "ab\n\n[… 3 characters left out …]\n\nfg"
    assert json.loads(f'"{counts(range(64))}"') == counts(range(64))  # nothing that JSON or HTML must escape
