"""What is imported, and what is left for those who need it."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.backend.imports import alone, unseen

MODULE = "grpo_test_unseen"


def test_an_unseen_package_is_as_if_not_installed_and_then_there_again(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / f"{MODULE}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with unseen(MODULE), pytest.raises(ImportError):
        importlib.import_module(MODULE)
    found = importlib.import_module(MODULE)
    with unseen(MODULE):
        assert importlib.import_module(MODULE) is found
    del sys.modules[MODULE]


@pytest.fixture
def package(tmp_path: Path, monkeypatch) -> str:
    """A package that counts how often it is imported, with a module `deep.one`, and `deep.needy`, which needs it."""
    name = "grpo_test_heavy"
    for place, text in (
        ("", "import sys\nsys.imported = getattr(sys, 'imported', 0) + 1\nheavy = 'heavy'\n"),
        ("deep", "from .. import heavy\n"),
        ("deep/one", "from .two import two\none = two - 1\n"),
        ("deep/two", "two = 2\n"),
        ("deep/needy", "from .. import heavy\n"),
    ):
        file = tmp_path / name / f"{place}.py" if "/" in place else tmp_path / name / place / "__init__.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "imported", 0, raising=False)
    yield name
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def test_a_module_alone_imports_no_package_and_leaves_none_behind(package: str) -> None:
    assert alone(f"{package}.deep.one").one == 1
    assert sys.imported == 0
    assert not any(name.startswith(package) for name in sys.modules)
    assert importlib.import_module(f"{package}.deep").heavy == "heavy"
    assert alone(f"{package}.deep.one") is sys.modules[f"{package}.deep.one"]  # it is there already
    assert sys.imported == 1


def test_a_module_that_needs_its_package_is_imported_as_always(package: str) -> None:
    assert alone(f"{package}.deep.needy").heavy == "heavy"
    assert sys.imported == 1
    assert sys.modules[package].heavy == "heavy"


HEAVY = """
import sys
heavy = ("mlx", "mlx_lm", "transformers", "datasets", "wandb", "pandas", "pyarrow", "numpy")
def held(): return [name for name in heavy if name in sys.modules]
from grpo.cli import main
sys.argv = ["grpo", "--help"]
try:
    main()
except SystemExit:
    pass
print("help holds", held())
import grpo.runs.prepare
print("training holds wandb:", any(name.split(".")[0] == "wandb" for name in sys.modules))
"""


WORKER = """
import sys
import grpo.scoring.worker, grpo.scoring.loading, grpo.scoring.casefile
print([name for name in ("mlx", "numpy", "asyncio", "importlib.metadata", "ctypes.util") if name in sys.modules])
"""


def test_the_process_of_a_reward_function_starts_with_little() -> None:
    """Each takes a tenth of its start and more, and a run waits for one for each of its reward functions."""
    ran = subprocess.run([sys.executable, "-P", "-c", WORKER], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_help_imports_nothing_heavy_and_training_no_wandb() -> None:
    """Each costs every command half a second or more."""
    ran = subprocess.run([sys.executable, "-c", HEAVY], capture_output=True, text=True, check=True)
    assert "help holds []" in ran.stdout
    assert "training holds wandb: False" in ran.stdout
