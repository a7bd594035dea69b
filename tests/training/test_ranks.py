"""Several processes on one machine, by mlx.launch and the ring backend: one run, divided."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import ranks_worker
import test_update
from launching import LAUNCH, free_ports, launch
from planning.loads import workload
from runs.driver import run, timeless

from grpo.backend.ranks import Ranks
from grpo.errors import RunError, UserError
from grpo.generation.choice import find_decoding
from grpo.planning.planner import make_plan
from grpo.recipes import load_recipe
from grpo.runs.completions import read_completions, stored_steps
from grpo.runs.prepare import prepare
from grpo.runs.processes import one_plan
from grpo.runs.resume import find_start
from grpo.training.trainer import Trainer

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed beside this Python")


def flat(values: Any) -> Iterator[float]:
    """The numbers in lists of lists."""
    if isinstance(values, list):
        for value in values:
            yield from flat(value)
    else:
        yield values


@pytest.mark.slow
def test_two_processes_give_the_loss_gradient_and_step_of_one(tmp_path) -> None:
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
    ranks_worker.gradient(Ranks(), tmp_path / "1")
    ran = launch(2, HERE / "ranks_worker.py", "gradient", tmp_path / "2")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (alone,), (first, second) = (
        [json.loads((tmp_path / f"{n}/facts-{rank}.json").read_text()) for rank in range(n)] for n in (1, 2)
    )
    assert first["batches"] + second["batches"] == alone["batches"] > 1
    assert first["size"] == 2
    assert first["told"] == second["told"] == ["a", "b", "c"]
    for name, value in alone.items():
        if name not in ("batches", "size", "told"):
            assert first[name] == second[name] == pytest.approx(value, abs=1e-6), name
    (alone,), both = (
        [json.loads((tmp_path / f"{n}/measures-{rank}.json").read_text()) for rank in range(n)] for n in (1, 2)
    )
    rows = alone.pop("rows")
    looked = [own.pop("rows") for own in both]
    assert sum(looked) == rows  # each looked at its own alone
    assert min(looked) > 0
    for own in both:
        for name, value in alone.items():
            assert list(flat(own[name])) == pytest.approx(list(flat(value)), rel=1e-6, abs=1e-6), name
    for kind in ("gradient", "policy"):
        expected = mx.load(str(tmp_path / f"1/{kind}-0.safetensors"))
        for rank in range(2):
            got = mx.load(str(tmp_path / f"2/{kind}-{rank}.safetensors"))
            assert max(mx.abs(got[path] - array).max().item() for path, array in expected.items()) < 1e-6


def test_measurements_are_divided_even_where_all_rows_would_fit_at_once(recipe) -> None:
    class Two(Ranks):
        def __init__(self) -> None:
            super().__init__()
            self.size = 2

    trainer = prepare(load_recipe(recipe)).trainer
    parts = trainer.cfg, trainer.policy, trainer.tasks, trainer.engine, trainer.scorer
    assert Trainer(*parts).gauges.packing.parts == 1
    assert Trainer(*parts, ranks=Two()).gauges.packing.parts == 2
    trainer.scorer.close()


def test_a_run_of_two_processes_is_one_run(recipe) -> None:
    ran = launch(2, "-c", "from grpo.cli import main; main()", "train", recipe, "optim.steps=3")
    said = ran.stdout + ran.stderr
    assert "finished after step 3" in said, said
    assert said.count("2 steps of") + said.count("3 steps of") == 1  # one of them talks
    steps = [json.loads(line) for line in Path("runs/toy/metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert [step["num_prompts"] for step in steps] == [2, 2, 2]
    assert Path("runs/toy/checkpoints/step-000003/adapters.safetensors").exists()
    run(recipe, "output_dir=alone", "optim.steps=3")
    assert sampled(Path("runs/toy")) == sampled(Path("alone"))


def sampled(folder: Path) -> list[list[tuple[int, ...]]]:
    """What was sampled, step by step, in the order of the step's prompts."""
    files = [read_completions(path)[1] for path in stored_steps(folder / "completions")]
    return [[one.trajectory.token_ids for group in groups for one in group.rollouts] for groups in files]


OLDER = """
from grpo.training.trainer import Trainer
step = Trainer.step
def told(self, n):
    metrics = step(self, n)
    lags = [group.lag for group in metrics.groups]
    weights = sum(array.sum().item() for array in self.policy.adapters.state().values())
    with open(f"told-{self.ranks.rank}", "a") as file:
        print(n, lags, [one.about for one in self.older.kept], weights, file=file)
    return metrics
Trainer.step = told
from grpo.cli import main; main()
"""


@pytest.mark.slow
def test_two_processes_replay_the_same_groups(recipe) -> None:
    Path("rare.py").write_text(
        "def reward(completions, **columns):\n"
        "    return [float(sum(map(ord, text)) % 9 == 0) for text in completions]\n"
    )
    sizes = "rollout={prompts_per_step: 4, num_generations: 4, max_completion_length: 8, reuse: 3}"
    settings = ["optim.steps=5", "optim.learning_rate=0.01", sizes, "rewards=[{use: 'rare.py:reward'}]"]
    ran = launch(2, "-c", OLDER, "train", recipe, *settings)
    assert "finished after step 5" in ran.stdout + ran.stderr, ran.stdout + ran.stderr
    first, second = (Path(f"told-{rank}").read_text() for rank in range(2))
    assert first == second
    steps = [json.loads(line) for line in Path("runs/toy/metrics.jsonl").read_text().splitlines()]
    assert max(step["reuse/groups"] for step in steps) > 0


STOPPED = """
import os, signal
from grpo.training.trainer import Trainer
step = Trainer.step
def stopped(self, n):
    if n == 2 and self.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, n)
Trainer.step = stopped
from grpo.cli import main; main()
"""


@pytest.mark.slow
def test_one_that_is_asked_to_stop_stops_them_all_and_they_go_on_together(recipe) -> None:
    held_out = ["eval.source=train.jsonl", "eval.split=train", "eval.prompts=2", "eval.every=3"]
    settings = ["train", recipe, "optim.steps=4", "checkpoint.every=4", *held_out]
    ran = launch(2, "-c", STOPPED, *settings)
    said = ran.stdout + ran.stderr
    assert "stopped after step 2" in said, said
    assert "rank 0 exited with code" in said  # 143, or -15 where the launcher, seeing the other gone, was faster
    assert Path("runs/toy/checkpoints/step-000002").exists()
    ran = launch(2, "-c", "from grpo.cli import main; main()", *settings, "--resume")
    assert "finished after step 4" in ran.stdout, ran.stdout + ran.stderr
    steps = [json.loads(line)["step"] for line in Path("runs/toy/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    evaluated = [json.loads(line)["step"] for line in Path("runs/toy/eval.jsonl").read_text().splitlines()]
    assert evaluated == [0, 3, 4]


SHARES = """
from pathlib import Path
from grpo.backend.ranks import Ranks
from grpo.rollout import RolloutEngine
rollout = RolloutEngine.rollout
def noted(self, tasks, n, temperature, draws, logprobs=True, *rest, **named):
    groups = rollout(self, tasks, n, temperature, draws, logprobs, *rest, **named)
    if not logprobs:
        with Path(f"asked-{Ranks.launched().rank}").open("a") as file:
            print([group.task.index for group in groups], file=file)
    return groups
RolloutEngine.rollout = noted
from grpo.cli import main; main()
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_does_each_its_share(recipe) -> None:
    held_out = ["eval.source=train.jsonl", "eval.split=train", "eval.prompts=3", "eval.samples=4"]
    settings = ["optim.steps=1", "rollout.max_completion_length=12", *held_out]
    ran = launch(2, "-c", SHARES, "train", recipe, "output_dir=runs/two", *settings)
    assert "finished after step 1" in ran.stdout, ran.stdout + ran.stderr
    assert ran.stdout.count("eval at step 0") == 1
    assert Path("asked-0").read_text().splitlines() == ["[0, 2]"] * 4  # greedy and sampled, before and after
    assert Path("asked-1").read_text().splitlines() == ["[1]"] * 4
    run(recipe, "output_dir=runs/one", *settings)
    one, two = (timeless(Path(f"runs/{name}/eval.jsonl")) for name in ("one", "two"))
    assert one[0] == two[0]
    assert [line["step"] for line in two] == [0, 1]
    assert one[0]["n"] == 3


@pytest.mark.slow
def test_eval_by_two_processes_is_that_of_one_and_said_once(recipe, run_cli) -> None:
    """Of a single prompt: the second process has none."""
    settings = ["--data", "train.jsonl", "--samples", "4", "--prompts", "1"]
    ran = launch(2, "-c", "from grpo.cli import main; main()", "eval", recipe, *settings)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "by digits, n=1" in ran.stdout
    assert ran.stdout == run_cli("eval", recipe, *settings).out


class Two(Ranks):
    """The second of two processes; what the first holds is given."""

    def __init__(self, first: object) -> None:
        super().__init__()
        self.rank, self.size, self._first = 1, 2, first

    def gather(self, mine: object) -> list:
        return [self._first, mine]


def test_processes_that_would_start_from_different_states_are_refused() -> None:
    Two(3).check_same("the step to go on after", 3)
    with pytest.raises(UserError, match="the step to go on after: process 1 of 2 differs from process 0"):
        Two(3).check_same("the step to go on after", 0)


def test_a_check_that_fails_in_one_process_ends_all() -> None:
    def fails() -> None:
        raise RunError("a gap of 0.3")

    assert Two(None).checked(lambda: "sound") == "sound"
    assert Ranks().checked(lambda: "sound") == "sound"
    with pytest.raises(RunError, match=r"^process 0 of 2: a gap of 0\.2$"):
        Two("a gap of 0.2").checked(lambda: "sound")
    told = []
    both = Two(None)
    both.gather = lambda mine: told.append(mine) or [None, mine]
    with pytest.raises(RunError, match=r"^a gap of 0\.3$"):
        both.checked(fails)
    assert told == ["a gap of 0.3"]


def test_a_start_is_compared(recipe, monkeypatch) -> None:
    compared = []
    monkeypatch.setattr(Ranks, "check_same", lambda _, what, mine: compared.append((what, mine)))
    cfg = load_recipe(recipe)
    trainer = prepare(cfg).trainer
    compared.clear()  # of the prompts
    find_start(cfg).load(trainer)
    assert compared[1] == ("the step to resume after", 0)
    assert compared[0][1]["rewards"][0]["use"].endswith("digits.py:reward")


def test_a_plan_that_does_not_fit_in_one_process_ends_all(recipe, monkeypatch) -> None:
    """The others would wait for its plan for ever: its refusal is said to them, and so is a limit beyond its memory."""
    said = []
    monkeypatch.setattr(Ranks, "gather", lambda _, mine: said.append(mine) or [mine])
    for limit, words in [(1e-6, "this cannot fit"), (1e6, "more than the machine has")]:
        with pytest.raises(UserError, match=words):
            prepare(load_recipe(recipe, [f"memory.limit_gb={limit}"]))
        assert words in said[-1]


def test_patience_is_longer_where_others_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """As agents may, by default an hour: it is no process that died. Who says how long to wait has the last word."""
    monkeypatch.delenv("GRPO_RANK_TIMEOUT", raising=False)
    ranks = Ranks()
    ranks.expect(3600.0)
    assert ranks.patience == 1800.0 + 3600.0
    monkeypatch.setenv("GRPO_RANK_TIMEOUT", "7")
    ranks = Ranks()
    ranks.expect(3600.0)
    assert ranks.patience == 7.0


@pytest.mark.parametrize(("tokens", "checkpointing"), [(512, False), (4096, True), (4096, False), (8192, False)])
def test_all_processes_take_the_plan_of_the_one_with_least_room(make_policy, tokens: int, checkpointing: bool) -> None:
    policy, other = make_policy().policy, make_policy().policy
    mine, theirs = plan_of(policy, 4096), plan_of(other, tokens, checkpointing)
    theirs = replace(theirs[0], slots=1, kept_bytes=1, fed=2, drafts=1), theirs[1]
    plan, optim, _ = one_plan(Two(theirs), policy, *mine)
    least = min(4096, tokens), checkpointing and tokens <= 4096
    assert (plan.micro_batch, plan.checkpointing) == least
    assert (optim.micro_batch_tokens, optim.gradient_checkpointing) == least
    assert policy.gradient_checkpointing is least[1]
    assert (plan.slots, plan.kept_bytes) == (mine[0].slots, mine[0].kept_bytes)
    assert (plan.fed, plan.drafts) == (mine[0].fed, mine[0].drafts) == (8, mine[0].drafts)


@pytest.mark.parametrize("where", ["here", "there"])
def test_where_one_process_has_room_for_one_micro_batch_at_a_time_all_go_one_by_one(make_policy, where: str) -> None:
    mine, theirs = plan_of(make_policy().policy, 4096), plan_of(make_policy().policy, 4096)
    roomy, short = (replace(mine[0], lanes=2), mine[1]), (replace(theirs[0], lanes=1, alone=True), theirs[1])
    pair = (short, roomy) if where == "here" else (roomy, short)
    plan, _, _ = one_plan(Two(pair[1]), make_policy().policy, *pair[0])
    assert (plan.lanes, plan.alone) == (1, True)


def plan_of(policy, tokens: int, checkpointing: bool = False):
    cfg = test_update.recipe(optim={"micro_batch_tokens": tokens, "gradient_checkpointing": checkpointing})
    return make_plan(workload(cfg, 8), policy, find_decoding(policy.model))


def test_failures_before_a_resume_are_counted_once(recipe) -> None:
    cfg = load_recipe(recipe)
    trainer = prepare(cfg).trainer
    trainer.scorer.records["digits"].kinds["timeout"] = 3
    state = trainer.state()
    first, second = prepare(cfg).trainer, prepare(cfg).trainer
    second.ranks = Two(None)
    for one in (first, second):
        one.load_state(state)
    assert [one.scorer.failures["digits"] for one in (first, second)] == [3, 0]


def test_a_process_that_is_killed_ends_the_others_in_bounded_time(tmp_path) -> None:
    """MLX notices, long before the clock does. The time to start does not count: on a busy machine it is the most."""
    ran = launch(2, HERE / "ranks_worker.py", "die", tmp_path, timeout=240, GRPO_RANK_TIMEOUT="100")
    assert f"process 1 of 2 ({socket.gethostname()}) died" in ran.stderr
    assert float((tmp_path / "waited-0").read_text()) < 20


def test_alone_every_exchange_is_nothing() -> None:
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.first, ranks.own) == (0, 1, True, ())
    assert ranks.share([1, 2, 3]) == ranks.merge([1, 2, 3]) == [1, 2, 3]
    assert ranks.gather("x") == ["x"]
    ranks.wait()
    ranks.check_same("anything", 1)
    assert ranks.sum_counts({"a": 2}) == {"a": 2.0}


@pytest.mark.parametrize("said", ["soon", "0", "-3", "nan", "inf"])
def test_a_patience_that_is_none_is_a_mistake(monkeypatch, said: str) -> None:
    monkeypatch.setenv("GRPO_RANK_TIMEOUT", said)
    with pytest.raises(UserError, match=f"GRPO_RANK_TIMEOUT: '{said}' is not a number of seconds above 0"):
        Ranks()


def test_a_process_whose_fellows_never_start_says_so_and_ends(tmp_path: Path) -> None:
    port = free_ports(2)
    (tmp_path / "hosts").write_text(json.dumps([[f"127.0.0.1:{port}"], [f"127.0.0.1:{port + 1}"]]))
    about = {"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "hosts"), "GRPO_RANK_TIMEOUT": "1"}
    code = "from grpo.backend.ranks import Ranks; Ranks.launched(); print('together')"
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, env={**os.environ, **about}, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == -9
    assert ran.stdout == ""
    assert ran.stderr.startswith("grpo: process 0 waited 1 s for the others to start: one of them has not")
    assert ran.stderr.count("\n") == 1


def test_a_process_that_is_connected_waits_longer_than_for_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script's second run may begin when one of its processes has done something else for long."""
    waits: list[float] = []

    @contextmanager
    def in_time(seconds: float) -> Iterator[None]:
        waits.append(seconds)
        yield

    monkeypatch.setattr("grpo.backend.ranks.in_time", in_time)
    monkeypatch.setattr(mx.distributed, "init", lambda **_: None)
    monkeypatch.setattr(Ranks, "__init__", lambda self, *_: setattr(self, "size", 1))
    monkeypatch.setattr(Ranks, "_connected", False)
    monkeypatch.setenv("MLX_RANK", "0")
    Ranks.launched()
    Ranks.launched()
    assert waits == [300.0]


def test_one_clear_message_when_nothing_is_heard() -> None:
    code = "import time; from grpo.backend.ranks import Ranks; r = Ranks(); r.patience = 0.2"
    code += "\nwith r._watched(): time.sleep(9)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=25)
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert "nothing from the others" in ran.stderr


DRAWN = """
import json, sys
from pathlib import Path
from grpo.training.trainer import Trainer
step = Trainer.step
def stepped(self, n):
    made = step(self, n)
    Path(f"drawn-{self.ranks.rank}-{n}.json").write_text(json.dumps(self.tasks.state()))
    return made
Trainer.step = stepped
from grpo.cli import main; main()
"""


@pytest.mark.slow
def test_all_processes_draw_by_the_solve_rates_of_all_groups(recipe, run_cli) -> None:
    """And the file of solve rates is the same as one process writes."""
    pooled = ["data.curriculum={hard_threshold: 0.1}", "optim.steps=3"]
    ran = launch(2, "-c", DRAWN, "train", recipe, *pooled)
    assert "finished after step 3" in ran.stdout + ran.stderr, ran.stdout + ran.stderr
    for step in (1, 2, 3):
        first, second = (json.loads(Path(f"drawn-{rank}-{step}.json").read_text()) for rank in range(2))
        assert first == second
        assert first["draws"] == 2 * step
    assert first["solve_rates"] != [""]
    settings = ["--data", "train.jsonl", "--samples", "2", "--solve-rates"]
    ran = launch(2, "-c", "from grpo.cli import main; main()", "eval", recipe, *settings, "two.jsonl")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert run_cli("eval", recipe, *settings, "one.jsonl").code == 0
    assert Path("two.jsonl").read_text() == Path("one.jsonl").read_text()
