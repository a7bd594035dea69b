"""A signal comes while other people's code runs: the step is not kept, whatever that code makes of the exception."""

import json
import os
import signal
from pathlib import Path

import pytest

from grpo.runs.signals import Stopped, StopRequest

PLAIN = """
import os, signal
def interrupt():
    if not os.path.exists("asked"):
        open("asked", "w").close()
        os.kill({pid}, signal.SIGINT)
"""
REWARD = (
    PLAIN
    + """
import asyncio, time
def digits(completions):
    return [sum(c.isdigit() for c in text) / 8 for text in completions]
def plain(completions, trainer_state, **_):
    if trainer_state.global_step == 1:
        if os.path.exists("asked"):
            open("after", "w").close()
        interrupt()
        time.sleep(0.01)
    return digits(completions)
def swallowing(completions, trainer_state, **_):
    try:
        return plain(completions, trainer_state)
    except:
        return [1.0] * len(completions)
def converting(completions, trainer_state, **_):
    try:
        return plain(completions, trainer_state)
    except BaseException as error:
        raise ValueError("no score") from error
class Dying:
    def __del__(self):
        interrupt()
def unraisable(completions, trainer_state, **_):
    if trainer_state.global_step == 1 and not os.path.exists("asked"):
        Dying()
        for _ in range(500):
            time.sleep(0.01)
        open("after", "w").close()
    return digits(completions)
async def asynchronous(completions, trainer_state, **_):
    async def one(text):
        await asyncio.sleep(0)
        return plain([text], trainer_state)[0]
    return await asyncio.gather(*map(one, completions))
async def forgiving(completions, trainer_state, **_):
    async def one(text):
        await asyncio.sleep(0)
        return plain([text], trainer_state)[0]
    scores = await asyncio.gather(*map(one, completions), return_exceptions=True)
    return [0.0 if isinstance(score, BaseException) else score for score in scores]
"""
)
LOSS = (
    PLAIN
    + """
def surrogate(logprobs, batch):
    return -batch.advantages * logprobs
def plain(logprobs, batch, cfg):
    if os.path.exists("runs/toy/metrics.jsonl"):
        interrupt()
    return surrogate(logprobs, batch)
def swallowing(logprobs, batch, cfg):
    try:
        return plain(logprobs, batch, cfg)
    except:
        return surrogate(logprobs, batch)
def converting(logprobs, batch, cfg):
    try:
        return plain(logprobs, batch, cfg)
    except BaseException as error:
        raise ValueError("no loss") from error
"""
)


def stopped_after_one_step(ran) -> None:
    """The second step was interrupted: nothing of it is kept, and the first is whole."""
    assert Path("asked").exists()
    assert ran.code == 128 + signal.SIGINT, ran.err
    steps = [json.loads(line) for line in Path("runs/toy/metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1]
    assert os.listdir("runs/toy/checkpoints") == ["step-000001"]
    assert os.listdir("runs/toy/completions") == ["step-000001.parquet"]
    assert "failed" not in ran.err
    assert "ignored" not in ran.err


@pytest.mark.each_value
@pytest.mark.parametrize("calls", ["step", "completion"])
@pytest.mark.parametrize("function", ["plain", "swallowing", "converting", "unraisable", "asynchronous", "forgiving"])
def test_in_an_inline_reward(run_cli, recipe, function: str, calls: str) -> None:
    Path("mine.py").write_text(REWARD.format(pid="os.getpid()"))
    use = f"rewards=[{{use: 'mine.py:{function}', isolation: inline, calls: {calls}}}]"
    stopped_after_one_step(run_cli("train", recipe, use))
    if function not in ("swallowing", "converting"):  # which hide it until their call is over
        assert not Path("after").exists()


@pytest.mark.parametrize("calls", ["step", "group", "completion"])
def test_while_a_worker_scores(run_cli, recipe, calls: str) -> None:
    """After the last token, and while others decode."""
    Path("mine.py").write_text(REWARD.format(pid=os.getpid()))
    stopped_after_one_step(run_cli("train", recipe, f"rewards=[{{use: 'mine.py:plain', calls: {calls}}}]"))


@pytest.mark.parametrize("function", ["plain", "swallowing", "converting"])
def test_in_a_custom_loss(run_cli, recipe, function: str) -> None:
    Path("mine.py").write_text(LOSS.format(pid="os.getpid()"))
    stopped_after_one_step(run_cli("train", recipe, f"loss.use='mine.py:{function}'"))


def test_in_a_logger_which_is_let_finish(run_cli, recipe) -> None:
    """A step that is told of is done: the signal is noted, and the next step does not begin."""
    Path("mine.py").write_text(
        PLAIN.format(pid="os.getpid()")
        + "def log(record):\n    interrupt()\n    with open('told', 'w') as file: file.write(str(record.step))\n"
    )
    stopped_after_one_step(run_cli("train", recipe, "log.use=['mine.py:log']"))
    assert Path("told").read_text() == "1"


@pytest.mark.parametrize(("raised", "code", "steps"), [("SystemExit(3)", 0, [1, 2]), ("KeyboardInterrupt", 130, [1])])
def test_what_a_logger_raises_itself_costs_no_step(run_cli, recipe, raised: str, code: int, steps: list[int]) -> None:
    Path("mine.py").write_text(f"def log(record):\n    raise {raised}\n")
    assert run_cli("train", recipe, "log.use=['mine.py:log']").code == code
    kept = [json.loads(line)["step"] for line in Path("runs/toy/metrics.jsonl").read_text().splitlines()]
    assert kept == steps
    assert os.listdir("runs/toy/checkpoints") == [f"step-00000{steps[-1]}"]


def test_an_error_without_a_signal_stays_what_it_is() -> None:
    with StopRequest() as stop, pytest.raises(ValueError, match="mine"), stop.interrupts():
        raise ValueError("mine")
    with StopRequest() as stop, stop.interrupts():
        pass
    broken = ValueError("of what the signal broke")
    with StopRequest() as stop:
        interrupted = stop.interrupts()
        interrupted.__enter__()
        stop.signal = signal.SIGTERM
        with pytest.raises(Stopped) as error:
            interrupted.__exit__(ValueError, broken, None)
    assert error.value.__cause__ is broken
