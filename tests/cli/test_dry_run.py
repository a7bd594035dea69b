"""`grpo train --dry-run` checks what a run would, and touches nothing."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path

import pytest

from grpo.doctor import services
from grpo.doctor.finding import Finding
from grpo.runs import folder as run_folders


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in str(path)
    }


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("log.use=[nofile.py:log]", "logger 'nofile.py:log': there is no file nofile.py"),
        ("log.use=[mine.py:lg]", "mine.py:lg': no function 'lg' in it. Did you mean 'log'?"),
        ("log.use=[mine.py:two]", "mine.py:two': missing a required argument: 'b'; grpo calls it with one"),
    ],
)
def test_a_logger_is_looked_for_before_the_model_is_loaded(run_cli, recipe, override: str, said: str) -> None:
    Path("mine.py").write_text("def log(record): ...\ndef two(a, b): ...\n")
    for flags in (["--dry-run"], []):
        ran = run_cli("train", recipe, "model.name=./absent", override, *flags)
        assert (ran.code, len(ran.err.splitlines())) == (2, 1)
        assert said in ran.err


def test_a_logger_is_imported_once(run_cli, recipe) -> None:
    Path("mine.py").write_text("with open('imported', 'a') as file: file.write('x')\ndef log(record): ...\n")
    assert run_cli("train", recipe, "log.use=[mine.py:log]").code == 0
    assert Path("imported").read_text() == "x"


@pytest.mark.parametrize(("key", "package"), [("log.wandb={}", "wandb"), ("log.tensorboard=true", "tensorboardX")])
def test_a_package_that_cannot_be_imported_is_said(run_cli, recipe, monkeypatch, key: str, package: str) -> None:
    real = builtins.__import__
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr("importlib.import_module", lambda name: real("not_there") if name == package else real(name))
    ran = run_cli("train", recipe, key, "--dry-run")
    assert ran.code == 2
    assert f"{key.partition('=')[0]}: the package {package} cannot be imported (No module named 'not_there')" in ran.err


def test_that_nobody_is_logged_in_to_wandb_is_said(run_cli, recipe, monkeypatch) -> None:
    finding = Finding("wandb", "warn", "not logged in, which only log.wandb wants", "`wandb login`")
    monkeypatch.setattr(services, "wandb", lambda: finding)
    said = "W&B: not logged in: the run stays in its folder for `wandb sync`, unless you see to it first: `wandb login`"
    assert said in run_cli("train", recipe, "log.wandb={}", "--dry-run").out
    for quiet in ("log.wandb={mode: offline}", "log.wandb=null"):
        assert "W&B" not in run_cli("train", recipe, quiet, "--dry-run").out


def test_it_says_what_takes_memory_and_how_long_completions_may_be(run_cli, recipe) -> None:
    said = run_cli("train", recipe, "--dry-run", "memory.limit_gb=0.5").out
    assert "peak " in said
    assert "of 512 MB (memory.limit_gb): what stays, and the " in said
    assert "longest completion that would fit: " in said
    refused = run_cli("train", recipe, "--dry-run", "memory.limit_gb=0.001")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert "memory.limit_gb allows 1 MB" in refused.err
    assert "longest completion" not in run_cli("train", recipe).out


def test_parity_is_part_of_it(run_cli, recipe) -> None:
    assert "mean gap" in run_cli("train", recipe, "--dry-run").out


def test_a_run_that_is_there_is_no_hindrance_and_stays_as_it_is(run_cli, recipe) -> None:
    assert run_cli("train", recipe).code == 0
    Path("runs/toy/checkpoints/.step-000002.replaced").mkdir()
    before = contents(Path("runs"))
    holds = "runs/toy holds a run: training needs --resume, --overwrite or another output_dir"
    for flags, hindered in ([], True), (["--overwrite"], False), (["--resume"], False):
        ran = run_cli("train", recipe, "--dry-run", *flags)
        assert (ran.code, ran.err) == (0, "")
        assert (holds in ran.out) == hindered
        assert contents(Path("runs")) == before
    assert run_cli("train", recipe).code == 2


def test_neither_is_a_run_that_is_going_on_or_half_replaced(run_cli, recipe, monkeypatch) -> None:
    assert run_cli("train", recipe).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(run_folders, "is_running", lambda _: True)
        assert run_cli("train", recipe, "--dry-run").code == 0
    former = Path("runs/toy/.former")
    former.mkdir()
    Path("runs/toy/recipe.yaml").rename(former / "recipe.yaml")
    before = contents(Path("runs"))
    assert run_cli("train", recipe, "--dry-run").code == 0
    assert contents(Path("runs")) == before


def test_files_that_no_run_wrote_are_a_hindrance(run_cli, recipe) -> None:
    Path("precious").mkdir()
    Path("precious/metrics.jsonl").write_text("mine")
    ran = run_cli("train", recipe, "output_dir=precious", "--dry-run")
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert "has a metrics.jsonl that no grpo run wrote" in ran.err


def test_each_reward_is_called_once(run_cli, recipe: Path) -> None:
    Path("digits.py").write_text("def reward(completions, **columns):\n    return completions.nothing_of_the_kind\n")
    ran = run_cli("train", recipe, "--dry-run")
    assert ran.code == 2
    assert "nothing_of_the_kind" in ran.err


@pytest.mark.parametrize("setting", ["rollout.num_generations=100000000000", "rewards.0.timeout=1e30"])
def test_what_no_machine_has_is_refused(run_cli, recipe: Path, setting: str) -> None:
    ran = run_cli("train", recipe, "--dry-run", setting)
    assert ran.code == 2
    assert f"command line: {setting.partition('=')[0]}: expected less than or equal to" in ran.err
    assert "less than or equal to" in ran.err
