"""Settings from Python are those of a file: the same values, the same checks."""

from pathlib import Path

import pytest

import grpo
from grpo.recipes import load_recipe


@pytest.mark.parametrize(
    ("settings", "overrides"),
    [
        ({"steps": 7, "learning_rate": 1e-3}, ["optim.steps=7", "optim.learning_rate=1e-3"]),
        ({"optim.steps": 7}, ["optim.steps=7"]),
        ({"loss": {"type": "gspo", "epsilon": 1e-3}}, ["loss={type: gspo, epsilon: 0.001}"]),
        ({"eval": {"prompts": 3}, "seed": 4}, ["eval={prompts: 3}", "seed=4"]),
        ({"eval": None}, ["eval=null"]),
        ({"targets": ("q_proj", "v_proj")}, ["adapter.targets=[q_proj, v_proj]"]),
        ({"prompt": "{question} 😀 é \\n \"so\" 'it' # is"}, ["data.prompt={question} 😀 é \\n \"so\" 'it' # is"]),
        ({"stop": ["5"]}, ["rollout.stop=['5']"]),
        ({"output_dir": Path("runs") / "mine"}, ["output_dir=runs/mine"]),
        ({"rewards": [{"use": "xml_format", "weight": 2}]}, ["rewards=[{use: xml_format, weight: 2}]"]),
        ({"rewards.0.weight": 0.5}, ["rewards.0.weight=0.5"]),
    ],
)
def test_the_same_recipe_as_from_the_command_line(recipe: Path, settings: dict, overrides: list[str]) -> None:
    assert grpo.recipe(recipe, **settings) == load_recipe(recipe, overrides)


def test_one_of_several_is_to_be_named(recipe: Path) -> None:
    with pytest.raises(grpo.UserError, match=r"every is the last part of 3 keys: write .*eval\.every"):
        grpo.recipe(recipe, every=3)


def test_a_mistake_is_said_to_be_of_the_call(recipe: Path) -> None:
    for settings, said in (
        ({"steps": "7"}, "grpo.recipe: .*optim.steps"),
        ({"steps": [object()]}, "grpo.recipe: steps: a value of type object; a recipe holds"),
        ({"loss": {"typ": "gspo"}}, "unknown key loss.typ"),
        ({"rewards": lambda: 0}, "grpo.recipe: rewards is a function, but a recipe holds names"),
    ):
        with pytest.raises(grpo.UserError, match=said):
            grpo.recipe(recipe, **settings)
