"""Rewards that take `environments` are called where these live, and give them back."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
from scoring.hosts import FakeHost, group, scorer_of, talk

from grpo.config import EnvironmentConfig, RewardConfig
from grpo.errors import UserError
from grpo.scoring.arguments import takes_environments
from grpo.scoring.rehearsal import rehearse
from grpo.scoring.scorer import Scorer
from grpo.types import Failure, Task

USE = "__main__:own"


def own(completions, environments, answer, log_extra, log_metric, trainer_state, **_):
    assert all("environment" not in str(type(c)).lower() for c in completions)
    log_extra("thing", environments)
    log_metric("mine/things", sum(environments))
    return [None if thing == 0 else thing + float(answer[i]) for i, thing in enumerate(environments)]


def made(*hosts: FakeHost, function=own, **config) -> Scorer:
    configs = [RewardConfig(use=USE, **config)]
    if config.get("isolation") is None and function is not None:
        configs = [RewardConfig(use=USE, isolation="inline", **config)]
    return scorer_of(*(hosts or (FakeHost(),)), rewards=configs, functions={USE: function})


def things(*values, **own) -> list:
    return [talk("said", thing=value, **own) for value in values]


def seats(*groups) -> list:
    return [r.trajectory.conversation.home for g in groups for r in g.rollouts]


def test_it_gets_a_groups_environments_and_its_columns() -> None:
    host = FakeHost()
    scorer = made(host)
    assert scorer.lends_environments
    scorer.check(["answer"])
    groups = [group(*things(1, 2, 0), answer="10"), group(*things(3), place=1, answer="20")]
    homes = seats(*groups)
    scored = scorer.score(groups)
    assert host.calls == [[1, 2, 0], [3]]
    rows = [r for g in scored for r in g.rollouts]
    assert [r.scores["own"] for r in rows] == [11.0, 12.0, None, 23.0]
    assert [r.extras["thing"] for r in rows] == [1, 2, 0, 3]
    assert [r.logged for r in rows] == [{}, {}, {}, {"mine/things": 3.0}]
    assert scorer.metrics()["mine/things"] == 3.0
    assert [seat.released for seat in homes] == [1, 1, 1, 1]
    assert [r.trajectory.conversation.home for r in rows] == [None] * 4


def test_each_environment_of_a_run_scores_its_own_groups() -> None:
    one, two = FakeHost("Game"), FakeHost("Quiz")
    scorer = made(one, two)
    rows = [group(*things(1), answer="0"), group(*things(2, environment="Quiz"), place=1, answer="0")]
    assert [g.rollouts[0].scores["own"] for g in scorer.score(rows)] == [1.0, 2.0]
    assert (one.calls, two.calls) == ([[1]], [[2]])


def test_a_call_for_each_completion() -> None:
    host = FakeHost()
    scored = made(host, calls="completion").score([group(*things(1, 2), answer="0")])
    assert host.calls == [[1], [2]]
    assert [r.logged for r in scored[0].rollouts] == [{"mine/things": 1.0}, {"mine/things": 2.0}]


def test_a_conversation_that_failed_is_not_passed_but_given_back() -> None:
    host = FakeHost()
    rows = group(*things(1), *things(5, failed="crash"), *things(2), answer="0")
    homes = seats(rows)
    (scored,) = made(host).score([rows])
    assert host.calls == [[1, 2]]
    assert [r.scores["own"] for r in scored.rollouts] == [1.0, None, 2.0]
    assert [seat.released for seat in homes] == [1, 1, 1]


def test_a_group_is_scored_while_others_are_sampled() -> None:
    host, rows = FakeHost(), [group(*things(1), answer="0"), group(*things(2), place=1, answer="0")]
    scorer, homes = made(host), seats(*rows)
    with scorer.open([row.task for row in rows]) as scoring:
        scoring.add(1, rows[1])
        for _ in range(500):
            if homes[1].released:
                break
            threading.Event().wait(0.01)
        assert (host.calls, homes[1].released, homes[0].released) == ([[2]], 1, 0)
        scored = scorer.score(rows, scoring)
    assert [g.rollouts[0].scores["own"] for g in scored] == [1.0, 2.0]
    assert [seat.released for seat in homes] == [1, 1]


def test_what_an_interrupted_scoring_held_is_given_back() -> None:
    class Stuck(FakeHost):
        def score(self, *_):
            self.future: Future = Future()
            return self.future

    host, row = Stuck(), group(*things(1), answer="0")
    scorer, (home,) = made(host), seats(row)
    with scorer.open([row.task]) as scoring:
        scoring.add(0, row)
        while not hasattr(host, "future"):
            threading.Event().wait(0.01)
    host.future.set_result({})  # its process was killed
    scorer.close()
    for _ in range(500):
        if home.released:
            break
        threading.Event().wait(0.01)
    assert home.released == 1


REPLY = {"values": [None, 2.0], "failures": {0: "slow"}, "extras": {}, "metrics": {}, "seconds": 1.0}


@pytest.mark.parametrize("kind", ["error", "timeout", "crash", "memory"])
def test_a_call_fails_for_the_reason_that_the_host_gives(kind) -> None:
    host = FakeHost()
    host.answers.append({**REPLY, "kind": kind})
    scorer = made(host)
    (scored,) = scorer.score([group(*things(1, 2), answer="0")])
    assert [r.failures.get("own") for r in scored.rollouts] == [Failure(kind, "slow"), None]
    assert [(r.failed, r.scores["own"]) for r in scored.rollouts] == [(True, None), (False, 2.0)]
    assert scorer.failures["own"] == 1


@pytest.mark.parametrize("reply", [{"values": [1.0, 2.0]}, "garbage", {**REPLY, "failures": {7: "where?"}}])
def test_what_a_host_answers_is_read_with_care(reply) -> None:
    host = FakeHost()
    host.answers.append(reply)
    (scored,) = made(host, max_failure_rate=1).score([group(*things(1, 2), answer="0")])
    assert all("its process sent an invalid reply" in r.failures["own"].error for r in scored.rollouts)


def test_what_it_raises_is_its_failure() -> None:
    def broken(environments, **_):
        raise RuntimeError("no")

    scorer = made(function=broken, max_failure_rate=1)
    (scored,) = scorer.score([group(*things(1))])
    assert "RuntimeError: no" in scored.rollouts[0].failures["own"].error


def test_without_environments_it_is_refused() -> None:
    configs = [RewardConfig(use=USE, isolation="inline")]
    with pytest.raises(UserError, match="reward 'own' takes `environments`, but the recipe has none"):
        Scorer.of(configs, functions={USE: own})


@pytest.mark.parametrize(
    ("config", "said"),
    [({"calls": "step"}, "cannot have calls: step. The environments of a step live in several processes")],
)
def test_settings_that_cannot_hold_are_refused(config: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(**config)


def test_a_worker_says_that_its_function_takes_environments(tmp_path) -> None:
    """Its own process is closed, and the function is loaded where the environments are."""
    file = tmp_path / "mine.py"
    file.write_text("def reward(environments, **_):\n    return [float(e) for e in environments]\n")
    host = FakeHost()
    scorer = scorer_of(host, rewards=[RewardConfig(use=str(file))])
    assert list(host.loaded) == ["mine"]
    assert scorer.score([group(*things(4))])[0].rollouts[0].scores["mine"] == 4.0
    with pytest.raises(UserError, match=r"its own memory_gb has no effect: write environment\.memory_gb"):
        scorer_of(host, rewards=[RewardConfig(use=str(file), memory_gb=1)])
    with pytest.raises(UserError, match="but the recipe has none"):
        Scorer.of([RewardConfig(use=str(file))])


def test_who_takes_environments() -> None:
    def by_name(environments): ...
    def out_of_kwargs(completions, **kwargs):
        return kwargs["environments"]

    def everything(completions, **kwargs):
        return kwargs["answer"]

    def nothing(completions): ...

    class Callable:
        def __call__(self, completions, **kwargs):
            return kwargs.get("environments")

    found = [takes_environments(one) for one in (by_name, out_of_kwargs, Callable(), everything, nothing, len)]
    assert found == [True, True, True, False, False, False]


def test_it_is_not_rehearsed() -> None:
    (note,) = rehearse(made(), [Task(0, "?", (), {"answer": "1"})], lambda text: [1])
    assert "'own' was not called: it takes `environments`" in note


def test_a_home_never_leaves_this_process() -> None:
    (rollout,) = things(threading.Lock())
    conversation = rollout.trajectory.conversation
    back = pickle.loads(pickle.dumps(rollout.trajectory)).conversation
    assert back == conversation
    assert (back.home, conversation.home is None) == (None, False)


def test_beside_tools_alone_it_is_refused() -> None:
    config = RewardConfig(use=USE, isolation="inline")
    tools = [(FakeHost("tools"), EnvironmentConfig())]
    with pytest.raises(UserError, match=r"reward 'own' takes `environments`, but the recipe has only tools"):
        Scorer.of([config], functions={USE: own}, hosts=tools)


def test_isolation_inline_would_do_nothing_where_environments_live(tmp_path: Path) -> None:
    use = f"{tmp_path}/mine.py:seen"
    Path(tmp_path, "mine.py").write_text("def seen(completions, environments, **_): return [1.0] * len(completions)\n")
    with pytest.raises(UserError, match=r"'seen' takes `environments`, so .* isolation: inline has no effect"):
        scorer_of(FakeHost(), rewards=[RewardConfig(use=use, isolation="inline")])
    scorer_of(FakeHost(), rewards=[RewardConfig(use=use)]).close()
