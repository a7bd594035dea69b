"""The pages beside the recipes name what there is: settings, metrics, recipes and their figures."""

from __future__ import annotations

import json
import re

import pytest

from grpo.config.describe import settings
from grpo.plugins import bundled

RECIPES = bundled("recipes")
TUTORIALS = bundled("docs/pages/tutorials")
KEYS = {setting.key for setting in settings()}
SECTIONS = {key.partition(".")[0] for key in KEYS}


def page(name: str) -> str:
    folder = RECIPES if (RECIPES / name).is_file() else TUTORIALS
    return (folder / name).read_text(encoding="utf-8")


def tables(text: str) -> list[list[str]]:
    """The rows of a page's tables, without heads and rules."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not set(row[0]) <= set("- ")]


def ticked(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def keys_in(text: str) -> set[str]:
    """What in a text looks like a key of a recipe, values cut off."""
    found = {one.partition(":")[0].strip() for one in ticked(text)}
    return {one for one in found if re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)+", one) and one.split(".")[0] in SECTIONS}


@pytest.mark.parametrize(
    "name", ["README.md", "LONG_COMPLETIONS.md", *sorted(path.name for path in TUTORIALS.glob("*.md"))]
)
def test_every_key_on_a_page_is_one(name: str) -> None:
    assert keys_in(page(name)) - KEYS == set()


def test_a_wrong_key_is_noticed() -> None:
    assert keys_in("Set `loss.bata: 1` or `rollout.top_p`, in `recipe.yaml`.") - KEYS == {"loss.bata"}


def test_every_metric_on_a_page_is_measured(run_cli, recipe, tmp_path) -> None:
    more = ["loss.beta=0.1", "loss.off_policy_mask_threshold=0.5", "advantage.soft_overlong_cache=2"]
    ran = run_cli("train", recipe, "output_dir=run", *more)
    assert ran.code == 0, ran.err
    measured = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    measured.setdefault(
        "speculation/gain", None
    )  # there only if plain steps were timed, which the machine's load decides
    looked_at = {name for row in tables(page("debugging.md")) for name in ticked(row[0])}
    assert {name.replace("<name>", "digits") for name in looked_at} - set(measured) == set()
    assert len(looked_at) > 25


SHOWN = ("H200", "RTX 4090 24 GB", "M4 Max 128 GB", "M4 16 GB")


def figures(head: str) -> list[str]:
    """What the index tells of a recipe, from the lines at its head: memory on the H200, and a step on each machine."""
    said = dict(re.findall(rf"^#   ({'|'.join(SHOWN)}) +(.+)$", head, re.MULTILINE))
    steps = {chip: re.search(r"step (?:about|roughly|over) (.+?)  +run", line) for chip, line in said.items()}
    return [
        said["H200"].partition(" GB")[0] + " GB",
        *(found[1] if (found := steps[chip]) else said[chip].partition(":")[0] for chip in SHOWN),
    ]


def test_the_index_has_every_recipe_with_the_figures_of_its_head() -> None:
    rows = {ticked(row[0])[0]: row for row in tables(page("README.md")) if ticked(row[0])}
    heads = {path.stem: path.read_text(encoding="utf-8").partition("\nseed:")[0] for path in RECIPES.glob("*.yaml")}
    assert rows.keys() == heads.keys()
    assert f"its plan is {rows.pop('quickstart')[3]}," in heads.pop("quickstart")
    assert {name: row[3:8] for name, row in rows.items()} == {name: figures(head) for name, head in heads.items()}
