"""What the schema says of itself: nothing without an explanation, and nothing that the recipes contradict."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from grpo.config import Recipe
from grpo.config.describe import json_schema, settings
from grpo.mistakes import _all_keys
from grpo.plugins import bundled

RECIPES = sorted(bundled("recipes").glob("*.yaml"))


def numberless(key: str) -> str:
    return key.replace(".0.", ".").replace(".<name>.", ".")


def test_every_key_explains_itself() -> None:
    assert {numberless(one.key) for one in settings()} == set(_all_keys(Recipe))
    assert [one.key for one in settings() if len(one.meaning) < 10] == []


@pytest.mark.parametrize(
    ("key", "type_", "default"),
    [
        ("seed", "integer at least 0", "0"),
        ("model.name", "text", None),
        ("adapter.layers", "all or [integer at least 0, integer above 0]", '"all"'),
        ("rollout.min_p", "number at least 0 and below 1", "0.0"),
        ("rollout.stop", "list of text", "[]"),
        ("rewards", "list of sections", "[]"),
        ("environments", "sections by name", "{}"),
        ("environments.<name>.max_turns", "integer above 0 or null", "null"),
        ("tools.0.use", "text", None),
        ("rewards.0.calls", "step | group | completion or null", "null"),
        ("data.columns", "keys and values: text", "{}"),
        ("eval", "section", "null"),
        ("log.wandb.project", "text", '"grpo"'),
    ],
)
def test_a_key_has_its_type_and_its_default(key: str, type_: str, default: str | None) -> None:
    (found,) = [one for one in settings() if one.key == key]
    assert (found.type, found.default) == (type_, default)


@cache
def editor() -> Draft202012Validator:
    Draft202012Validator.check_schema(json_schema())
    return Draft202012Validator(json_schema())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_an_editor_finds_no_fault_with_a_shipped_recipe(path: Path) -> None:
    recipe = yaml.safe_load(path.read_text())
    assert [error.message for error in editor().iter_errors(recipe)] == []
    recipe["rollout"]["num_generation"] = 1
    (error,) = editor().iter_errors(recipe)
    assert "num_generation" in error.message


def test_the_command_prints_a_section_or_all_of_it(run_cli) -> None:
    section = run_cli("recipes", "schema", "log.completions").out
    assert "log.completions.groups  = null  (integer above 0 or null)\n    Number of prompts to keep" in section
    assert "loss." not in section
    assert json.loads(run_cli("recipes", "schema", "--json").out) == json_schema()
    wrong = run_cli("recipes", "schema", "rewards.use")
    assert (wrong.code, wrong.err) == (
        2,
        "grpo: rewards.use: a recipe has no such key. Did you mean rewards.0.use?\n",
    )
