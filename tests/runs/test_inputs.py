"""What a run was made from and goes on with: rows, helper modules, and the adapter that it began from."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from runs.driver import run, timeless

from grpo.data.fingerprint import fingerprint
from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs.checkpoint import checkpoints
from grpo.runs.resume import find_start
from grpo.tools.export import export


def refusal(recipe: Path, *overrides: str, **how) -> list[str]:
    """The lines of what may not be gone on with; none if nothing was changed."""
    try:
        find_start(load_recipe(recipe, overrides), **{"resume": True, **how})
    except UserError as error:
        first, *lines = str(error).splitlines()
        assert "--resume-changed" in first
        return [line.strip().partition(":")[0] for line in lines]
    return []


def rewrite(path: Path, change) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def test_rows_and_helper_modules_that_changed_are_seen(recipe) -> None:
    held_out = shutil.copy("train.jsonl", "test.jsonl")
    Path("helper.py").write_text("def score(text):\n    return sum(c.isdigit() for c in text) / 8\n")
    Path("digits.py").write_text(
        "from helper import score\ndef reward(completions, **_):\n    return [score(c) for c in completions]\n"
    )
    recipe.write_text(recipe.read_text() + "eval: {source: test.jsonl, split: train, prompts: 2, samples: 1}\n")
    run(recipe)
    text = Path("train.jsonl").read_text()
    assert refusal(recipe) == []
    Path("train.jsonl").write_text(text.replace('", "', '",   "'))  # the same rows, written otherwise
    Path("train.jsonl").touch()
    assert refusal(recipe) == []
    for change in (
        lambda rows: rows[:-1],
        lambda rows: rows[::-1],
        lambda rows: [*rows[:-1], rows[-1] | {"answer": "9"}],
        lambda rows: [row | {"level": 1} for row in rows],
    ):
        rewrite(Path("train.jsonl"), change)
        assert refusal(recipe) == ["contents of data"]
        Path("train.jsonl").write_text(text)
    rewrite(Path(held_out), lambda rows: rows[:-1])
    Path("helper.py").write_text(Path("helper.py").read_text() + "# better\n")
    assert refusal(recipe) == [f"code of {Path('digits.py').resolve()}", "contents of eval"]
    start = find_start(load_recipe(recipe), changed=True)
    assert sum(note.startswith("changed: ") for note in start.notes) == 2


def test_a_fingerprint_is_of_contents_alone(monkeypatch) -> None:
    from datasets import Dataset

    rows = [{"question": f"{i}?", "picture": bytes([i])} for i in range(9)]
    table = Dataset.from_list(rows)
    assert fingerprint(rows) == fingerprint(table) == fingerprint(Dataset.from_list(rows * 2).select(range(9)))
    assert fingerprint(table.select(range(8))) != fingerprint(table) != fingerprint(table.select([*range(8), 0]))
    monkeypatch.setattr("grpo.data.fingerprint.MOST_ROWS", 3)
    assert fingerprint(rows) == fingerprint(table)
    assert fingerprint(table.select(range(8))) != fingerprint(table) != fingerprint(table.select([*range(8), 0]))


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    class Own:
        pass

    one, other = Own(), Own()
    assert fingerprint([{"own": one}]) == fingerprint([{"own": other}])
    assert repr({0, 8}) != repr({8, 0})
    assert fingerprint([{"own": {0, 8}}]) == fingerprint([{"own": {8, 0}}]) != fingerprint([{"own": {8, 1}}])


@pytest.fixture
def begun(recipe, run_cli) -> Path:
    """A run from a saved adapter, whose folder has moved since; and the run too."""
    first = run(recipe, "output_dir=first").checkpoint
    recipe.write_text(recipe.read_text() + "loss: {beta: 0.1}\ncheckpoint: {every: 1}\n")
    run(recipe, f"adapter.path={first}", "output_dir=before")
    Path("first").rename("elsewhere")
    return Path(shutil.move("before", "moved"))


def test_the_adapter_that_a_run_began_from_goes_with_it(recipe, begun, run_cli) -> None:
    kept, origin = begun / "starting_adapter", Path("elsewhere/checkpoints/step-000002")
    assert (kept / "adapters.safetensors").read_bytes() == (origin / "adapters.safetensors").read_bytes()
    own = [begun / "recipe.yaml", "output_dir=moved"]
    last = checkpoints(begun / "checkpoints")[-1]
    assert not list(begun.rglob("reference.safetensors"))  # it is what the run began from, and never changes
    whole = (last / "adapters.safetensors").read_bytes()
    before = timeless(begun / "metrics.jsonl")
    shutil.rmtree(last)
    for command in (
        ["train", *own, "--resume"],
        ["train", recipe, "adapter.path=first/checkpoints/step-000002", "output_dir=moved", "--resume"],
        ["eval", begun, "--data", "train.jsonl", "--prompts", "2", "--samples", "1"],
        ["export", begun, "--format", "mlx"],
        ["replay", begun, "--step", "2"],
    ):
        ran = run_cli(*command)
        assert ran.code == 0, (command, ran.err)
    assert (last / "adapters.safetensors").read_bytes() == whole
    assert timeless(begun / "metrics.jsonl") == before
    assert all("kl" in line for line in before)  # against the adapter that it began from


def test_a_checkpoint_of_a_run_that_asked_for_no_reference_has_the_adapter_that_it_began_from(recipe) -> None:
    """So had every checkpoint of before `log.kl`, whose default asks for it."""
    first = run(recipe, "output_dir=first").checkpoint
    settings = [f"adapter.path={first}", "output_dir=begun", "optim.learning_rate=0.05"]
    ended = run(recipe, *settings, "log.kl=null").checkpoint
    assert not (ended / "reference.safetensors").exists()
    found: list[dict[str, mx.array]] = []

    def look(trainer, stop) -> None:
        found.append(trainer.policy.adapters.state("reference"))

    run(recipe, *settings, "optim.steps=3", "log.kl=1", changed=True, change=look)
    started = mx.load(str(first / "adapters.safetensors"))
    assert all(mx.array_equal(array, started[path]) for path, array in found[0].items())
    told = {line["step"]: line.get("kl", 0) for line in timeless(Path("begun/metrics.jsonl"))}
    assert [step for step, kl in told.items() if kl > 0] == [3]


@pytest.mark.slow
def test_an_adapter_in_pefts_format_goes_with_its_run_too(recipe, run_cli) -> None:
    run(recipe, "output_dir=first")
    export(Path("first"), "peft", Path("theirs"))
    recipe.write_text(recipe.read_text() + "checkpoint: {every: 1}\n")
    run(recipe, "adapter.path=theirs", "output_dir=begun")
    weights = Path("theirs/adapter_model.safetensors")
    assert Path("begun/starting_adapter", weights.name).read_bytes() == weights.read_bytes()
    assert refusal(recipe, "adapter.path=theirs", "output_dir=begun") == []
    arrays = mx.load(str(weights))
    mx.eval(arrays)
    mx.save_safetensors(str(weights), {path: array + 1 for path, array in arrays.items()})
    assert refusal(recipe, "adapter.path=theirs", "output_dir=begun") == ["contents of adapter.path"]
    shutil.rmtree("theirs")
    shutil.rmtree(checkpoints(Path("begun/checkpoints"))[-1])
    ran = run_cli("train", "begun/recipe.yaml", "output_dir=begun", "--resume")
    assert ran.code == 0, ran.err
    ran = run_cli("eval", "begun", "--data", "train.jsonl", "--prompts", "2", "--samples", "1")
    assert ran.code == 0, ran.err
    assert "start (adapter.path)" in ran.out


def test_another_adapter_in_its_place_is_seen(recipe, begun) -> None:
    named = f"adapter.path={Path('elsewhere/checkpoints/step-000002').resolve()}"
    assert refusal(recipe, named, "output_dir=moved") == []
    weights = Path("elsewhere/checkpoints/step-000002/adapters.safetensors")
    mx.save_safetensors(str(weights), {path: array + 1 for path, array in mx.load(str(weights)).items()})
    assert refusal(recipe, named, "output_dir=moved") == ["contents of adapter.path"]
    assert refusal(recipe, "output_dir=moved") == ["adapter.path", "contents of adapter.path"]
    branch = begun / "checkpoints/step-000001"
    assert refusal(recipe, "adapter.path=gone", "output_dir=branch", checkpoint=branch) == []
    ended = run(recipe, "adapter.path=gone", "output_dir=branch", checkpoint=branch)
    assert (ended.state.first, ended.state.step) == (2, 2)
    assert Path("branch/starting_adapter/adapters.safetensors").is_file()


def test_a_run_that_replaces_its_own_beginning_keeps_it(recipe) -> None:
    """The adapter lies in the run that --overwrite puts aside."""
    checkpoint = run(recipe, "optim.steps=1").checkpoint
    weights = (checkpoint / "adapters.safetensors").read_bytes()
    run(recipe, f"adapter.path={checkpoint}", "optim.steps=1", overwrite=True)
    assert Path("runs/toy/starting_adapter/adapters.safetensors").read_bytes() == weights
    run(Path("runs/toy/recipe.yaml"), overwrite=True)  # its own recipe names its own copy
    assert Path("runs/toy/starting_adapter/adapters.safetensors").read_bytes() == weights
    assert not list(Path("runs/toy").glob(".*partial"))


def test_an_adapter_that_cannot_be_copied_leaves_the_former_run(recipe, monkeypatch) -> None:
    checkpoint = run(recipe, "optim.steps=1").checkpoint
    before = sorted(path for path in Path("runs/toy").rglob("*"))

    def full(*_args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="cannot write to runs/toy: No space left"):
        run(recipe, f"adapter.path={checkpoint}", "optim.steps=1", overwrite=True)
    assert sorted(path for path in Path("runs/toy").rglob("*")) == before
