"""The names under which rewards may log: never those of the run's own metrics."""

import json
from pathlib import Path

import pytest

from grpo.scoring.contract import Reward
from grpo.scoring.meanings import MEANINGS, meaning
from grpo.scoring.names import _STEP, check_metric
from grpo.scoring.scorer import Scorer
from grpo.types import Group, Rollout, Task, Trajectory

COLUMNS = {"prompts": ["?"] * 2, "completions": ["a", "bb"], "completion_ids": [[1], [1, 2]]}


def logs(name):
    def mine(completions, log_metric, **_):
        log_metric(name, 1.0)
        return [1.0] * len(completions)

    return mine


@pytest.mark.parametrize("name", ["step", "kl", "learning_rate", "reward", "rewards/x/mean", "time/mine", "n", "avg@4"])
def test_a_name_of_the_runs_own_is_a_failure_of_the_reward(name: str) -> None:
    answer = Reward(logs(name), {})(COLUMNS, {})
    assert (answer.values, answer.metrics) == ([None, None], {})
    assert f"ValueError: log_metric('{name}'): the run has a metric of this name" in answer.failures[1]


@pytest.mark.parametrize("name", ["accuracy", "mine/step", "steps", "kl_mine", "mine/reward", "entropy/mine", "größe"])
def test_every_other_name_is_kept_as_it_is(name: str) -> None:
    assert Reward(logs(name), {})(COLUMNS, {}).metrics == {name: [1.0]}


@pytest.mark.parametrize("hook", ["log_metric", "log_extra"])
@pytest.mark.parametrize("name", ["\ud800", 7, None])
def test_a_name_that_cannot_be_stored_is_a_failure(hook: str, name) -> None:
    answer = Reward(lambda completions, **given: given[hook](name, [1.0] * 2), {})(COLUMNS, {})
    assert f"{hook}({name!r}): a name must be a text" in answer.failures[0]


def test_what_is_not_finite_is_not_logged() -> None:
    def mine(completions, log_metric, **_):
        for value in (float("nan"), float("inf"), 2):
            log_metric("mean", value)
        log_metric("nothing", float("nan"))
        return [1.0] * len(completions)

    answer = Reward(mine, {})(COLUMNS, {})
    assert (answer.metrics, answer.failures) == ({"mean": [2.0]}, {})


def test_columns_of_two_rewards_under_one_name_are_both_kept() -> None:
    def logging(column, value, when):
        def mine(completions, trainer_state, log_extra, **_):
            if trainer_state.global_step >= when:
                log_extra(column, [value] * len(completions))
            return [1.0] * len(completions)

        return mine

    scorer = Scorer({"late": logging("said", "l", 1), "early": logging("said", "e", 0), "other": logging("o", "o", 0)})
    group = Group(Task(0, "?", (7,), {}), (Rollout(Trajectory.sampled((1,), None, "a", "stop")),))
    seen = []
    for step in (1, 2):  # whose column is whose does not change on the way
        scorer.begin(step)
        seen.append(scorer.score([group])[0].rollouts[0].extras)
    scorer.close()
    assert seen == [{"said": "e", "o": "o"}, {"said": "e", "o": "o", "late/said": "l"}]


def test_every_metric_with_a_meaning_is_reserved() -> None:
    names = [name for section in MEANINGS.values() for name in section]
    assert len(names) == len(set(names))
    for name in names:
        with pytest.raises(ValueError, match="the run has a metric of this name"):
            check_metric(name.replace("<k>", "4"))


def test_every_metric_of_a_step_has_a_meaning() -> None:
    assert [name for name in _STEP if name not in ("step", "tokens") and meaning(name) is None] == []
    assert meaning("rewards/mine/mean") == MEANINGS["Reward"]["rewards/<name>/mean"]
    assert meaning("mine/step") is None


@pytest.mark.parametrize("isolation", ["process", "inline"])
def test_a_run_beside_a_reward_that_logs_step(run_cli, recipe, caplog, isolation: str) -> None:
    """The failure is counted, the step's number stays, and every metric that the run wrote is one that it keeps."""
    Path("mine.py").write_text(
        "def bad(completions, log_metric, **_):\n    log_metric('step', 99)\n    return [1.0] * len(completions)\n"
        "def good(completions, log_metric, log_extra, **_):\n    log_metric('mine/step', 99)\n"
        "    for name in ('reward', 'step', 'completion'):\n        log_extra(name, completions)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    rewards = ", ".join(f"{{use: 'mine.py:{name}', isolation: {isolation}}}" for name in ("good", "bad"))
    settings = ["loss={beta: 0.1, beta_end: 0.2}", "advantage.soft_overlong_cache=2", "rollout.top_k=50"]
    bad = f"rewards.1={{use: 'mine.py:bad', weight: 0, isolation: {isolation}}}"
    evaluation = "eval={split: train, prompts: 2, samples: 2}"
    ran = run_cli("train", recipe, f"rewards=[{rewards}]", bad, evaluation, *settings)
    assert ran.code == 0, ran.err
    for file in ("metrics.jsonl", "eval.jsonl"):
        lines = [json.loads(line) for line in Path("runs/toy", file).read_text().splitlines()]
        assert [line["step"] for line in lines] == ([1, 2] if file == "metrics.jsonl" else [0, 2])
        for name in {name for line in lines for name in line} - {"mine/step"}:
            with pytest.raises(ValueError, match="the run has a metric of this name"):
                check_metric(name)
            assert name == "step" or meaning(name), name
        if file == "metrics.jsonl":
            assert [line["mine/step"] for line in lines] == [99, 99]
            assert lines[0]["rewards/bad/error_rate"] == 1
    assert "log_metric('step'): the run has a metric of this name" in caplog.text


def test_columns_of_log_extra_stand_beside_those_of_the_run(run_cli, recipe) -> None:
    import pyarrow.parquet as pq

    Path("mine.py").write_text(
        "def mine(completions, log_extra, **_):\n"
        "    for name in ('reward', 'step', 'completion', 'columns'):\n"
        "        log_extra(name, ['mine'] * len(completions))\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    assert run_cli("train", recipe, "rewards=[{use: 'mine.py:mine'}]").code == 0
    for row in pq.read_table("runs/toy/completions/step-000002.parquet").to_pylist():
        assert (row["step"], row["reward"]) == (2, len(row["completion"]))
        assert [row[f"extra/{name}"] for name in ("reward", "step", "completion", "columns")] == ['"mine"'] * 4
    assert run_cli("rewards", "score", "runs/toy", "--reward", "mine.py:mine").code == 0
