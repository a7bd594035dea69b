"""The manual: its reference has everything, its links lead somewhere, and it builds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import grpo
from grpo.config.describe import settings
from grpo.scoring.meanings import MEANINGS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def manual() -> ModuleType:
    spec = importlib.util.spec_from_file_location("manual", ROOT / "docs" / "manual.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(manual: ModuleType) -> dict[str, set[str]]:
    """The anchors of each page of the reference."""
    return {place: manual.anchors(text) for place, text in manual.generated().items()}


def test_every_setting_has_an_entry(manual: ModuleType, reference: dict[str, set[str]]) -> None:
    keys = {manual.anchor(setting.key) for setting in settings()}
    assert len(keys) == len(settings())
    assert keys - reference["reference/settings.md"] == set()


def test_a_setting_is_shown_with_type_default_and_meaning(manual: ModuleType) -> None:
    text = manual.generated()["reference/settings.md"]
    entry = text[text.index("{#loss.epsilon_max}") :].split("####")[0]
    assert "*number above 0*, default `5.0`" in entry
    assert "cispo's upper bound" in entry


def test_every_command_has_an_entry(manual: ModuleType, reference: dict[str, set[str]]) -> None:
    import typer

    from grpo.cli import app

    def names(command, name: str) -> list[str]:
        below = [
            inner for sub, one in getattr(command, "commands", {}).items() for inner in names(one, f"{name} {sub}")
        ]
        return [name, *below]

    every = names(typer.main.get_command(app), "grpo")
    assert {"grpo train", "grpo recipes schema", "grpo bench rollout"} <= set(every)
    assert {manual.anchor(name) for name in every} - reference["reference/commands.md"] == set()
    assert "--resume-from" in manual.generated()["reference/commands.md"]


def test_every_metric_has_an_entry(manual: ModuleType, reference: dict[str, set[str]]) -> None:
    names = {manual.anchor(name) for section in MEANINGS.values() for name in section}
    assert names - reference["reference/metrics.md"] == set()


def test_every_public_name_has_an_entry(reference: dict[str, set[str]]) -> None:
    assert {f"grpo.{name}" for name in grpo.__all__} - reference["reference/python.md"] == set()
    assert {"LoadedPolicy.sample", "grpo.Trainer.train"} <= reference["reference/python.md"]


def test_no_link_is_dead(manual: ModuleType) -> None:
    assert manual.dead_links({"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}) == []


@pytest.mark.parametrize(
    "link", ["nowhere.md", "loss.md#nothing", "../../grpo/nothing.py", "reference/settings.md#loss.bata"]
)
def test_a_dead_link_is_noticed(manual: ModuleType, link: str) -> None:
    more = {"docs/pages/mine.md": f"[here]({link}), and `[not](a-link.md)`\n\n```\n[nor](this.md)\n```\n"}
    assert f"docs/pages/mine.md: {link}" in manual.dead_links(more)
    assert not any(dead.endswith((": a-link.md", ": this.md")) for dead in manual.dead_links(more))


def test_a_living_link_is_none(manual: ModuleType) -> None:
    there = "[a](loss.md#a-teacher) [b](reference/settings.md#loss.beta) [c](../../grpo/presets.py) [d](#e)\n\n## E"
    assert not any(dead.startswith("docs/pages/mine.md") for dead in manual.dead_links({"docs/pages/mine.md": there}))


def test_settings_link_to_the_reference(manual: ModuleType) -> None:
    linked = manual.with_settings_linked("# `loss.beta`\n`loss.beta: 0.1` and `loss.bata`\n", "docs/pages/a/mine.md")
    assert linked == "# `loss.beta`\n[`loss.beta: 0.1`](../reference/settings.md#loss.beta) and `loss.bata`\n"


def test_every_page_is_in_the_navigation(manual: ModuleType) -> None:
    config = yaml.safe_load((ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(item) -> list[str]:
        if isinstance(item, str):
            return [item]
        return [page for inner in (item.values() if isinstance(item, dict) else item) for page in pages(inner)]

    navigated = pages(config["nav"])
    assert len(navigated) == len(set(navigated))
    made = {place for place in manual.gathered() if not place.startswith(("source/", "incoming-"))}
    assert set(navigated) == made


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra `docs`")
def test_it_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        str(ROOT / "docs/mkdocs.yml"),
        "-d",
        str(tmp_path),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert 'src="http' not in text, page
        assert 'rel="stylesheet" href="http' not in text, page
    assert "effective_sample_size" in (tmp_path / "search" / "search_index.js").read_text(encoding="utf-8")
