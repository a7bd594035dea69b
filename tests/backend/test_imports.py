"""What is imported, and what is left for those who need it."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.backend.imports import unseen

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


def test_help_imports_nothing_heavy_and_training_no_wandb() -> None:
    """Each costs every command half a second or more."""
    ran = subprocess.run([sys.executable, "-c", HEAVY], capture_output=True, text=True, check=True)
    assert "help holds []" in ran.stdout
    assert "training holds wandb: False" in ran.stdout
