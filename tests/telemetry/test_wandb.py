"""Weights & Biases by its own package: what is written is all there, and a service that is away ends nothing."""

import json
import struct
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import wandb
import yaml
from telemetry.test_telemetry import EVAL, GROUPS, VALUES

from grpo.plugins import find_recipe
from grpo.recipes import load_recipe
from grpo.runs.state import RunState
from grpo.telemetry import weights_and_biases
from grpo.telemetry.weights_and_biases import WandbLogger
from grpo.training.state import TrainerState
from grpo.types import StepMetrics

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path) -> None:
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()  # it reads its environment once
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))


def records(folder: Path) -> list:
    """The records of an offline run: LevelDB's log format, with protocol buffers in it."""
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # as at the end of a process: everything is on the disk
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, found, parts = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into what is left of a block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(parts))
            parts = b""
    return found


def values(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_an_offline_run_holds_every_metric_and_the_table(recipe, run_cli) -> None:
    recipe.write_text(recipe.read_text() + "eval: {split: train, prompts: 2, samples: 2}\n")
    settings = ["log.wandb={mode: offline, project: mine, group: g, tags: [a, b], notes: why, completions: 3}"]
    ran = run_cli("train", recipe, *settings)
    assert ran.code == 0, ran.err
    (kept,) = Path("runs/toy").glob("wandb/offline-run-*")
    assert f"W&B      wandb sync {kept}\n" in ran.out
    written = records(Path("runs/toy"))
    history = [values(record.history.item) for record in written if record.WhichOneof("record_type") == "history"]
    logged = {entry["train/global_step"]: entry for entry in history if "train/loss" in entry}
    for line in map(json.loads, Path("runs/toy/metrics.jsonl").read_text().splitlines()):
        step, _ = line.pop("step"), line.pop("alarms", None)
        assert {name: logged[step][f"train/{name}"] for name in line} == line
        assert logged[step]["histograms/reward/_type"] == "histogram"
        table = Path("runs/toy").glob(f"wandb/offline-run-*/files/{logged[step]['completions/path']}")
        rows = json.loads(next(table).read_text())
        assert rows["columns"] == ["step", "prompt", "completion", "reward", "advantage"]
        assert [row[0] for row in rows["data"]] == [step] * 3
    measured = [entry for entry in history if "eval/greedy" in entry]
    evals = [json.loads(line) for line in Path("runs/toy/eval.jsonl").read_text().splitlines()]
    assert [(e["train/global_step"], e["eval/avg@2"]) for e in measured] == [(e["step"], e["avg@2"]) for e in evals]
    assert [e["eval/failed_gradings"] for e in measured] == [0.0] * len(evals)
    (run,) = [record.run for record in written if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_group, list(run.tags), run.notes) == ("mine", "g", ["a", "b"], "why")
    newest = json.loads(Path("runs/toy/checkpoints/step-000002/state.json").read_text())
    assert run.run_id == newest["run_id"]
    metrics = {record.metric.glob_name or record.metric.name for record in written if record.HasField("metric")}
    assert {"train/*", "eval/*", "train/global_step"} <= metrics
    artifacts = {record.request.log_artifact.artifact.name: record for record in written}
    kept = {record.artifact.name for record in written if record.WhichOneof("record_type") == "artifact"}
    assert {"toy-recipe", "toy-adapter"} <= kept | set(artifacts)


def test_a_resumed_run_is_the_same_run(recipe, run_cli) -> None:
    settings = ["log.wandb={mode: offline}"]
    assert run_cli("train", recipe, *settings, "optim.steps=1").code == 0
    assert run_cli("train", recipe, *settings, "--resume-changed").code == 0
    parts = list(Path("runs/toy/wandb").glob("offline-run-*/*.wandb"))
    assert (len(parts), len({path.name for path in parts})) == (2, 1)


def test_what_is_logged_again_has_the_place_that_it_had(recipe, run_cli) -> None:
    """W&B takes no record for a step of its own that it has already."""
    settings = ["log.wandb={mode: offline}", "eval={split: train, every: 1, prompts: 2, samples: 1}"]
    assert run_cli("train", recipe, *settings).code == 0
    history = [values(r.history.item) for r in records(Path("runs/toy")) if r.WhichOneof("record_type") == "history"]
    placed = [(entry["_step"], entry["train/global_step"], "train/loss" in entry) for entry in history]
    assert placed == [(1, 0, False), (2, 1, True), (3, 1, False), (4, 2, True), (5, 2, False)]


@pytest.mark.parametrize(
    ("has", "evaluated", "allowed", "asked"),
    [
        (9, False, True, [{"resume": "allow"}, {"resume_from": "abc?_step=6"}]),
        (9, True, True, [{"resume": "allow"}, {"resume_from": "abc?_step=7"}]),
        (9, True, False, [{"resume": "allow"}, {"resume_from": "abc?_step=7"}, {"resume": "allow"}]),
        (7, False, True, [{"resume": "allow"}]),
        (8, True, True, [{"resume": "allow"}]),
    ],
)
def test_later_steps_are_taken_back(tmp_path, monkeypatch, caplog, has, evaluated, allowed, asked) -> None:
    """Against a stand-in for the service: it has records up to its own step `has` - 1, and may refuse to rewind."""
    calls = []

    def init(**settings):
        calls.append({name: settings[name] for name in ("resume", "resume_from") if name in settings})
        if "resume_from" in settings and not allowed:
            raise wandb.Error("a private preview")
        return MagicMock(offline=False, step=has)

    monkeypatch.setattr(wandb, "init", init)
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    recipe = load_recipe(find_recipe("quickstart"), ["log.wandb={}"])
    resumed = RunState("abc", TrainerState({}, {}), step=3, after=replace(EVAL, step=3) if evaluated else None)
    logger = WandbLogger(recipe.log.wandb, recipe, tmp_path, "abc", resumed=resumed)
    logger.log(StepMetrics(4, VALUES, GROUPS))
    assert logger._run.log.call_args.kwargs == {"step": 8, "commit": True}
    assert calls == asked
    assert ("a private preview" in caplog.text) != allowed


def test_a_dead_address_does_not_stop_a_run(recipe, run_cli, monkeypatch, caplog) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(weights_and_biases, "INIT_TIMEOUT", 2.0)
    ran = run_cli("train", recipe, "log.wandb={}")
    assert ran.code == 0, ran.err
    assert "finished after step 2" in ran.out
    assert "127.0.0.1:9" in caplog.text
    assert "`wandb sync` uploads it" in caplog.text
    assert any("train/loss" in values(record.history.item) for record in records(Path("runs/toy")))


def test_a_package_that_cannot_be_imported_is_a_mistake_before_the_run(recipe, run_cli, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    ran = run_cli("train", recipe, "log.wandb={}")
    assert ran.code == 2
    assert "log.wandb: the package wandb cannot be imported" in ran.err
    assert "remove log.wandb" in ran.err
    assert not Path("runs/toy").exists()


def test_best_values_are_kept_in_the_summary(tmp_path, monkeypatch) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    recipe = load_recipe(find_recipe("quickstart"), ["log.wandb={mode: offline}"])
    logger = WandbLogger(recipe.log.wandb, recipe, tmp_path, "abc")
    for step, reward in ((1, 0.9), (2, 0.5)):
        logger.log(StepMetrics(step, VALUES | {"reward": reward}, GROUPS))
        logger.log(EVAL)
    summary = logger._run.summary["train/reward"]
    logger.close()
    assert dict(summary) == {"max": 0.9}


def test_the_sweep_drives_grpo_train_as_it_is(recipe, run_cli, monkeypatch) -> None:
    """The shipped file, through the code of W&B's agent that makes command lines of it."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "recipes/sweeps/quickstart.yaml").read_text())
    drawn = {name: {"value": _first(space)} for name, space in sweep["parameters"].items()}
    macros = create_sweep_command_args({"args": drawn})
    command = []
    for part in create_sweep_command(sweep["command"]):
        name = part.removeprefix("${").removesuffix("}")
        command += macros.get(name, [] if name == "env" else [part])
    assert command[:3] == ["grpo", "train", "quickstart"]
    cfg = load_recipe(find_recipe(command[2]), command[3:])
    assert cfg.optim.learning_rate == drawn["optim.learning_rate"]["value"]
    assert f"eval/{cfg.best_metric}" == sweep["metric"]["name"]
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    for trial in ("t1", "t2"):  # as the agent does; each trial has a folder of its own
        monkeypatch.setenv("WANDB_RUN_ID", trial)
        wandb.teardown()  # each is a process of its own there
        assert run_cli("train", recipe, "log.wandb={mode: offline}", "optim.learning_rate=1e-4").code == 0
        assert list(Path(f"runs/toy-{trial}/wandb").glob(f"offline-run-*-{trial}"))


def _first(space: dict):
    return space["values"][0] if "values" in space else space["min"]


def test_an_alarm_is_an_alert(recipe, run_cli) -> None:
    Path("digits.py").write_text("def reward(completions, **_):\n    return [0.0 for _ in completions]\n")
    assert run_cli("train", recipe, "optim.steps=1", "log.wandb={mode: offline}").code in (0, 1)
    alerts = [one.alert for one in records(Path("runs/toy")) if one.WhichOneof("record_type") == "alert"]
    (alert,) = [one for one in alerts if one.title == "equal_rewards at step 1"]
    assert alert.text.startswith("step 1: no group has different rewards")
    assert alert.level == "WARN"
