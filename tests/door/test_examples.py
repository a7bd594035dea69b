"""The example in the docstring of each public name runs, and gives what it says."""

import doctest
from typing import Any

import pytest

import grpo

EXAMPLES = ["Loss", "Trainer", "advantages", "batches", "load", "optimizer", "recipe", "reward", "score", "tasks"]


def test_every_function_of_the_door_has_an_example() -> None:
    doors = [name for name, module in grpo._PLACES.items() if module.startswith("grpo.door.") and name != "STOP"]
    assert sorted(doors) == sorted(EXAMPLES)


@pytest.fixture
def names(student: str) -> dict[str, Any]:
    """What examples take for granted: two tokens of a vocabulary, a group, a reward, a short recipe."""

    def brevity(completions: list[str], **_: Any) -> list[float]:
        return [float(number % 2 == 0) for number in range(len(completions))]

    policy = grpo.load(student, rank=4)
    groups = policy.sample(next(grpo.tasks("builtin:arithmetic", prompt="{question}", n=1)), n=2, max_tokens=8)
    scored = grpo.score(groups, [brevity])
    short = {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 8, "eval": None}
    recipe = grpo.recipe("quickstart", steps=1, **short)
    return {
        "grpo": grpo,
        "policy": policy,
        "groups": scored,
        "brevity": brevity,
        "my_reward": brevity,
        "recipe": recipe,
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name: str, names: dict[str, Any]) -> None:
    if name == "batches":
        names["groups"] = grpo.advantages(names["groups"])
    found = doctest.DocTestFinder(recurse=False).find(getattr(grpo, name), name, globs=names)
    (test,) = [one for one in found if one.examples]
    said: list[str] = []
    assert doctest.DocTestRunner(verbose=False).run(test, out=said.append).failed == 0, "".join(said)
