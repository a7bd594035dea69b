"""The user's own code that a run depends on, as it is found without running it."""

import sys
from pathlib import Path

import pytest

from grpo.recipes import load_recipe
from grpo.runs import sources
from grpo.runs.sources import imported_files, source_hashes

FILES = {
    "digits.py": "import json, numpy, mlx.core\nfrom helper import score\ndef reward(**_):\n    import lazy\n",
    "helper.py": "from pkg.sub import deep\nimport spaces.inside\nif False:\n    import absent\n",
    "lazy.py": "import helper, digits\n",
    "unused.py": "",
    "numpy/notes.txt": "a folder of data, no module",
    "spaces/inside.py": "",
    "pkg/__init__.py": "",
    "pkg/other.py": "",
    "pkg/sub/__init__.py": "",
    "pkg/sub/deep.py": "from .. import other\nfrom . import beside\nimport broken\n",
    "pkg/sub/beside.py": "from grpo.scoring import text\n",
    "broken.py": "def (\n",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "project"


def names(files: list[Path], folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in files}


def test_what_a_file_imports_is_found_however_far(project: Path) -> None:
    left_out = {"digits.py", "unused.py", "numpy/notes.txt"}
    assert names(imported_files(project / "digits.py"), project) == set(FILES) - left_out
    deep = {"pkg/__init__.py", "pkg/other.py", "pkg/sub/__init__.py", "pkg/sub/beside.py", "broken.py"}
    assert names(imported_files(project / "pkg/sub/deep.py"), project) == deep


def test_installed_packages_are_not_the_users_own(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = project / "lib/site-packages/theirs.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("import helper\n")
    (project / "digits.py").write_text("import theirs\n")
    monkeypatch.setattr(sources, "STARTED_WITH", (*sys.path, str(installed.parent)))
    assert imported_files(project / "digits.py") == []
    assert imported_files(installed) == []


def test_a_hash_for_each_file_of_rewards_loss_environment_tools_and_loggers(recipe: Path) -> None:
    Path("helper.py").write_text("")
    for name in ("mine", "room", "seen", "tool"):
        Path(f"{name}.py").write_text("import helper\ndef f(*_): pass\n")
    named = ["loss.use=mine.py:f", "environment.use=room.py:f", "tools=['tool.py:f']", "log.use=[seen.py:f]"]
    cfg = load_recipe(recipe, named)
    here = Path.cwd().resolve()
    found = source_hashes(cfg.uses)
    assert set(found) == {
        *(f"{here}/{name}" for name in ("digits.py:reward", "mine.py:f", "room.py:f", "seen.py:f", "tool.py:f")),
        *(f"{here}/{name}, helper.py" for name in ("mine.py:f", "room.py:f", "seen.py:f", "tool.py:f")),
    }
    Path("helper.py").write_text("# changed\n")
    assert {use for use, digest in source_hashes(cfg.uses).items() if digest != found[use]} == {
        f"{here}/{name}, helper.py" for name in ("mine.py:f", "room.py:f", "seen.py:f", "tool.py:f")
    }


def test_the_file_of_a_program_counts_and_the_program_that_runs_it_does_not(tmp_path: Path) -> None:
    for name in ("play.js", "node", "python3.11"):
        (tmp_path / name).write_text(name)
    hashes = source_hashes([str(tmp_path / name) for name in ("play.js", "node", "python3.11", "gone.js")])
    assert list(hashes) == [str(tmp_path / "play.js")]
    before = dict(hashes)
    (tmp_path / "play.js").write_text("other")
    assert source_hashes([str(tmp_path / "play.js")]) != before
