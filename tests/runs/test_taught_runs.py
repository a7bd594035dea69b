"""Runs with a teacher: without rewards, beside them, by an adapter and by a second model; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import shaken
from mlx.utils import tree_flatten

from grpo.config import ModelConfig
from grpo.errors import UserError
from grpo.model.adapters import TEACHER, NoAdapters
from grpo.model.load import load
from grpo.model.mlxlm import new_model
from grpo.model.policy import Policy
from grpo.recipes import load_recipe
from grpo.runs.prepare import Prepared, prepare

ALONE = "rewards=[]"


@pytest.fixture
def taught(recipe: Path) -> Path:
    """The recipe, beside an adapter `teacher` that was drawn anew."""
    with_adapter(recipe)
    return recipe


def with_adapter(recipe: Path) -> None:
    run = prepare(load_recipe(recipe))
    adapters = run.trainer.policy.adapters
    adapters.load_state({path: array.astype(mx.float32) for path, array in shaken(adapters.state()).items()})
    folder = recipe.parent / "teacher"
    folder.mkdir()
    adapters.save(folder)
    run.opened.close()


def prepared(recipe: Path, *overrides: str) -> Prepared:
    return prepare(load_recipe(recipe, list(overrides)))


@pytest.mark.parametrize("kl", ["sampled", "exact", "top_k"])
def test_a_run_without_rewards_learns_from_an_adapter(taught: Path, kl: str) -> None:
    """The policy begins as the base model, and its divergence from the teacher shrinks in steps of one batch."""
    run = prepared(
        taught, ALONE, f"teacher={{adapter: teacher, kl: {kl}}}", "optim.learning_rate=0.003", "optim.steps=6"
    )
    assert TEACHER in run.trainer.policy.adapters.names
    steps = [run.trainer.step(n).values for n in range(1, 7)]
    assert all("teacher/kl" in values and values["updates_without_signal"] == 0 for values in steps)
    assert not {"reward", "reward_std", "frac_reward_zero_std", "solved_all", "solved_none", "mixed"} & set(steps[0])
    if kl != "sampled":
        assert steps[-1]["teacher/kl"] < 0.7 * steps[0]["teacher/kl"]
    run.opened.close()


def test_a_second_model_is_in_the_plan(taught: Path, toy_folder: Path) -> None:
    alone = prepared(taught)
    run = prepared(taught, f"teacher.model={toy_folder}", "teacher.kl=exact")
    second = sum(array.nbytes for _, array in tree_flatten(load(ModelConfig(name=str(toy_folder)))[0].parameters()))
    assert run.plan.stays["teacher"] == second + 8 * 8 * 4 * 64  # float32 hidden states of 8 completions of 8 tokens
    assert "teacher" not in alone.plan.stays
    assert run.plan.total > alone.plan.total
    values = run.trainer.step(1).values
    assert values["teacher/kl"] == pytest.approx(0, abs=1e-5)  # it is the policy's own base
    assert "reward" in values


@pytest.mark.parametrize("reads", [True, False])
def test_lines_that_the_teacher_cannot_read_are_not_made(
    taught: Path, toy_folder: Path, monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    """On a GPU: a batch that is made for lines has a row as wide as a line for each completion that could stand in it,
    which is many times as much to read in rows."""

    def can_pack(policy: Policy) -> bool:
        if not reads and isinstance(policy.adapters, NoAdapters):
            policy.slow.append("completions are not packed; each trains in its own row: the reason")
            return False
        return True

    monkeypatch.setattr("grpo.runs.prepare.on_gpu", lambda: True)
    monkeypatch.setattr(Policy, "_can_pack", can_pack)
    run = prepared(taught, f"teacher.model={toy_folder}")
    assert run.trainer.cfg.optim.pack_completions == reads
    assert (
        any(note.startswith("teacher: ") and note.endswith("in its own row: the reason") for note in run.notes) != reads
    )
    assert not any("backward" in note for note in run.notes if note.startswith("teacher: "))
    run.opened.close()


def test_a_model_with_another_tokenizer_is_refused(taught: Path, toy_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(toy_folder, tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"7"', '"seven"', 1))
    with pytest.raises(UserError, match=r"teacher.model: .*other has a different tokenizer .*token '7'"):
        prepared(taught, "teacher.model=other")


def test_an_adapter_that_does_not_fit_is_refused(taught: Path) -> None:
    with pytest.raises(
        UserError, match=r"teacher.adapter .*To learn from it, set this in the recipe: adapter: \{rank: 16"
    ):
        prepared(taught, "teacher.adapter=teacher", "adapter.rank=4")
    with pytest.raises(UserError, match=r"teacher.adapter nowhere"):
        prepared(taught, "teacher.adapter=nowhere")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("teacher={}",), ": teacher.model is missing: name a second model, or set teacher.adapter"),
        (("teacher={model: m, adapter: a}",), ": teacher.model and teacher.adapter are two teachers: leave out one"),
        (("teacher=FOLDER",), 'got "FOLDER". Write {model: NAME} or {adapter: FOLDER}'),
        (("teacher={adapter: a, top_k: 3}",), "teacher.top_k does nothing with teacher.kl: sampled"),
        (("teacher={adapter: a}", "rollout.dynamic_sampling=2"), "rollout.dynamic_sampling replaces groups whose rew"),
        (
            ("teacher={adapter: a}", "rollout.reuse=2"),
            "rollout.reuse replaces groups whose rewards .* teach nothing. W",
        ),
        (("teacher={adapter: a}", "loss.type=gspo"), "teacher.kl: sampled gives each token its own advantage"),
        (("teacher={adapter: a}", ALONE, "advantage.baseline=batch"), "advantage.baseline does nothing"),
        (("teacher={adapter: a}", ALONE, "loss={beta: 0.1, kl_in: reward}"), "kl_in: reward does nothing"),
        (("teacher={adapter: a}", ALONE, "eval={split: train}"), "eval needs a reward"),
        (("teacher={adapter: a, coef: 0}",), "teacher.coef"),
        ((ALONE,), "or a teacher"),
    ],
)
def test_settings_that_do_nothing_together(recipe: Path, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe(recipe, list(overrides))
    load_recipe(recipe, ["teacher={adapter: a, kl: exact}", "loss.type=gspo", ALONE])


@pytest.mark.quick_cases("sampled")
@pytest.mark.parametrize("kl", ["sampled", "top_k"])
def test_a_resumed_run_is_the_run(taught: Path, run_cli, kl: str) -> None:
    """By command, without rewards and with dropout and two minibatches: to the bit; another adapter in the teacher's
    folder is noticed."""
    more = [ALONE, f"teacher={{adapter: teacher, kl: {kl}}}", "adapter.dropout=0.1", "optim.num_minibatches=2"]
    more += ["checkpoint.every=1", "optim.learning_rate=0.02"]
    whole = run_cli("train", taught, "output_dir=whole", *more)
    assert whole.code == 0, whole.err
    assert "nothing was learned" not in whole.out + whole.err
    parts = Path("parts")
    shutil.copytree("whole", parts)
    shutil.rmtree(parts / "checkpoints/step-000002")
    resumed = run_cli("train", taught, "output_dir=parts", "--resume", *more)
    assert resumed.code == 0, resumed.err
    files = [Path(run, "checkpoints/step-000002/adapters.safetensors") for run in ("whole", "parts")]
    one, other = (mx.load(str(file)) for file in files)
    assert all(mx.array_equal(array, other[path]) for path, array in one.items())
    weights = mx.load("teacher/adapters.safetensors")
    mx.save_safetensors("teacher/adapters.safetensors", {path: 2 * array for path, array in weights.items()})
    shutil.rmtree(parts / "checkpoints/step-000002")
    refused = run_cli("train", taught, "output_dir=parts", "--resume", *more)
    assert refused.code != 0
    assert "contents of teacher.adapter" in refused.err


def test_the_forward_pass_of_a_much_wider_teacher_is_in_the_plan(taught: Path, toy_folder: Path) -> None:
    """Beside its weights and what it says: here it takes more than the update of the student."""
    wide = json.loads((toy_folder / "config.json").read_text()) | {"intermediate_size": 4096}
    folder = shutil.copytree(toy_folder, "wide")
    (Path(folder) / "config.json").write_text(json.dumps(wide))
    model = new_model(wide)
    for file in Path(folder).glob("*.safetensors*"):
        file.unlink()
    mx.save_safetensors("wide/model.safetensors", tree_flatten(model.parameters(), destination={}))
    narrow, run = (prepared(taught, f"teacher.model={name}") for name in (toy_folder, "wide"))
    shape = run.plan.shape
    assert run.plan.phases["update"] > narrow.plan.phases["update"]
    assert run.plan.phases["update"] >= shape.tokens * 4 * 4 * 4096  # four arrays of its inside, in float32
    for one in (narrow, run):
        one.opened.close()


def close(one: list[tuple[float, ...]], other: list[tuple[float, ...]]) -> bool:
    """Whether these logprobs are the same but for rounding; other tokens have others."""
    return all(mine == pytest.approx(theirs, abs=1e-4) for mine, theirs in zip(one, other, strict=True))


def test_an_evaluation_is_of_the_student(taught: Path) -> None:
    """Nothing that samples has the teacher's adapter, whatever came before it; a step leaves the policy in place."""
    run = prepared(taught, "teacher={adapter: teacher, kl: exact}", "optim.learning_rate=1e-12", "eval={split: train}")
    adapters = run.trainer.policy.adapters

    def answers() -> list[tuple[float, ...]]:
        groups = run.trainer.engine.rollout(run.tasks, 1, 1.0, mx.random.key(0))
        return [rollout.trajectory.behaviour for group in groups for rollout in group.rollouts]

    before, measured = answers(), run.evaluator(0).values
    run.trainer.step(1)
    assert close(answers(), before)
    assert run.evaluator(1).values == measured
    with adapters.use(TEACHER):
        assert not close(answers(), before)
    run.opened.close()


def test_a_curriculum_without_rewards_is_refused(recipe: Path) -> None:
    """Nothing would say what is solved; a reward of weight 0 does."""
    teacher = "teacher={adapter: a}"
    with pytest.raises(UserError, match=r"data\.curriculum needs a reward .* weight: 0"):
        load_recipe(recipe, [teacher, ALONE, "data.curriculum={}"])
    load_recipe(recipe, [teacher, "rewards.0.weight=0", "data.curriculum={}"])
