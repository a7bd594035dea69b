"""What the page on extending shows is written to files, outside of the package, and all of it runs in one run."""

import contextlib
import importlib.util
import re
from pathlib import Path

import pytest
from docs.pagerun import PAGES, blocks
from runs.driver import same_end

import grpo
from grpo.config import EnvironmentConfig, ToolConfig
from grpo.runs.given import NOTHING
from grpo.runs.partners import invite
from grpo.training import passes

PAGE = (PAGES / "extending.md").read_text()
FILES = {block.title: block.body for block in blocks("extending.md") if block.title}


def imported(name: str):
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def written(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of four steps, with the files of the page beside it."""
    monkeypatch.setattr(passes, "PASSES", [*passes.PASSES])
    for name, text in FILES.items():
        Path(name).write_text(text)
    return recipe


def run(folder: str, source: type | None, *callbacks, resume: bool = False, steps: int = 4, **settings) -> grpo.Trainer:
    pieces = {"rewards": [{"use": "brevity.py:reward"}], "log": {"use": ["notes.py:log"]}, "max_completion_length": 24}
    cfg = grpo.recipe("toy.yaml", steps=steps, output_dir=folder, **pieces, **settings)
    trainer = grpo.Trainer(cfg, source=source, callbacks=callbacks, quiet=True)
    trainer.train(resume=resume)
    trainer.close()
    return trainer


def test_the_page_has_a_file_of_each_kind() -> None:
    assert list(FILES) == [
        "brevity.py",
        "soft.py",
        "first_tokens.py",
        "notes.py",
        "easy.py",
        "dice.py",
        "guess.py",
        "twice.py",
    ]
    named = re.findall(r"`?\b(\w+\.py):", PAGE)
    assert set(named) <= set(FILES)


def test_all_of_them_run_together(written: Path) -> None:
    easy = imported("easy.py").Easy
    before = run("before", easy, loss={"type": "dapo", "use": "soft.py:loss"})
    imported("first_tokens.py")
    assert passes.PASSES[0][1].__name__ == "with_first_tokens"
    after = run("after", easy, loss={"type": "dapo", "use": "soft.py:loss"})
    first, cut = before.history[0], after.history[0]
    assert first["rewards/brevity/mean"] == cut["rewards/brevity/mean"] > 0
    assert 0 < cut["grad_norm"] != pytest.approx(first["grad_norm"], rel=1e-3)
    assert first["tasks_again"] == 0
    told = Path("notes.txt").read_text().splitlines()
    assert told[0] == f"StepMetrics 1: {first['reward']}"
    assert len(told) == 8


def test_the_source_gives_tasks_again_and_goes_on_where_it_was(written: Path) -> None:
    easy = imported("easy.py").Easy
    score = "[float(len(text) % 2 and 'a' not in text) for text in completions]"
    Path("brevity.py").write_text(f"def reward(completions, **_):\n    return {score}\n")
    same = {"num_generations": 2, "prompts_per_step": 1}
    whole = run("whole", easy, **same)
    assert max(step["tasks_again"] for step in whole.history) > 0
    done: list[int] = []

    def once(record):
        if record.step == 2 and not done:
            done.append(2)
            return grpo.STOP
        return None

    run("parts", easy, once, **same)
    run("parts", easy, resume=True, **same)
    same_end(Path("whole"), Path("parts"))
    named = run("named", None, **same, **{"data.sampler": "easy.py:Easy"})
    assert [step["tasks_again"] for step in named.history] == [step["tasks_again"] for step in whole.history]
    assert [step["reward"] for step in named.history] == [step["reward"] for step in whole.history]


def test_an_environment_is_named_or_given(written: Path) -> None:
    turns, texts = [], []

    def count(record):
        rollouts = [rollout for group in record.groups for rollout in group.rollouts]
        texts.extend(rollout.trajectory.text for rollout in rollouts if not all(rollout.trajectory.trained))
        turns.append([rollout.trajectory.trained.count(False) for rollout in rollouts])

    twice = imported("twice.py").Twice
    easy = imported("easy.py").Easy
    named = run("named", easy, count, steps=2, **{"environment.use": "twice.py:Twice"})
    assert any(untrained > 0 for untrained in turns[0])
    assert all(" Sure?" in text for text in texts)  # what the reward was given
    cfg = grpo.recipe("toy.yaml", steps=2, output_dir="given", max_completion_length=24)
    given = grpo.Trainer(cfg, rewards=["brevity.py:reward"], source=easy, environment=twice(), quiet=True)
    given.train()
    given.close()
    assert [step["loss"] for step in given.history] == [step["loss"] for step in named.history]


def test_a_tool_is_a_function(written: Path) -> None:
    tools = [ToolConfig(use="dice.py:roll")]
    partners = invite({"": EnvironmentConfig(workers=1)}, tools, NOTHING, 1)
    ((host, _),) = partners.hosts.values()
    (seat,) = host.seats(0, 1)
    seat.reset({}, 3).result()
    rolled = seat.call("roll", {"sides": 6}).result().value
    assert 1 <= int(rolled) <= 6
    partners.close()


def test_an_environment_rewards_turns(written: Path) -> None:
    cfg = grpo.recipe(
        "toy.yaml", steps=2, rewards=[], max_completion_length=48, **{"environment.use": "guess.py:Guess"}
    )
    with grpo.Trainer(cfg, quiet=True) as trainer:
        seen = []
        trainer.callbacks.append(lambda record: seen.extend(g.rollouts for g in record.groups))
        with contextlib.suppress(grpo.RunError):  # a model that knows nothing may guess nothing in two steps
            trainer.train()
    talks = [rollout.trajectory.conversation for rollouts in seen for rollout in rollouts]
    assert all("Guess my number" in talk.prompt[-1]["content"] for talk in talks)
    said = {message["content"] for talk in talks for message in talk.messages if message["role"] == "user"}
    assert said <= {"It is higher.", "It is lower.", "Right!"}
    assert said
