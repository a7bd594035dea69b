"""Objects of the wrong kind, or at the wrong place, are answered with what is wrong and what to do."""

from dataclasses import replace
from pathlib import Path

import pytest

import grpo
from grpo.door.handing import handed
from grpo.errors import closest


def digits(completions, **_):
    return [sum(c.isdigit() for c in text) + place for place, text in enumerate(completions)]


class Echo:
    """An environment that lets the model answer, and counts how often it was made."""

    async def rollout(self, task, sampler):
        from grpo.environments.single import SingleTurn

        return await SingleTurn().rollout(task, sampler)


class Needy(Echo):
    def __init__(self, tool) -> None:
        self.tool = tool


@pytest.fixture
def policy(student: str):
    return grpo.load(student, rank=2)


@pytest.fixture
def raw(policy):
    return policy.sample(["What is 1+2?"], n=2, max_tokens=4)


@pytest.fixture
def ready(raw):
    return grpo.batches(grpo.advantages(grpo.score(raw, [digits])))


def test_a_text_alone_is_one_prompt(policy) -> None:
    assert policy.sample("What is 1+2?", n=2, max_tokens=4, key=3) == policy.sample(
        ["What is 1+2?"], n=2, max_tokens=4, key=3
    )
    (task,) = next(grpo.tasks([{"prompt": "Hi?"}], n=1))
    assert [group.task.prompt for group in policy.sample(task, n=1, max_tokens=2)] == ["Hi?"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tasks": grpo.tasks([{"prompt": "Hi?"}])}, r"iterator of grpo.tasks: pass next\(tasks\)"),
        ({"tasks": [3]}, "prompt 0: expected a task.*got an int"),
        ({"tasks": [{"role": "user", "content": "Hi?"}]}, r"prompt 0 is a single chat message.*\[\[message\]\]"),
        ({"tasks": [["Hi?"]]}, "prompt 0: expected .*got a list"),
        ({"tasks": 3}, "expected a list of tasks or prompts, got an int"),
        ({"temperature": -1}, "rollout.temperature: expected greater than or equal to 0.01, got -1. 0 is greedy"),
        ({"temperature": float("nan")}, "rollout.temperature: expected a finite number"),
        ({"temperature": "hot"}, 'rollout.temperature: expected a valid number, got "hot"'),
        ({"n": "two"}, "policy.sample: n: expected a whole number, got 'two'"),
        ({"key": "a"}, "policy.sample: key: expected a whole number"),
        ({"max_tokens": 10**6}, r"1,000,000 \(max_tokens\) exceed the model's [\d,]+ positions"),
        ({"max_new_tokens": 3}, "unknown setting max_new_tokens.*Did you mean 'max_tokens'"),
        ({"environment": Needy}, "environment Needy cannot be created without arguments: TypeError"),
        ({"environment": object()}, r"environment: object has no method rollout\(task, sampler\)"),
        ({"environment": "mine.py:Nobody"}, "there is no file mine.py"),
    ],
)
def test_what_cannot_be_sampled(policy, given: dict, said: str) -> None:
    with pytest.raises(grpo.UserError, match=said):
        policy.sample(**{"tasks": ["Hi?"], "n": 1, "max_tokens": 2, **given})


def test_an_environment_is_an_object_a_class_or_a_name(policy, recipe: Path) -> None:
    Path("mine.py").write_text(
        "from grpo.environments.single import SingleTurn\n\n\nclass Mine(SingleTurn):\n    pass\n"
    )
    plain = policy.sample(["Hi?"], n=2, max_tokens=4, key=1)
    for given in (Echo, Echo(), "mine.py:Mine"):
        assert policy.sample(["Hi?"], n=2, max_tokens=4, key=1, environment=given) == plain
        made = grpo.Trainer(recipe, environment=given)
        assert type(made._given.environment(made.recipe.environment.use, {})).__name__ in ("Echo", "Mine")


def test_a_list_does_for_a_tuple(policy) -> None:
    assert policy.sample("Hi?", n=1, max_tokens=2, stop=["5"])[0].rollouts


def test_a_call_that_is_missing_is_named(raw) -> None:
    scored = grpo.score(raw, [digits])
    for call in (grpo.advantages, grpo.batches):
        with pytest.raises(grpo.UserError, match=r"have no scores: call groups = grpo.score\(groups, rewards\) first"):
            call(raw)
    with pytest.raises(grpo.UserError, match=r"but no advantages: call groups = grpo.advantages\(groups\) first"):
        grpo.batches(scored)
    assert len(grpo.batches(grpo.advantages(scored)))


def test_rewards_that_are_equal_or_failed_are_no_missing_call(raw) -> None:
    equal = grpo.reward(lambda completions, **_: [1.0] * len(completions), name="equal")
    silent = grpo.reward(lambda completions, **_: [None] * len(completions), name="silent")
    for reward in (equal, silent):
        assert len(grpo.batches(grpo.advantages(grpo.score(raw, [reward])))) == 0
        assert len(grpo.batches(grpo.score(raw, [reward]))) == 0
    by_hand = [replace(g, rollouts=tuple(replace(r, advantage=0.5) for r in g.rollouts)) for g in raw]
    assert sum(len(batch.token_ids) for batch in grpo.batches(by_hand)) == sum(len(g.rollouts) for g in by_hand)


def test_a_loss_goes_by_its_name(policy, raw) -> None:
    groups = grpo.advantages(grpo.score(raw, [digits]))
    batches = grpo.batches(groups, loss="gspo")
    assert batches.loss == grpo.Loss("gspo")
    assert policy.gradient(batches, "gspo").loss == policy.gradient(batches, grpo.Loss("gspo")).loss


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p, g, b, o: o.update(p, b), r"opt.update: expected a gradient .*with batches, call policy.update"),
        (lambda p, g, b, o: o.update(p.gradient(b, b.loss), p), "opt.update: expected a gradient .*LoadedPolicy"),
        (
            lambda p, g, b, o: o.update(3, p.gradient(b, b.loss)),
            "opt.update: expected a policy of grpo.load as the first argument",
        ),
        (lambda p, g, b, o: p.update(b, "adamw"), "opt: expected an optimizer of grpo.optimizer, got a str"),
        (lambda p, g, b, o: p.update(o, b), "opt: expected an optimizer of grpo.optimizer, got a BatchList"),
        (lambda p, g, b, o: p.update(3, o), "expected batches from grpo.batches, got an int"),
        (lambda p, g, b, o: p.update(b[0], o), "only the list returned by grpo.batches has a loss: pass loss="),
        (lambda p, g, b, o: p.gradient(g, b.loss), r"list with a Group: grpo.batches\(groups\) makes batches"),
        (lambda p, g, b, o: p.gradient(b, 3), "loss: expected a grpo.Loss, its name or a function, got an int"),
        (lambda p, g, b, o: grpo.score(g[0], [digits]), r"expected a list of groups, got one group: write \[group\]"),
        (lambda p, g, b, o: grpo.score([digits], g), "grpo.score: expected groups .*list with a function"),
        (lambda p, g, b, o: grpo.score(g, 3), r"rewards: expected a list, such as \[my_reward\], got an int"),
        (lambda p, g, b, o: grpo.advantages(g[0]), r"grpo.advantages: .*write \[group\]"),
        (lambda p, g, b, o: grpo.batches(b), "grpo.batches: expected groups .*list with a Batch"),
        (lambda p, g, b, o: grpo.batches(g, digits), "loss is a function.*pass the function to policy.gradient"),
        (lambda p, g, b, o: grpo.batches(g, "dappo"), "Did you mean 'dapo'"),
        (lambda p, g, b, o: grpo.batches(g, 3), "grpo.batches: loss: expected a grpo.Loss or its name, got an int"),
    ],
)
def test_calls_with_other_objects(policy, raw, ready, call, said: str) -> None:
    with pytest.raises(grpo.UserError, match=said):
        call(policy, raw, ready, grpo.optimizer("sgd"))


def test_one_batch_with_its_loss_is_an_update(policy, ready) -> None:
    assert policy.update(ready[0], grpo.optimizer("sgd"), ready.loss).grad_norm > 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: grpo.tasks(["hi"]), r"grpo.tasks: data.source: .*'hi' is not a file. Pass prompts .* \[\{\"prompt\""),
        (lambda: grpo.tasks([{"prompt": "Hi?"}], n="2"), "grpo.tasks: n: expected a whole number"),
        (lambda: grpo.tasks(Path("nope.jsonl")), "nope.jsonl: there is no such file"),
        (lambda: grpo.recipe({"seed": 1}), "grpo.recipe: expected a recipe's name or file, got a dict"),
        (
            lambda: grpo.Trainer("quickstart", environment_factory=Echo),
            r"grpo.Trainer: there is no argument 'environment_factory': TRL's environment_factory is environment here: "
            r"grpo.Trainer\(..., environment=...\)",
        ),
        (lambda: grpo.Trainer("quickstart", reward_funcs=[digits]), "TRL's reward_funcs is rewards here"),
        (
            lambda: grpo.Trainer("quickstart", peft_config=None),
            r"argument 'peft_config': TRL's peft_config is adapter.type here .* Set it in the recipe",
        ),
        (
            lambda: grpo.Trainer("quickstart", reward=[digits]),
            r"argument 'reward'; the arguments are recipe, rewards, data, .*, quiet. Did you mean 'rewards'\?",
        ),
        (lambda: grpo.Trainer({"seed": 1}), "expected a recipe's name or file, got a dict"),
        (lambda: grpo.recipe("quickstart", lr=1e-3), "unknown key lr. Did you mean optim.learning_rate"),
        (lambda: grpo.optimizer(lr=1e-3), "unknown key optim.lr. Did you mean optim.learning_rate"),
        (lambda: grpo.load("x", alpha=16), "Did you mean 'scale'. PEFT's alpha is scale × rank"),
        (lambda: grpo.load("x", targts=16), "Did you mean 'targets'"),
        (
            lambda: grpo.recipe("quickstart", steps=-1),
            "^grpo.recipe: optim.steps: expected greater than 0, got -1.$",
        ),
        (lambda: grpo.Trainer("quickstart", callbacks=3), "callbacks: expected a function or a list .*got an int"),
        (lambda: grpo.Trainer("quickstart", callbacks=["log"]), "callbacks: expected functions, got a str"),
        (lambda: grpo.Trainer("quickstart", loss="dapo"), "loss: expected a function .*in the recipe: grpo.recipe"),
        (lambda: grpo.Trainer("quickstart", source="a.py:Mine"), "source: expected a function or a class .*got a str"),
        (lambda: grpo.Trainer("quickstart", source=object()), "source=lambda stream: mine"),
        (
            lambda: grpo.Trainer("quickstart", environment=object()),
            "grpo.Trainer: environment: expected a class, a function",
        ),
        (lambda: grpo.Trainer("quickstart").train(resume="runs/nope"), r"^train\(resume='runs/nope'\): there is no"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(call, said: str) -> None:
    with pytest.raises(grpo.UserError, match=said):
        call()


def test_a_callback_answers_nothing_or_stop(recipe: Path) -> None:
    cfg = grpo.recipe(recipe, steps=2, eval=None, output_dir="run")
    with pytest.raises(grpo.UserError, match=r"callback 'yes' returned 'True': a callback returns None, or grpo.STOP"):
        grpo.Trainer(cfg, rewards=[digits], callbacks=yes, quiet=True).train()
    assert Path("run/checkpoints/step-000001").is_dir()


def yes(_) -> bool:
    return True


def test_a_reward_of_that_name_goes_by_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "brevity.py").write_text("def reward(completions, **_):\n    return [1.0] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import brevity

    assert grpo.reward(brevity.reward).config.name == "brevity"
    assert grpo.reward(brevity.reward, name="short").config.name == "short"


def test_paths_are_settings(recipe: Path) -> None:
    cfg = grpo.Trainer(recipe, data=Path("train.jsonl")).recipe
    assert cfg.data.source == "train.jsonl"
    cfg, _ = handed(cfg, None, [Path("train.jsonl")], None, None, None, None)
    assert cfg.data.source == ("train.jsonl",)


def test_of_names_as_similar_the_one_that_begins_so() -> None:
    for known in (["dppo", "dapo"], ["dapo", "dppo"]):
        assert closest("dappo", known) == "dapo"
    assert closest("zzz", ["dapo"]) is None
    assert closest("x", []) is None
