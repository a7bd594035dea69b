"""A recipe that was changed in code is checked like one from a file."""

import re
from pathlib import Path

import pytest

from grpo.config import Recipe
from grpo.errors import UserError
from grpo.recipes import load_recipe, recipe_of, with_settings

WHAT = "a recipe that was changed in code"


@pytest.fixture
def cfg(recipe) -> Recipe:
    return load_recipe(recipe)


def test_only_what_is_named_changes(cfg: Recipe) -> None:
    new = with_settings(cfg, {"optim.steps": 7, "seed": 3})
    assert (new.optim.steps, new.seed) == (7, 3)
    assert with_settings(new, {"optim.steps": cfg.optim.steps, "seed": cfg.seed}) == cfg
    assert (cfg.optim.steps, cfg.seed) != (7, 3)
    assert new.rollout is cfg.rollout


def test_a_section_is_changed_by_its_own_names(cfg: Recipe) -> None:
    assert with_settings(cfg.optim, {"steps": 7}) == with_settings(cfg, {"optim.steps": 7}).optim
    assert with_settings(cfg, {"optim": with_settings(cfg.optim, {"steps": 7})}).optim.steps == 7


def test_a_section_that_was_not_there_is_made(cfg: Recipe) -> None:
    assert cfg.eval is None
    assert with_settings(cfg, {"eval.prompts": 3}).eval.prompts == 3
    assert with_settings(cfg, {"log.wandb.project": "mine"}).log.wandb.project == "mine"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.steps", 0),
        ("optim.steps", "10"),
        ("optim.stepz", 10),
        ("optin.steps", 10),
        ("loss.type", "dappo"),
        ("model.name", ""),
        ("log.wandb.tagz", ("a",)),
        ("rewards", ()),
        ("data.system", "Be brief."),
        ("rollout.prompts_per_step", 3),
        ("advantage.soft_overlong_cache", 8),
    ],
)
def test_a_mistake_is_said_as_of_a_file(recipe: Path, key: str, value: object) -> None:
    """Bounds, types, unknown keys, and settings that do not go together: in a section, and between sections."""
    cfg = load_recipe(recipe, ["data.chat_template=never", "optim.num_minibatches=2"])
    with pytest.raises(UserError) as of_code:
        with_settings(cfg, {key: value})
    whole = cfg.model_dump(mode="json")
    *above, last = key.split(".")
    section = whole
    for name in above:
        section[name] = section.get(name) or {}
        section = section[name]
    section[last] = value
    with pytest.raises(UserError) as of_data:
        recipe_of(whole, WHAT)
    assert str(of_code.value) == str(of_data.value)
    assert str(of_code.value).startswith(f"{WHAT}: ")


def test_of_a_section_alone_the_whole_key_is_said(cfg: Recipe) -> None:
    with pytest.raises(UserError, match=re.escape(f"{WHAT}: optim.steps: expected greater than 0, got 0.")):
        with_settings(cfg.optim, {"steps": 0})
    with pytest.raises(UserError, match=re.escape(f"{WHAT}: unknown key optim.stepz. Did you mean optim.steps?")):
        with_settings(cfg.optim, {"stepz": 1})


def test_nothing_changes_a_recipe_without_a_check() -> None:
    """`model_copy(update=...)` of pydantic checks nothing."""
    package = Path(__file__).parents[1] / "grpo"
    unchecked = re.compile(r"\.model_(copy\(\s*update=(?!\.\.\.)|construct\()")
    assert [str(path) for path in package.rglob("*.py") if unchecked.search(path.read_text())] == []
