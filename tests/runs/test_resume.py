"""A run that was stopped goes on to the numbers of the run that was not."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import write_recipe
from runs.driver import run, same_end, timeless

from grpo.errors import RunError, UserError
from grpo.planning import choosing
from grpo.recipes import load_recipe
from grpo.runs.checkpoint import checkpoints, load_checkpoint, step_of
from grpo.runs.completions import stored_steps
from grpo.runs.loop import Outcome
from grpo.runs.prepare import prepare
from grpo.runs.resume import find_start
from grpo.runs.signals import Stopped

EVAL = "eval: {split: train, every: 2, prompts: 2, samples: 2}\n"


@pytest.fixture
def six(recipe) -> Path:
    """Six steps with everything that has a state: warm-up, momentum, several updates a step, dynamic sampling, beta's
    schedule, evaluations."""
    return lengthened(recipe)


@pytest.fixture(scope="module")
def ended(toy_folder, tmp_path_factory) -> tuple[Path, Outcome]:
    """The recipe `six` in a folder of its own, beside its whole run in `whole`; how that ended."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = lengthened(write_recipe(folder, toy_folder))
        return recipe, run(recipe, "output_dir=whole")


@pytest.fixture
def beside(ended, monkeypatch) -> Path:
    """The recipe `six` in the folder where `whole` is; what a test leaves in `parts` there is gone after it."""
    recipe, _ = ended
    monkeypatch.chdir(recipe.parent)
    yield recipe
    shutil.rmtree("parts", ignore_errors=True)


def lengthened(recipe: Path) -> Path:
    recipe.write_text(
        recipe.read_text()
        .replace("optim: {steps: 2", "optim: {steps: 6, warmup_steps: 2, num_minibatches: 2, weight_decay: 0.01")
        .replace("rollout: {", "rollout: {dynamic_sampling: 1, ")
        + EVAL
        + "loss: {beta: 0.1, beta_end: 0.2}\ncheckpoint: {every: 2}\n"
    )
    return recipe


def interrupt_in(step: int, where: str):
    """Have a signal come in the middle of a step."""

    def change(trainer, stop) -> None:
        room, name = {"rollout": (trainer.engine, "rollout"), "update": (trainer.update, "apply")}[where]
        call = getattr(room, name)

        def interrupted(*args, **kwargs):
            made = call(*args, **kwargs)
            if trainer.now == step:
                stop.signal = signal.SIGTERM
                raise Stopped
            return made

        setattr(room, name, interrupted)
        take = trainer.step

        def counted(n: int):
            trainer.now = n
            return take(n)

        trainer.now, trainer.step = 0, counted

    return change


@pytest.mark.each_value
@pytest.mark.parametrize("where", ["rollout", "update"])
@pytest.mark.parametrize("at", [1, 4])
def test_stopped_in_a_step_and_resumed_is_never_stopped(beside, where: str, at: int) -> None:
    stopped = run(beside, "output_dir=parts", change=interrupt_in(at, where))
    assert (stopped.state.step, stopped.stopped_by) == (at - 1, signal.SIGTERM)
    assert (stopped.checkpoint is None) == (at == 1)
    ended = run(beside, "output_dir=parts", resume=True)
    assert ended.state.step == 6
    same_end(Path("whole"), Path("parts"))


@pytest.mark.quick_cases("full")
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["model.dtype=bfloat16", "adapter.layers=[0,1]"], marks=pytest.mark.slow),
        pytest.param(
            [
                "adapter.type=dora",
                "adapter.sync_reference_every=2",
                "rollout.top_p=0.9",
                "rollout.repetition_penalty=1.1",
            ],
            marks=pytest.mark.slow,
        ),
        ["adapter.type=full", "adapter.sync_reference_every=3", "model.dtype=bfloat16", "optim.optimizer=muon"],
        ["model.quantize=4", "adapter.targets=[mlp.up_proj]", "optim.optimizer=adafactor"],
    ],
    ids=["bfloat16", "dora", "full", "quantised"],
)
def test_whatever_trains_is_resumed(six, overrides: list[str]) -> None:
    run(six, "output_dir=whole", *overrides)
    run(six, "output_dir=parts", *overrides, change=interrupt_in(4, "update"))
    run(six, "output_dir=parts", *overrides, resume=True)
    same_end(Path("whole"), Path("parts"))


@pytest.mark.slow
def test_a_saved_adapter_is_gone_on_from_and_resumed(six) -> None:
    start = run(six, "output_dir=first", "optim.steps=2", "optim.warmup_steps=0").checkpoint
    overrides = [f"adapter.path={start}", "adapter.sync_reference_every=2", "adapter.ref_model_mixup_alpha=0.5"]
    run(six, "output_dir=whole", *overrides)
    run(six, "output_dir=parts", *overrides, change=interrupt_in(4, "rollout"))
    run(six, "output_dir=parts", *overrides, resume=True)
    same_end(Path("whole"), Path("parts"))
    assert (Path("parts/checkpoints/step-000006") / "reference.safetensors").is_file()


def test_a_checkpoint_holds_the_whole_state(beside, ended) -> None:
    _, ended = ended
    state, context = load_checkpoint(ended.checkpoint)
    assert json.dumps(state.plain()) == json.dumps(ended.state.plain())
    assert set(state.trainer.arrays) == {"adapters", "optimizer"}
    for name, live in ended.state.trainer.arrays.items():
        saved = state.trainer.arrays[name]
        assert set(saved) == set(live)
        assert all(mx.array_equal(saved[path], live[path]) and saved[path].dtype == live[path].dtype for path in saved)
    assert state.trainer.counts["tasks"]["cursor"] > 12  # dynamic sampling took more than two a step
    assert state.best is not None
    assert len(state.run_id) == 8
    assert list(context.sources) == [str(Path("digits.py").resolve()) + ":reward"]
    assert state.step == step_of(ended.checkpoint) == 6


def test_a_log_is_cut_back_to_the_checkpoint(beside) -> None:
    run(beside, "output_dir=parts", change=interrupt_in(6, "rollout"))
    folder = Path("parts")
    with (folder / "metrics.jsonl").open("a") as file:  # of a process that was killed in its next step
        file.write(json.dumps({"step": 6, "reward": 9.0}) + "\n" + '{"step": 7, "rew')
    (folder / "completions/step-000006.parquet").write_text("")
    run(beside, "output_dir=parts", resume=True, change=interrupt_in(6, "rollout"))
    assert [line["step"] for line in timeless(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [path.stem for path in stored_steps(folder / "completions")][-1] == "step-000005"
    run(beside, "output_dir=parts", resume=True)
    same_end(Path("whole"), folder)


def test_an_earlier_checkpoint_takes_the_run_back(beside) -> None:
    folder = shutil.copytree("whole", Path("parts"))
    before = timeless(folder / "metrics.jsonl")
    back = folder / "checkpoints/step-000002"
    ended = run(beside, "output_dir=parts", checkpoint=back, change=interrupt_in(4, "rollout"))
    assert ended.state.step == 3
    assert [step_of(path) for path in checkpoints(folder / "checkpoints")] == [2, 3]
    assert timeless(folder / "metrics.jsonl") == before[:3]
    run(beside, "output_dir=parts", resume=True)
    assert timeless(folder / "metrics.jsonl") == before


def test_a_checkpoint_may_branch_off_into_a_new_folder(beside, ended) -> None:
    branch = run(beside, "output_dir=parts", checkpoint=Path("whole/checkpoints/step-000004"))
    assert branch.state.run_id != ended[1].state.run_id
    assert timeless(Path("parts/metrics.jsonl")) == timeless(Path("whole/metrics.jsonl"))[4:]


def test_a_changed_recipe_or_reward_is_listed_and_needs_leave(six) -> None:
    run(six, change=interrupt_in(4, "rollout"))
    Path("digits.py").write_text(Path("digits.py").read_text() + "# better\n")
    overrides = ["optim.learning_rate=2e-3", "adapter.targets=all-linear", "rewards.0.weight=2"]
    with pytest.raises(UserError) as refused:
        find_start(load_recipe(six, overrides), resume=True)
    assert "--resume-changed" in str(refused.value)
    lines = str(refused.value).splitlines()[1:]
    assert lines[:2] == ["  rewards.0.weight: 1.0 → 2.0", "  optim.learning_rate: 0.001 → 0.002"]
    assert lines[2].startswith("  code of ")
    assert len(lines) == 3
    assert run(six, *overrides, changed=True).state.step == 6
    assert run(six, *overrides, resume=True).state.step == 6  # the recipe is the run's from now on


def test_a_resumed_run_keeps_its_plan(beside, monkeypatch) -> None:
    """The plan is a measurement, and another one cuts the micro-batches otherwise."""
    run(beside, "output_dir=parts", change=interrupt_in(4, "rollout"))
    monkeypatch.setattr(choosing, "AUTO_TOKENS", (16, 16, 16))  # as if memory had been short
    run(beside, "output_dir=parts", resume=True)
    same_end(Path("whole"), Path("parts"))
    changed = find_start(load_recipe(beside, ["output_dir=parts", "optim.steps=7"]), changed=True)
    assert changed.planned.optim.micro_batch_tokens == "auto"
    asked = ["output_dir=parts", "optim.micro_batch_tokens=64"]
    assert find_start(load_recipe(beside, asked), changed=True).planned.optim.micro_batch_tokens == 64


def test_a_longer_run_goes_on_where_the_shorter_ended(six) -> None:
    run(six, "optim.steps=4")
    ended = run(six, changed=True)
    assert [line["step"] for line in timeless(Path("runs/toy/metrics.jsonl"))] == [1, 2, 3, 4, 5, 6]
    assert ended.state.before.step == 0


def test_another_adapter_does_not_fit(beside) -> None:
    with pytest.raises(UserError, match="the checkpoint's file adapters has other arrays or shapes"):
        run(beside, "output_dir=whole", "adapter.rank=2", changed=True)


def test_a_run_without_a_checkpoint_begins_anew(beside) -> None:
    run(beside, "output_dir=parts", change=interrupt_in(1, "rollout"))
    assert not Path("parts").exists()
    start = find_start(load_recipe(beside, ["output_dir=parts"]), resume=True)
    assert start.notes == ("no checkpoint to resume from: begins at step 0",)
    run(beside, "output_dir=parts", resume=True)
    same_end(Path("whole"), Path("parts"))


def test_a_finished_run_has_nothing_left_to_do(beside, ended) -> None:
    before = {path: path.read_bytes() for path in Path("whole").rglob("*") if path.is_file()}
    again = run(beside, "output_dir=whole", resume=True)
    assert again.checkpoint.resolve() == ended[1].checkpoint.resolve()
    assert {path: path.read_bytes() for path in Path("whole").rglob("*") if path.is_file()} == before


@pytest.mark.quick_cases("2")
@pytest.mark.parametrize("at", [2, 6])
def test_a_stop_in_an_evaluation_leaves_the_evaluation_to_do(beside, at: int) -> None:

    def interrupted(measure, stop):
        def evaluate(step: int):
            if step == at:
                stop.signal = signal.SIGINT
                raise Stopped
            return measure(step)

        return evaluate

    stopped = run(beside, "output_dir=parts", evaluate=interrupted)
    assert stopped.state.step == at
    assert stopped.state.after.step == at - 2
    run(beside, "output_dir=parts", resume=True)
    same_end(Path("whole"), Path("parts"))


def test_an_error_in_a_later_step_leaves_the_last_one_saved(six) -> None:
    run(six, "output_dir=whole", "checkpoint.every=99")

    def fails_after_an_update(trainer, stop) -> None:
        apply, calls = trainer.update.apply, []

        def failing(*args):
            calls.append(1)
            if len(calls) == 6:  # the second update of step 3
                raise RunError("not finite")
            return apply(*args)

        trainer.update.apply = failing

    with pytest.raises(RunError, match="not finite"):
        run(six, "output_dir=parts", "checkpoint.every=99", change=fails_after_an_update)
    assert [step_of(path) for path in checkpoints(Path("parts/checkpoints"))] == [2]
    run(six, "output_dir=parts", "checkpoint.every=99", resume=True)
    same_end(Path("whole"), Path("parts"))


def test_the_best_is_kept_beside_the_newest(six, monkeypatch) -> None:
    values = {0: 0.9, 2: 0.5, 4: 0.25, 6: 0.25}

    def other(measure, stop):
        return lambda step: replace(measure(step), values=measure(step).values | {"pass@2": values[step]})

    ended = run(six, "checkpoint.keep=1", "checkpoint.metric_for_best_model=pass@2", evaluate=other)
    assert (ended.state.best.step, ended.state.best.value) == (2, 0.5)
    assert [step_of(path) for path in checkpoints(Path("runs/toy/checkpoints"))] == [2, 6]


def test_every_part_of_the_state_is_restored(beside, ended) -> None:
    _, ended = ended
    cfg = load_recipe(beside)
    fresh = prepare(cfg).trainer
    fresh.load_state(ended.state.trainer)
    again = fresh.state()
    assert again.counts == ended.state.trainer.counts
    for name, old in ended.state.trainer.arrays.items():
        assert all(mx.array_equal(old[path], again.arrays[name][path]) for path in old)


def test_what_contradicts_itself_or_is_no_record_is_refused(six) -> None:
    run(six, "optim.steps=2", "optim.warmup_steps=0")
    with pytest.raises(UserError, match="choose one"):
        run(six, resume=True, overwrite=True)
    log = Path("runs/toy/metrics.jsonl")
    log.write_text("my own notes\n" + log.read_text())
    with pytest.raises(UserError, match=r"metrics.jsonl:1: not a record that grpo wrote; fix or delete it"):
        run(six, changed=True)
    assert log.read_text().startswith("my own notes")
