"""Every setting of a recipe, changed, changes something that a run does or leaves behind, or is refused.

A setting that the schema gains has to enter `settings_table.MATTERS`, with a value and the settings that come first.
The run with the settings that come first, and the run with the value besides, must differ in what `left_behind` sees.
A run has one step, unless the settings that come first ask for more.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pyarrow.parquet as pq
import pytest
import wandb
from rich.console import Console
from runs.agents import AGENT
from runs.conversing import calls_first_tool, talker, thinker
from runs.driver import timeless
from settings_table import EVAL, FILTERED, KL, MATTERS, REFUSED, SAVING, TALK, TOOL, WANDB
from telemetry.trackios import trackio_stand_in

from grpo.backend import device
from grpo.config import DataConfig
from grpo.config.describe import settings
from grpo.data.loading import load_rows
from grpo.data.rates import SolveRates
from grpo.environments import scheduler
from grpo.environments.chat import Chat
from grpo.errors import RunError, UserError
from grpo.planning import planner
from grpo.planning.footprint import measure_footprint
from grpo.processes.sandbox.runner import missing
from grpo.recipes import load_recipe
from grpo.runs.loop import Loop
from grpo.runs.prepare import prepare
from grpo.runs.resume import context, find_start, plan_of
from grpo.runs.revisions import revisions_of
from grpo.runs.signals import StopRequest
from grpo.telemetry.loggers import open_loggers
from grpo.training import gap, optimizer
from grpo.training.packing import Packing


def leaves() -> set[str]:
    """Every key of the schema that holds a value of its own. `environments` has the keys of `environment`."""
    keys = {one.key for one in settings() if "<name>" not in one.key} - {"environments"}
    return {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}


def test_every_setting_is_here() -> None:
    refused = {override.partition("=")[0] for override, _, _ in REFUSED}
    assert leaves() - set(MATTERS) == refused - set(MATTERS)
    assert set(MATTERS) - leaves() == set()


GRADES = """
import os, time

def varied(completions, part=8, **columns):
    return [sum(map(ord, str(text))) % 8 / part for text in completions]

def letters(completions, **columns):
    return [sum(c.isalpha() for c in text) / 8 for text in completions]

def at_home(completions, **columns):
    return [float(os.environ["HOME_PROCESS"] == str(os.getpid()))] * len(completions)

def formed(completions, **columns):
    return [float(isinstance(completion, list)) for completion in completions]

def secretive(completions, **columns):
    return [float("A_TOKEN" in os.environ)] * len(completions)

def large(completions, **columns):
    held = b"x" * 2**28
    time.sleep(0.3)
    return varied(completions)

def slow(completions, **columns):
    time.sleep(0.6)
    return varied(completions)

def crowded(completions, **columns):
    return [float(len(completions))] * len(completions)

def partly(completions, **columns):
    return [1.0 if n % 2 else float("nan") for n, _ in enumerate(completions)]

def drifts(completions, prompts, trainer_state, **columns):
    done, held_out = trainer_state.global_step, "+0" in prompts[0]
    if held_out:
        return [(0.5, 1.0, 0.0)[done]] * len(completions)
    return [10.0 * (done == 2) + n / 8 for n, _ in enumerate(completions)]

def rarely(completions, prompts, **columns):
    return [float(n == 0 and "1+" in prompt) for n, prompt in enumerate(prompts)]
"""
DATA = """
def rows(n=4):
    return [{"question": f"What is {i}+1?", "answer": str(i + 1)} for i in range(n)]

def others():
    return [{"question": f"And {row['question']}", "answer": row["answer"]} for row in rows()]
"""
TALKS = """
import os, random, time
from types import SimpleNamespace

if os.environ.get("HOME_PROCESS") != str(os.getpid()):
    with open("told", "a") as file:
        file.write("environment ")

class Twice:
    async def rollout(self, task, sampler):
        rows = sampler.begin(task.prompt_ids, sampler.n, keep=True)
        return await sampler.gather(*(self.play(row, sampler) for row in rows))
    async def play(self, row, sampler):
        first = await sampler.ended(row)
        return await sampler.extend(row, [5]) if row.room else first

class Doubts:
    def __init__(self, doubt="Sure"):
        self.doubt = doubt
    def reset(self, **row):
        return f" {self.doubt}?"
    def step(self, text):
        return SimpleNamespace(result="?", reward=random.random(), done=False)
    def get_reward(self):
        return random.random()

class Slow(Doubts):
    def get_reward(self):
        time.sleep(0.3)
        return 0.5

class Late(Doubts):
    begun = False  # a first one is begun before the run

    def reset(self, **row):
        time.sleep(0.3 if Late.begun else 0.0)
        Late.begun = True

class Secretive(Doubts):
    def get_reward(self):
        return float("A_TOKEN" in os.environ)

class Large(Doubts):
    def get_reward(self):
        held = b"x" * 2**27
        time.sleep(0.3)
        return 0.5

class Partly(Doubts):
    def get_reward(self):
        if random.random() < 0.5:
            raise ValueError("partly")
        return 0.5

def look(query: str, times: int = 1) -> str:
    '''
    Looks something up.

    Args:
        query: What.
        times: How often.
    '''
    return query * times

def find(query: str) -> str:
    '''
    Finds something.

    Args:
        query: What.
    '''
    return "nothing"

def breaks(query: str) -> str:
    '''
    Fails.

    Args:
        query: Whatever.
    '''
    raise KeyError(query)

def pause(query: str) -> str:
    '''
    Waits.

    Args:
        query: What for.
    '''
    time.sleep(0.3)
    return query
"""
CHOOSING = """
class Last:
    def __init__(self, stream):
        self.stream = stream
    def take(self, n):
        return [self.stream.task(len(self.stream) - 1)] * n
    def observe(self, groups): ...
    def metrics(self):
        return {}
    def state(self):
        return {}
    def load_state(self, state): ...
"""
LOSS = """
def halved(logprobs, batch, cfg):
    return -0.5 * logprobs * batch.advantages

def nothing(logprobs, batch, cfg):
    return logprobs * float("nan")

def tell(record):
    with open("told", "a") as file:
        file.write(f"{record.step} ")
"""


@pytest.fixture(scope="module")
def bench(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Runs the toy recipe with overrides, and returns what that left behind; the same run is made once."""
    folder = tmp_path_factory.mktemp("settings")
    rows = [{"question": f"What is {n}+{n}?", "hint": f"{n}+{n}{'+0' * n}?", "answer": str(2 * n)} for n in range(1, 5)]
    for name, some in (("train.jsonl", rows), ("more.jsonl", [{**row, "question": row["hint"]} for row in rows])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "rows.py").write_text(DATA)
    (folder / "grades.py").write_text(GRADES)
    (folder / "loss.py").write_text(LOSS)
    (folder / "talk.py").write_text(TALKS)
    (folder / "play.py").write_text(AGENT)
    (folder / "choose.py").write_text(CHOOSING)
    for name, rates in (("rates.jsonl", {0: 0.0, 1: 0.5, 2: 1.0}), ("others.jsonl", {0: 0.5, 3: 1.0})):
        SolveRates.of(rates, load_rows(DataConfig(source=str(folder / "train.jsonl"))), {}).write(folder / name)
    folder.chmod(0o755)  # the sandbox has a user of its own
    other_model(toy_folder, folder / "other")
    talker(toy_folder, folder / "talker")
    thinker(toy_folder, folder / "thinker")
    (folder / "toy.yaml").write_text(
        f"model: {{name: {toy_folder}}}\n"
        'data: {source: train.jsonl, prompt: "{question}"}\n'
        "rollout: {prompts_per_step: 2, num_generations: 4, max_completion_length: 8}\n"
        'rewards: [{use: "grades.py:varied", isolation: inline}]\n'
        "optim: {steps: 1, learning_rate: 1e-3}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME_PROCESS", str(os.getpid()))
        patch.setenv("A_TOKEN", "secret")
        patch.setattr(Chat, "parse", calls_first_tool)
        patch.setattr(scheduler, "GRACE", 600.0)  # on a busy machine, too, the same run is the same run
        footprints: dict[bool, Any] = {}

        def measured(
            policy: Any, checkpointing: bool, memory: int
        ) -> Any:  # a quarter of a second, the same every time
            if checkpointing not in footprints:
                footprints[checkpointing] = measure_footprint(policy, checkpointing, memory)
            return footprints[checkpointing]

        patch.setattr(planner, "measure_footprint", measured)
        patch.setattr(planner.Planner, "_tried", lambda *_: None)  # what is seen of memory differs from run to run
        patch.setattr(planner.Planner, "_entering", lambda *_: None)
        left_behind("optim.learning_rate=0.01")
        shutil.copytree(folder / "run/checkpoints/step-000001", folder / "saved")
        yield cache(left_behind)


def other_model(toy: Path, folder: Path) -> None:
    """The toy model with other weights, and a chat template that takes an argument."""
    shutil.copytree(toy, folder)
    weights = mx.load(str(folder / "model.safetensors"))
    mx.save_safetensors(str(folder / "model.safetensors"), {name: 0.9 * array for name, array in weights.items()})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] += "{{ tone }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def left_behind(*overrides: str) -> dict[str, Any]:
    """What a run planned, said, logged and wrote, without what the clock and the recipe's own copy say."""
    cfg = load_recipe(Path("toy.yaml"), ["output_dir=run", *overrides])
    shutil.rmtree(str(cfg.output_dir), ignore_errors=True)
    Path("told").write_text("")
    told: dict[str, Any] = {"folder": cfg.output_dir, "wandb": [], "trackio": [], "compiled": 0, "error": None}
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        _watch(patch, told)
        run = prepare(cfg)
        stack.enter_context(run.opened)
        start = find_start(cfg)
        state = start.load(run.trainer)
        adapter, commits = run.trainer.policy.adapters.config, revisions_of(run.trainer.cfg)
        written = context(cfg, adapter, plan_of(run.trainer), commits, run.rows)
        told |= {"plan": run.plan.lines(), "slots": run.plan.slots}  # its notes only talk of settings
        told["shared"] = run.trainer.policy.share_prompts
        told["packed"] = Packing.of(run.trainer.cfg.optim, run.trainer.cfg.rollout, gpu=True).packs
        folder = stack.enter_context(start.folder())
        log = open_loggers(stack, cfg, folder, Console(quiet=True), state.run_id)
        try:
            Loop(run.trainer, folder, written, log, StopRequest(), state, evaluate=run.evaluator).run()
        except RunError as error:
            told["error"] = str(error)
        told |= {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*"))}
    return {**told, "told": Path("told").read_text()}


def _watch(patch: pytest.MonkeyPatch, told: dict[str, Any]) -> None:
    """Count what is compiled (nothing is on a CPU), and take W&B's place."""

    def compiled(function: Any) -> Any:
        told["compiled"] += 1
        return device.compiled(function)

    def init(**given: Any) -> WandbRun:
        told["wandb"].append({name: value for name, value in given.items() if name not in ("id", "config")})
        return WandbRun(told["wandb"])

    patch.setattr(optimizer, "compiled", compiled)
    patch.setattr(wandb, "init", init)
    patch.setitem(sys.modules, "trackio", trackio_stand_in(told["trackio"]))
    patch.setattr(wandb, "Table", lambda columns, data: len(data))


class WandbRun:
    """Takes what a run would send to W&B."""

    offline, dir = False, ""

    def __init__(self, sent: list[Any]) -> None:
        self._sent = sent

    def log(self, values: dict[str, Any], **where: Any) -> None:
        self._sent.append(values.get("completions"))

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log_artifact(self, _: Any) -> None: ...

    def alert(self, **_: Any) -> None: ...

    def finish(self) -> None: ...


def _content(path: Path) -> Any:
    """What of a file depends on nothing but the run."""
    if path.name in ("metrics.jsonl", "eval.jsonl"):
        return timeless(path)
    if path.suffix == ".parquet":
        return pq.read_metadata(path).num_rows
    if path.name == "state.json":
        return {**json.loads(path.read_text()), "run_id": None}
    return path.read_bytes() if path.suffix == ".safetensors" else None


@pytest.mark.parametrize("key", MATTERS)
def test_a_setting_matters(bench: Callable[..., Any], key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if key == "environment.sandbox" and (why := missing()):
        pytest.skip(f"no sandbox here: {why}")
    if key in ("optim.max_logp_difference", "alarms.logp_difference"):  # a right model's gap is some 1e-7
        monkeypatch.setattr(gap, "gap_bound", lambda *_: 1e-7)
    value, *first = MATTERS[key]
    before, after = bench(*first), bench(*first, f"{key}={value}")
    assert before != after
    if key == "optim.max_logp_difference":
        assert before["error"] is None
    assert before["error"] is None or before["error"] != after["error"]


@pytest.mark.parametrize(("override", "said", "first"), REFUSED, ids=range(len(REFUSED)))
def test_what_would_do_nothing_is_refused(bench: Callable[..., Any], override: str, said: str, first: Any) -> None:
    with pytest.raises(UserError) as error:
        bench(*first, override)
    assert said in str(error.value)


def test_a_run_alone_changes_nothing(bench: Callable[..., Any]) -> None:
    """Or any setting would seem to matter."""
    for first in ((), KL, FILTERED, EVAL, SAVING, WANDB, TALK, TOOL):
        assert bench(*first) == left_behind(*first)
