"""`grpo.Trainer` is the command's run: the same numbers, stops that lose nothing, rewards and data as objects."""

import json
import linecache
import os
import signal
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from datasets import Dataset, DatasetDict
from runs.driver import same_end, timeless

import grpo
from grpo.config import EvalConfig, Recipe
from grpo.types import Group, Task

ROWS = [{"question": f"What is {i}+{i}?", "answer": str(2 * i)} for i in range(1, 5)]


def digits(completions, **_):
    return [sum(c.isdigit() for c in text) / 8 for text in completions]


@pytest.fixture
def short(recipe: Path):
    """A recipe of four steps, into a folder of the name."""

    def make(folder: str = "run", **settings) -> Recipe:
        held_out = {"source": "train.jsonl", "split": "train", "every": 2, "prompts": 2, "samples": 2}
        return grpo.recipe(recipe, steps=4, output_dir=folder, eval=held_out, **settings)

    return make


def trainer(cfg: Recipe, *callbacks, rewards=(digits,), **given) -> grpo.Trainer:
    return grpo.Trainer(cfg, rewards=list(rewards), callbacks=callbacks, quiet=True, **given)


def at_step(step: int, what):
    """A callback that does `what` once, when it is told of a step."""
    done: list[int] = []

    def callback(record):
        if isinstance(record, grpo.StepMetrics) and record.step == step and not done:
            done.append(step)
            return what()
        return None

    return callback


def test_the_numbers_are_the_commands(recipe: Path, short, run_cli) -> None:
    cfg = short("own")
    ended = trainer(cfg).train()
    assert (ended.step, ended.why) == (4, "finished")
    held_out = "eval={source: train.jsonl, split: train, every: 2, prompts: 2, samples: 2}"
    ran = run_cli("train", recipe, "optim.steps=4", "output_dir=command", held_out)
    assert ran.code == 0, ran.err
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert timeless(Path("own") / name) == timeless(Path("command") / name)
    ours, theirs = (mx.load(f"{folder}/checkpoints/step-000004/adapters.safetensors") for folder in ("own", "command"))
    assert all(mx.array_equal(ours[path], theirs[path]).item() for path in theirs)


def test_a_callback_sees_steps_groups_and_evaluations(short) -> None:
    seen: list = []
    made = trainer(short(), seen.append)
    made.train()
    assert [(type(record).__name__, record.step) for record in seen] == [
        ("EvalMetrics", 0), ("StepMetrics", 1), ("StepMetrics", 2), ("EvalMetrics", 2), ("StepMetrics", 3),
        ("StepMetrics", 4), ("EvalMetrics", 4),
    ]  # fmt: skip
    first = seen[1]
    rewards = [rollout.reward for group in first.groups for rollout in group.rollouts]
    assert sum(rewards) / len(rewards) == pytest.approx(first.values["reward"])
    assert any(rollout.advantage for group in first.groups for rollout in group.rollouts)
    assert [step["reward"] for step in made.history] == [r.values["reward"] for r in seen if hasattr(r, "groups")]


@pytest.mark.parametrize("how", ["STOP", "stop"])
def test_a_callback_may_stop_and_a_second_call_goes_on(short, how: str) -> None:
    trainer(short("whole")).train()
    callback = at_step(3, lambda: grpo.STOP if how == "STOP" else made.stop())
    made = trainer(short("parts"), callback)
    ended = made.train()
    assert (ended.step, ended.why) == (3, "stopped")
    assert ended.checkpoint == Path("parts/checkpoints/step-000003")
    loaded = made.policy
    assert made.train().step == 4
    assert made.policy is loaded
    same_end(Path("whole"), Path("parts"))


def test_an_interrupt_is_raised_with_the_last_step_saved(short) -> None:
    asked: list[int] = [1]

    def interrupting(completions, trainer_state, **_):
        if trainer_state.global_step == 2 and not asked:
            asked.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        return digits(completions)

    trainer(short("whole"), rewards=[interrupting]).train()
    asked.clear()
    former = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        made = trainer(short("parts"), rewards=[interrupting])
        with pytest.raises(KeyboardInterrupt):
            made.train()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, former)
    assert made.history[-1]["step"] == 2
    assert Path("parts/.ended").read_text() == "stopped\n"
    assert made.train().step == 4
    same_end(Path("whole"), Path("parts"))


def test_a_handler_of_the_sessions_own_stays(short) -> None:
    told: list[int] = []
    former = signal.signal(signal.SIGINT, lambda *_: told.append(1))
    try:
        ended = trainer(short(), at_step(1, lambda: os.kill(os.getpid(), signal.SIGINT))).train()
    finally:
        signal.signal(signal.SIGINT, former)
    assert (told, ended.step) == ([1], 4)


def test_it_trains_in_another_thread(short) -> None:
    trainer(short("whole")).train()
    ended: list = []
    thread = threading.Thread(target=lambda: ended.append(trainer(short("parts")).train()))
    thread.start()
    thread.join()
    assert ended[0].step == 4
    same_end(Path("whole"), Path("parts"))


def test_what_a_callback_raises_is_raised_and_the_step_is_saved(short) -> None:
    def wrong() -> None:
        raise ValueError("the curve looks odd")

    made = trainer(short(), at_step(2, wrong))
    with pytest.raises(ValueError, match="the curve looks odd"):
        made.train()
    assert Path("run/checkpoints/step-000002").is_dir()
    assert made.train().step == 4


def test_a_run_of_an_earlier_session_is_gone_on_with_or_replaced(short) -> None:
    trainer(short("whole")).train()
    trainer(short(), at_step(2, lambda: grpo.STOP)).train()
    with pytest.raises(
        grpo.UserError, match=r"resume it \(train\(resume=True\)\).*replace the run \(train\(overwrite=True\)"
    ):
        trainer(short()).train()
    assert trainer(short()).train(resume=True).step == 4
    same_end(Path("whole"), Path("run"))
    assert trainer(short()).train(overwrite=True).step == 4

    def other(completions, **_):
        return [0.5 * len(text) for text in completions]

    with pytest.raises(grpo.UserError, match=r"train\(resume=True, changed=True\) resumes anyway:\n  rewards.0.use"):
        trainer(short(), rewards=[other]).train(resume=True)


def test_a_function_that_has_changed_is_noticed(short) -> None:
    def made(line: str) -> grpo.Trainer:
        Path("cell.py").write_text(f"def mine(completions, **_):\n    return [{line} for text in completions]\n")
        space: dict = {"__name__": "__main__"}
        linecache.checkcache()
        exec(compile(Path("cell.py").read_text(), str(Path("cell.py").resolve()), "exec"), space)
        return trainer(short(), rewards=[space["mine"]])

    made("len(text) / 9").train()
    assert made("len(text) / 9").train(resume=True).step == 4
    with pytest.raises(grpo.UserError, match=r"\n  code of __main__:mine: .* → "):
        made("len(text) / 8").train(resume=True)
    assert made("len(text) / 8").train(resume=True, changed=True).step == 4


def test_evaluate_and_save_are_of_the_last_step(short) -> None:
    made = trainer(short())
    assert made.evaluate().step == 0
    assert not Path("run").exists()
    ended = made.train()
    assert made.evaluate() == ended.after
    folder = made.save("mine")
    saved, last = (mx.load(str(at / "adapters.safetensors")) for at in (folder, ended.checkpoint))
    assert all(mx.array_equal(saved[path], last[path]).item() for path in last)


def test_what_was_closed_is_loaded_again_as_it_was(short) -> None:
    with trainer(short()) as made:
        ended = made.train()
    assert made.evaluate() == ended.after
    made.close()
    saved, last = (mx.load(str(at / "adapters.safetensors")) for at in (made.save("mine"), ended.checkpoint))
    assert all(mx.array_equal(saved[path], last[path]).item() for path in last)
    assert made.train().step == 4


def test_commands_take_the_run_as_far_as_they_can(short, run_cli) -> None:
    def mine(completions, **_):
        return digits(completions)

    trainer(short(), rewards=[mine]).train()
    ran = run_cli("generate", "run", "What is 1+1?", "--max-tokens", 6)
    assert (ran.code, bool(ran.out.strip())) == (0, True)
    assert run_cli("export", "run", "--format", "mlx").code == 0
    ran = run_cli("eval", "run")
    assert ran.code == 2
    assert "'__main__:mine': this was a Python object in the session that created the run" in ran.err


@pytest.mark.parametrize("form", ["list", "dataset", "pandas", "generator", "file"])
def test_data_of_all_forms_is_the_same_data(short, form: str) -> None:
    data = {
        "list": lambda: ROWS,
        "dataset": lambda: Dataset.from_list(ROWS),
        "pandas": lambda: pytest.importorskip("pandas").DataFrame(ROWS),
        "generator": lambda: (row for row in ROWS),
        "file": lambda: "train.jsonl",
    }[form]()
    made = trainer(short(), data=data)
    rows = made._given.rows("data", made.recipe.data)
    assert [dict(rows[index]) for index in range(len(rows))] == ROWS


def test_rows_that_are_given_train_like_those_of_a_file(short) -> None:
    trainer(short("whole")).train()
    made = trainer(short("given"), at_step(2, lambda: grpo.STOP), data=iter(ROWS))
    made.train()
    made.train()
    assert timeless(Path("whole/metrics.jsonl")) == timeless(Path("given/metrics.jsonl"))


def test_objects_are_the_same_held_out_rows_only_if_their_rows_are(short) -> None:
    others = [{"question": f"What is {i}+1?", "answer": str(i + 1)} for i in range(11, 15)]
    for held_out, same in ((others, False), (list(ROWS), True)):
        with trainer(short(), data=ROWS, eval_data=held_out) as made:
            notes = made._ready().run.notes
        assert any(note.startswith("eval: its rows are the training rows") for note in notes) == same


def test_held_out_data_is_given_too(short) -> None:
    one = [{"question": "What is 7+7?", "answer": "14"}]
    assert trainer(short("one"), eval_data=one).train().after.n == 1
    cfg = grpo.recipe("toy.yaml", steps=1, output_dir="two", eval={"prompts": 4, "samples": 1})
    both = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(one)})
    assert trainer(cfg, data=both).train().after.n == 1
    with pytest.raises(grpo.UserError, match="the given data has no splits: pass eval_data"):
        trainer(cfg, data=ROWS)
    made = trainer(grpo.recipe("toy.yaml", eval=None, steps=1, output_dir="three"), eval_data=one)
    assert made.recipe.eval is not None
    assert made.recipe.eval.every == EvalConfig().every
    assert made.evaluate().n == 1
    for files in (Path("train.jsonl"), ["train.jsonl"]):
        assert trainer(grpo.recipe("toy.yaml", eval=None), eval_data=files).evaluate().n > 1


def test_rewards_are_named_weighed_and_mixed(short) -> None:
    def half(completions, **_):
        return [0.5] * len(completions)

    made = trainer(short(), rewards=[digits, grpo.reward(half, weight=2.0, name="flat"), "xml_format"])
    made.train()
    step = made.history[0]
    total = step["rewards/digits/mean"] + 2 * step["rewards/flat/mean"] + step["rewards/xml_format/mean"]
    assert step["reward"] == pytest.approx(total)
    assert step["rewards/flat/mean"] == 0.5
    stored = [line["isolation"] for line in made.recipe.model_dump()["rewards"]]
    assert stored == ["inline", "inline", "process"]
    made.close()


def test_a_loss_is_given(short) -> None:
    def mine(current, batch, cfg):
        return -batch.advantages * mx.exp(current - batch.anchor)

    plain = trainer(short("plain", **{"loss": {"type": "dapo"}}))
    own = trainer(short("own", **{"loss": {"type": "dapo"}}), loss=mine)
    plain.train()
    own.train()
    assert own.recipe.loss.use is not None
    for ours, theirs in zip(own.history, plain.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)


def test_a_run_that_taught_nothing_is_an_error(short) -> None:
    with pytest.raises(grpo.RunError, match="nothing was trained in 4 steps"):
        trainer(short(), rewards=[grpo.reward(lambda completions, **_: [1.0] * len(completions), name="ones")]).train()


def test_a_notebook_gets_lines_and_not_blocks_of_html(short, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert not trainer(short())._console.is_jupyter


def test_mistakes_are_said_before_a_model_is_loaded(short) -> None:
    for rewards, said in (([], "a run needs at least one"), (digits, "expected a list"), ([3], "got an int")):
        with pytest.raises(grpo.UserError, match=said):
            grpo.Trainer(short(), rewards=rewards)
    with pytest.raises(grpo.UserError, match="no section eval"):
        grpo.Trainer(grpo.recipe("toy.yaml"), quiet=True).evaluate()


def test_a_teacher_is_enough_without_rewards(recipe: Path) -> None:
    teacher = {"model": grpo.recipe(recipe).model.name, "kl": "exact"}
    cfg = grpo.recipe(recipe, steps=1, output_dir="run", teacher=teacher)
    with grpo.Trainer(cfg, rewards=[], quiet=True) as taught:
        taught.train()
        assert taught.history[0]["teacher/kl"] == pytest.approx(0, abs=1e-5)  # it is the policy's own base
    with pytest.raises(grpo.UserError, match="the list is empty, so nothing would be scored"):
        grpo.score([Group(Task(0, "", (1,), {}), ())], [])


def test_lines_of_a_run_are_plain_text(short, capsys) -> None:
    grpo.Trainer(short(), rewards=[digits]).train()
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\nstep 4/4  reward " in said


def test_the_run_is_recorded_as_the_commands_is(short) -> None:
    made = trainer(short())
    made.train()
    there = {path.name for path in made.folder.iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "eval.jsonl", "completions", "checkpoints"} <= there
    state = json.loads((made.folder / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["step"] == 4
