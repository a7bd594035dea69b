"""Commits on the Hub that a run keeps to: of its model, its data, and its held-out data."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from grpo.backend.hub import Repository, cached_commit
from grpo.config import Recipe
from grpo.runs.revisions import revisions_of, with_revisions
from grpo.runs.sections import data_of


def config(data: dict, held_out: dict | None) -> Recipe:
    sections = {"model": {"name": "a/model"}, "rewards": ({"use": "exact"},), "optim": {"steps": 1}}
    return Recipe.model_validate({**sections, "data": data, "eval": held_out})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a model and two datasets, one of which has no README."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name, file, commit in (
        ("models--a--model", "snapshots/{}/config.json", "1" * 40),
        ("datasets--a--train", "snapshots/{}/README.md", "2" * 40),
        ("datasets--a--test", ".no_exist/{}/README.md", "3" * 40),
    ):
        path = tmp_path / name / file.format(commit)
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        (tmp_path / name / "refs").mkdir()
        (tmp_path / name / "refs/main").write_text(commit)
    return tmp_path


def test_held_out_data_of_another_repository_is_pinned(cache: Path) -> None:
    cfg = config({"source": "a/train"}, {"source": "a/test"})
    revisions = revisions_of(cfg)
    assert revisions == {"model a/model": "1" * 40, "data a/train": "2" * 40, "eval a/test": "3" * 40}
    (cache / "datasets--a--test/refs/main").write_text("4" * 40)  # somebody pushed
    pinned = with_revisions(cfg, revisions)
    assert {name: data.revision for name, data in data_of(pinned).items()} == {"data": "2" * 40, "eval": "3" * 40}
    assert with_revisions(cfg, {}) == cfg


def test_what_a_recipe_names_itself_stays(cache: Path) -> None:
    cfg = config({"source": "a/train", "revision": "v1"}, {"revision": "v2"})
    assert {name: data.revision for name, data in data_of(cfg).items()} == {"data": "v1", "eval": "v2"}
    kept = with_revisions(cfg, {"data a/train": "2" * 40, "eval a/train": "3" * 40})
    assert {name: data.revision for name, data in data_of(kept).items()} == {"data": "v1", "eval": "v2"}
    same = config({"source": "a/train", "revision": "v1"}, {})
    assert data_of(same)["eval"].revision == "v1"
    assert data_of(config({"source": "a/train", "revision": "v1"}, {"source": "a/test"}))["eval"].revision is None


def test_a_commit_is_known_of_a_repository_without_the_file(cache: Path) -> None:
    assert cached_commit(Repository("dataset", "a/test"), "README.md") == "3" * 40
    assert cached_commit(Repository("dataset", "a/test", "3" * 40), "README.md") == "3" * 40
    assert cached_commit(Repository("dataset", "a/absent"), "README.md") is None
