"""`grpo rewards`, and a run beside rewards that misbehave."""

import json
import os
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from grpo.cli.rewards import _values
from grpo.plugins import bundled_names

MISBEHAVING = Path(__file__).parents[1] / "scoring/misbehaving.py"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_list_names_them_all_with_what_they_grade(run_cli) -> None:
    ran = run_cli("rewards", "list")
    assert ran.code == 0
    listed = [line.split()[0] for line in ran.out.splitlines() if not line.startswith(" ")]
    assert listed == [*bundled_names("rewards", ".py"), "judge", "model:NAME"]
    assert "kwargs: prompt, system, labels" in ran.out
    assert "kwargs: tokens, kind='target', cache=0" in ran.out
    assert "columns: answer" in ran.out


def test_new_writes_one_that_passes_its_own_test(run_cli, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli("rewards", "new", "mine").code == 0
    ran = run_cli("rewards", "test", "mine.py")
    assert ran.code == 0, ran.err
    assert "cases  5 of 5 right" in ran.out
    assert ", 0 failures; latency p50 " in ran.out
    again = run_cli("rewards", "new", "mine")
    assert (again.code, "mine.py exists already" in again.err) == (2, True)
    assert run_cli("rewards", "new", "no name").code == 2


def test_test_shows_what_is_wrong_and_fails(run_cli, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "def reward(completions, bonus=0, **_):\n    return [bonus + 1 / len(text) for text in completions]\n"
        "CASES = [{'completion': 'ab', 'score': 0.5}, {'completion': 'ab', 'score': 0.6}]\n"
    )
    ran = run_cli("rewards", "test", "mine.py")
    assert ran.code == 1
    assert "case 2 ('ab'): expected 0.6, got 0.5" in ran.out
    assert "'': error: ZeroDivisionError" in ran.out
    assert "cases  1 of 2 right" in ran.out
    assert "reward 'mine.py': 2 completions failed" in ran.err
    assert run_cli("rewards", "test", "mine.py", "--kwarg", "bnus=1").code == 2
    assert run_cli("rewards", "test", "nowhere").code == 2


def test_cases_keep_the_arguments_that_they_were_written_for(run_cli, tmp_path) -> None:
    ran = run_cli("rewards", "test", "length", "--kwarg", "tokens=3")
    assert (ran.code, "cases  9 of 9 right" in ran.out) == (0, True), ran.out + ran.err
    (tmp_path / "mine.py").write_text(
        "def reward(completions, bonus=0, **_):\n    return [0 / (bonus != 5)] * len(completions)\n"
        "CASES = [{'completion': 'ab', 'score': 0}]\n"
    )
    broken = run_cli("rewards", "test", tmp_path / "mine.py", "--kwarg", "bonus=5")
    assert "cases  1 of 1 right" in broken.out
    assert "45 completions, 45 failures" in broken.out
    (tmp_path / "made.py").write_text(
        "def reward(size):\n    return lambda completions, **_: [size] * len(completions)\n"
        "CASES = [{'completion': 'ab', 'score': 3}]\n"
    )
    made = run_cli("rewards", "test", tmp_path / "made.py", "--kwarg", "size=3")
    assert (made.code, "cases  1 of 1 right" in made.out) == (0, True), made.err


def test_an_argument_is_yaml_but_never_a_comment() -> None:
    given = _values("--kwarg", ["pattern=####", "points=1e-3", "names=[a, b]", "text=[a"])
    assert given == {"pattern": "####", "points": 0.001, "names": ["a", "b"], "text": "[a"}


def test_failures_that_are_alike_are_one_line(run_cli, tmp_path) -> None:
    (tmp_path / "mine.py").write_text("import time\n\ndef reward(completions, **_):\n    time.sleep(9)\n")
    ran = run_cli("rewards", "test", tmp_path / "mine.py", "--timeout", "0.2")
    assert ran.code == 1
    assert "'' and 2 more: timeout: no answer in 0.2 s" in ran.out
    assert " and 41 more: error: not called" in ran.out
    assert len(ran.out.splitlines()) == 4


def test_what_is_printed_again_and_again_is_counted(run_cli, tmp_path) -> None:
    one = "CALLS = 'completion'\ndef reward(completions, **_):\n    print('hello')\n    return [1.0]\n"
    (tmp_path / "mine.py").write_text(one)
    ran = run_cli("rewards", "test", tmp_path / "mine.py")
    assert ran.code == 0
    assert ran.err.count("[mine] hello\n") == 1
    assert " more lines, the same as above)" in ran.err


@pytest.mark.parametrize(
    ("cases", "said"),
    [
        ("[('ab', 0.5)]", "CASES: a case is a dictionary of completion, score"),
        (
            "{'completion': 'ab', 'score': 1}",
            "CASES: expected a list of cases, or a dictionary from function names to lists of cases, got {'completion'",
        ),
        ("[{'completion': 'ab', 'score': 1, 'kwargs': 3}]", "a case is a dictionary"),
        ("[{'completion': 'ab', 'score': '1'}]", "needs a score: a number, or None"),
        ("[{'completion': 'ab'}]", "needs a score: a number, or None"),
        ("3", "CASES: expected a list of cases, or a dictionary from function names to lists of cases, got 3"),
    ],
)
def test_cases_that_are_none_are_the_users_mistake(run_cli, tmp_path, cases: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(f"def reward(completions, **_):\n    return [1.0]\nCASES = {cases}\n")
    ran = run_cli("rewards", "test", tmp_path / "mine.py")
    assert (ran.code, said in ran.err) == (2, True), ran.err


@pytest.mark.parametrize(
    ("cases", "said"),
    [
        (
            "",
            "Columns such as gold come from cases, and the reward has none. Write cases in its file, or in a file for "
            '--cases: CASES = [{"completion": "It is 7.", "gold":',
        ),
        ("CASES = [{'completion': 'a', 'score': 1, 'answer': 'a'}]", "Its cases have the columns answer"),
        ("CASES = [{'completion': 'a', 'score': 1}]", "Its cases have no columns"),
    ],
)
def test_columns_that_no_case_gives(run_cli, tmp_path, cases: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(f"def reward(completions, gold, **_):\n    return [1.0]\n{cases}\n")
    ran = run_cli("rewards", "test", tmp_path / "mine.py")
    assert (ran.code, said in ran.err) == (2, True), ran.err


@pytest.mark.parametrize("takes", ["completions, environments", "completions, **columns"])
def test_a_reward_of_live_environments_is_tried_in_a_run(run_cli, tmp_path, takes: str) -> None:
    body = "    return [columns['environments'][0]]\n" if "**" in takes else "    return [1.0]\n"
    (tmp_path / "mine.py").write_text(f"def reward({takes}):\n{body}")
    ran = run_cli("rewards", "test", tmp_path / "mine.py")
    assert ran.code == 2
    assert "cannot be tested on cases: test it in a run of one step (grpo train RECIPE optim.steps=1)" in ran.err
    assert "CASES" not in ran.err


def test_score_shows_what_would_have_changed(run_cli, recipe) -> None:
    assert run_cli("train", recipe).code == 0
    same = run_cli("rewards", "score", "runs/toy", "--reward", "digits.py")
    assert same.code == 0, same.err
    assert "0 of 16 completions get a different score; 0 failures; correlation 1.000" in same.out
    assert "0 of 4 groups would have a different best completion" in same.out
    Path("digits.py").write_text("def reward(completions, **_):\n    return [-1 - len(t) for t in completions]\n")
    changed = run_cli("rewards", "score", "runs/toy", "--reward", "digits.py", "--examples", "1")
    assert "digits, as stored" in changed.out
    assert "16 of 16 completions get a different score" in changed.out
    assert changed.out.count("\nstep ") == 1
    other = run_cli("rewards", "score", "runs/toy", "--reward", "language")
    assert "reward, as stored" in other.out
    assert run_cli("rewards", "score", "runs", "--reward", "language").code == 2
    Path("broken.py").write_text("def reward(completions, **_):\n    raise OSError('away')\n")
    broken = run_cli("rewards", "score", "runs/toy", "--reward", "broken.py")
    assert (broken.code, "reward 'broken.py' failed on every completion" in broken.err) == (1, True)
    assert "first failure: error: OSError: away" in broken.out
    wrong = run_cli("rewards", "score", "runs/toy", "--reward", "language", "--against", "nothing")
    assert (wrong.code, "this run stored digits, reward" in wrong.err) == (2, True)


MODES = {
    # what misbehaves: kind of failure
    "raises": "error",
    "segfaults": "error",
    "exits": "error",
    "wrong_length": "error",
    "nan": "error",
    "infinite": "error",
    "strings": "error",
    "threads": "timeout",
    "hangs": "timeout",
    "prints": None,
    "globals_changed": "error",  # it breaks its own worker, and nobody else
}


@pytest.mark.slow
def test_a_run_with_rewards_that_misbehave_in_every_way_goes_to_its_end(run_cli, recipe) -> None:
    text = recipe.read_text()
    began = time.monotonic()
    assert run_cli("train", recipe, "output_dir=runs/alone").code == 0
    alone = time.monotonic() - began
    limits = {name: 1.0 if kind == "timeout" else 20.0 for name, kind in MODES.items()}
    mine = [f"{{use: {MISBEHAVING}:{name}, weight: 0, timeout: {limit}}}" for name, limit in limits.items()]
    recipe.write_text(text.replace('{use: "digits.py:reward"}', ", ".join(['{use: "digits.py:reward"}', *mine])))
    began = time.monotonic()
    ran = run_cli("train", recipe)
    took = time.monotonic() - began
    assert ran.code == 0, ran.err
    assert took < alone + 2 * 1.0 + 10  # two steps of one limit each (they wait side by side), and twelve processes
    assert os.getcwd() == str(recipe.parent)
    for n, step in enumerate(lines(Path("runs/toy/metrics.jsonl")), 1):
        assert step["rewards/digits/error_rate"] == step["rewards/digits/timeout_rate"] == 0
        for name, kind in MODES.items():
            rates = {k: step[f"rewards/{name}/{k}_rate"] for k in ("none", "error", "timeout")}
            assert rates == {"none": 0, "error": 0, "timeout": 0} | ({kind: 1.0} if kind else {}), name
            assert step[f"rewards/{name}/failures"] == (8 * n if kind else 0)
        assert step["time/rewards/hangs/p50"] >= 1
    alone_steps = lines(Path("runs/alone/metrics.jsonl"))
    for a, b in zip(alone_steps, lines(Path("runs/toy/metrics.jsonl")), strict=True):
        assert (a["reward"], a["loss"], a["grad_norm"]) == (b["reward"], b["loss"], b["grad_norm"])
    stored = pq.read_table("runs/toy/completions/step-000002.parquet").to_pylist()
    assert all(row["failure/hangs"].startswith("timeout: no answer in 1 s") for row in stored)
    assert all("ZeroDivisionError" in row["failure/raises"] for row in stored)
    assert all(row["failure/prints"] is None and row["reward/prints"] == 1 for row in stored)
    assert "[prints] printed " in ran.err
    assert "reward 'raises' failed on 16 completions: 16 errors, 0 timeouts" in ran.out
    assert "reward 'hangs' failed on 16 completions: 0 errors, 16 timeouts" in ran.out
    assert "'digits' failed" not in ran.out


def test_a_weighted_reward_that_sometimes_fails_keeps_its_completions_out(run_cli, recipe, tmp_path) -> None:
    (tmp_path / "flaky.py").write_text(
        "CALLS = 'completion'\nseen = []\n\ndef reward(completions, **_):\n    seen.append(1)\n"
        "    if len(seen) % 4 == 0:\n        raise OSError('away')\n    return [0.5 * (len(seen) % 2)]\n"
    )
    recipe.write_text(recipe.read_text().replace('[{use: "digits.py:reward"}]', '[{use: "flaky.py"}]'))
    ran = run_cli("train", recipe)
    assert ran.code == 0, ran.err
    for step in lines(Path("runs/toy/metrics.jsonl")):
        assert step["rewards/flaky/error_rate"] == 0.25
        assert step["reward"] == pytest.approx(1 / 3)
    for row in pq.read_table("runs/toy/completions/step-000001.parquet").to_pylist():
        assert (row["reward"] is None) == (row["failure/flaky"] is not None) == (row["index"] == 3)
        assert row["advantage"] == 0 or row["index"] != 3


@pytest.mark.parametrize("returned", ["[1.0]", "[1.0 for _ in completions][:1]"])
def test_too_few_scores_for_several_completions_are_a_failure(run_cli, tmp_path, returned) -> None:
    """One completion a call hides it."""
    (tmp_path / "mine.py").write_text(f"def reward(completions, **_):\n    return {returned}\n")
    ran = run_cli("rewards", "test", tmp_path / "mine.py")
    assert (ran.code, "45 completions, 0 failures" in ran.out) == (1, True)
    said = "error: 1 score for 4 completions; a reward returns one score per completion"
    assert f"several completions in one call, as in a run: {said}" in ran.out
    assert "failed when one call had several completions" in ran.err


@pytest.mark.parametrize(
    ("score", "warns"),
    [("None", True), ("0.0", False), ("None if text else 0.0", False)],
)
def test_a_reward_that_scores_nothing_is_warned_of(run_cli, tmp_path, score, warns) -> None:
    (tmp_path / "mine.py").write_text(f"def reward(completions, **_):\n    return [{score} for text in completions]\n")
    ran = run_cli("rewards", "test", tmp_path / "mine.py")
    assert (ran.code, "warning: the reward returned None for every completion" in ran.out) == (0, warns)
