"""Reward functions in processes of their own: whatever they do is recorded, and costs no more than its time limit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo.config import RewardConfig
from grpo.errors import RunError, UserError
from grpo.scoring.scorer import Scorer
from grpo.types import Group, Rollout, Task, Trajectory

MISBEHAVING = Path(__file__).with_name("misbehaving.py")


def use(function: str, **settings) -> RewardConfig:
    settings = {"weight": 0.0, "timeout": 20.0} | settings
    return RewardConfig(use=f"{MISBEHAVING}:{function}", **settings)


def groups(*texts: str, size: int = 2, **columns) -> list[Group]:
    rollouts = [Rollout(Trajectory.sampled((1, 2), (-0.5, -0.5), text, "stop")) for text in texts]
    return [Group(Task(i, "?", (7,), columns), tuple(rollouts[i : i + size])) for i in range(0, len(rollouts), size)]


FOUR = groups("a", "bb", "ccc", "dddd")


@pytest.fixture
def scorer():
    """Makes scorers, and closes them."""
    made = []

    def make(*configs: RewardConfig) -> Scorer:
        made.append(Scorer.of(configs, max_steps=10))
        return made[-1]

    yield make
    for one in made:
        one.close()


def column(scored: list[Group], name: str) -> list[float | None]:
    return [rollout.scores[name] for group in scored for rollout in group.rollouts]


def failures(scored: list[Group], name: str) -> list[str | None]:
    return [str(r.failures[name]) if name in r.failures else None for group in scored for r in group.rollouts]


def gone(pid: int) -> bool:
    """Whether a process has ended (whoever has to reap it may still be at it)."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").exists() and ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_a_good_one(scorer) -> None:
    assert column(scorer(use("good")).score(FOUR), "good") == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("raises", "error: ZeroDivisionError: "),
        ("segfaults", "error: its process ended in this call (SIGSEGV); it said: "),
        ("exits", "error: its process ended in this call (exit code 3)"),
        ("killed", "error: its process ended in this call (signal 40)"),
        ("complains", "error: grpo_plugin_misbehaving.Unprintable: <exception str() failed>"),
        ("wrong_length", "error: 5 scores for 4 completions"),
        ("nan", "error: not a usable number: nan"),
        ("infinite", "error: not a usable number: inf"),
        ("strings", "error: not a usable number: '1.0'"),
        ("writes_noise", "error: its process"),
        ("out_of_memory", "error: its process ended in this call (SIGKILL)"),
        ("writes_replies", "error: its process sent an invalid message in this call (OverflowError"),
        ("writes_deep_replies", "error: its process sent an invalid message in this call (RecursionError"),
    ],
)
def test_what_goes_wrong_is_recorded_and_the_next_call_is_served(scorer, function: str, said: str) -> None:
    both = scorer(use(function), use("good"))
    for n in (1, 2):
        scored = both.score(FOUR)
        assert column(scored, "good") == [1.0, 2.0, 3.0, 4.0]
        assert column(scored, function) == [None] * 4
        assert all(error.startswith(said) for error in failures(scored, function))
        assert both.failures == {function: 4 * n, "good": 0}


@pytest.mark.parametrize("function", ["hangs", "hangs_for_good", "threads", "closes_everything"])
def test_a_hung_function_costs_its_time_limit_and_its_process_is_gone(scorer, function: str) -> None:
    hung = scorer(use(function, timeout=1.0))
    pid = hung.rewards[function].worker.pid
    began = time.monotonic()
    scored = hung.score(FOUR)
    assert time.monotonic() - began < 2
    assert gone(pid)
    said = "error: its process" if function == "closes_everything" else "timeout: no answer in 1 s"
    assert all(error.startswith(said) for error in failures(scored, function))


def test_hundred_megabytes_of_prints_are_cut_and_said(scorer, capfd) -> None:
    loud = scorer(use("prints"))
    assert column(loud.score(FOUR), "prints") == [1.0] * 4
    loud.score(FOUR)
    err = capfd.readouterr().err
    assert len(err) < 100_000
    assert "[prints] xxx" in err
    assert "[prints] printed 99," in err


def test_changed_globals_stay_where_they_are(scorer) -> None:
    cwd, path = os.getcwd(), os.environ["PATH"]
    both = scorer(use("globals_changed"), use("good"))
    for _ in range(2):
        scored = both.score(FOUR)
        assert column(scored, "good") == [1.0, 2.0, 3.0, 4.0]
        assert column(scored, "globals_changed") == [None] * 4  # it breaks its own worker
    assert (os.getcwd(), os.environ["PATH"], len([1])) == (cwd, path, 1)


def test_a_failure_costs_no_more_than_its_own_call(scorer) -> None:
    some = scorer(use("sometimes", calls="completion", timeout=1.0))
    scored = some.score(groups("good", "raise", "good", "die", "hang", "good"))
    assert column(scored, "sometimes") == [1.0, None, 1.0, None, None, 1.0]
    kinds = [error and error.split()[0] for error in failures(scored, "sometimes")]
    assert kinds == [None, "error:", None, "error:", "timeout:", None]
    by_group = scorer(use("sometimes", calls="group", timeout=1.0)).score(groups("good", "raise", "good", "good"))
    assert column(by_group, "sometimes") == [None, None, 1.0, 1.0]


def test_a_function_that_forks_answers_once_for_each_call(scorer) -> None:
    forked = scorer(use("forks", calls="completion"))
    for _ in range(2):
        assert column(forked.score(FOUR), "forks") == [1.0, 2.0, 3.0, 4.0]


def test_after_three_deaths_in_a_row_the_rest_is_not_tried(scorer) -> None:
    scored = scorer(use("sometimes", calls="completion")).score(groups(*["die"] * 6, "good", "good"))
    assert column(scored, "sometimes") == [None] * 8
    assert "not called: each of the 3 calls before this one" in failures(scored, "sometimes")[3]


def test_a_broken_grader_stops_the_run_with_its_first_traceback(scorer) -> None:
    broken = scorer(use("raises", weight=1.0))
    with pytest.raises(RunError) as error:
        broken.score(FOUR)
    assert "reward 'raises' failed on 4 of the last 4 completions (max_failure_rate: 0.5)" in str(error.value)
    assert "misbehaving.py" in str(error.value)
    assert "ZeroDivisionError: division by zero" in str(error.value)


def test_latency_and_failures_are_told(scorer) -> None:
    slow = scorer(use("hangs", timeout=0.5), use("good"))
    slow.score(FOUR)
    metrics = slow.metrics()
    assert 0.5 <= metrics["time/rewards/hangs/p50"] < 1.5
    assert 0 <= metrics["time/rewards/good/p95"] < 0.5
    assert (metrics["rewards/hangs/failures"], metrics["rewards/good/failures"]) == (4, 0)


TRAINER = """
import sys, time
from grpo.config import RewardConfig
from grpo.scoring.scorer import Scorer
sys.path.insert(0, {tests!r})
from test_workers import FOUR, use
scorer = Scorer.of([use("starts_a_process", timeout={timeout})])
scorer.score(FOUR)
"""


@pytest.mark.parametrize("timeout", [60.0, 1.0])
def test_nothing_is_left_behind(tmp_path: Path, timeout: float) -> None:
    """Neither when the trainer is killed in the middle of a call, nor when it ends by itself."""
    pids = tmp_path / "pids"
    code = TRAINER.format(tests=str(MISBEHAVING.parent), timeout=timeout)
    trainer = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "GRPO_TEST_PIDS": str(pids)})
    try:
        for _ in range(200):
            if pids.exists() and pids.read_text().endswith("\n"):
                break
            time.sleep(0.05)
        left = [int(pid) for pid in pids.read_text().split()]
        if timeout > 1:
            trainer.send_signal(signal.SIGKILL)
        trainer.wait(20)
    finally:
        trainer.kill()
    assert len(left) == 2
    assert all(gone(pid) for pid in left)


def test_ten_thousand_cheap_rewards_take_a_second_of_processor_time(scorer) -> None:
    """Of this process, which trains; in one call, and in a call for each completion."""
    texts = ["The answer is 42. " * 10] * 20_000
    many = groups(*texts, size=8, answer="42")
    for calls in ("step", "completion"):
        fast = scorer(use("good", calls=calls))
        began = time.process_time()
        assert column(fast.score(many), "good") == [180.0] * 20_000
        assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import os\nos._exit(4)", "its process ended when imported (exit code 4)"),
        ("def f(completions, **_): ...\nraise SystemExit(1)", "cannot be imported: SystemExit: 1"),
        ("x = 1", "no function 'f' in it"),
    ],
)
def test_a_file_that_cannot_be_imported_is_a_users_error(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError) as error:
        Scorer.of([RewardConfig(use=f"{tmp_path}/mine.py:f")])
    assert said in str(error.value)
    assert str(error.value).startswith("reward ")


def test_a_worker_has_no_mlx_and_imports_what_lies_beside_its_file(scorer, tmp_path: Path) -> None:
    (tmp_path / "my_helper.py").write_text("SCORE = 0.25\n")
    (tmp_path / "mine.py").write_text(
        "import sys\nfrom my_helper import SCORE\n"
        "def reward(completions, **_):\n"
        "    assert not {'mlx', 'mlx.core', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "    return [SCORE] * len(completions)\n"
    )
    assert column(scorer(RewardConfig(use=f"{tmp_path}/mine.py")).score(FOUR), "mine") == [0.25] * 4
