"""The notebook runs from top to bottom in a process of its own, and what is stored in it is what such a run gave."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
SHORT = """
from grpo.builtin import models
import grpo
models.MODELS["builtin:arithmetic-student"] = models.Student(steps=100, warmup=10)
whole = grpo.recipe
grpo.recipe = lambda *names, **settings: whole(*names, eval={"prompts": 8, "samples": 2}, **settings)
"""
"""A student that is made in a few seconds and is sometimes right, and few prompts to evaluate on."""
PNG = b"\x89PNG\r\n\x1a\n"


def outputs(notebook: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text(cell: list[dict[str, Any]]) -> str:
    return "".join(line for output in cell for line in output.get("text", []))


def run(folder: Path, cache: Path, before: str, *settings: str) -> list[list[dict[str, Any]]]:
    """The notebook's outputs; `before` runs first."""
    code = f"import runpy, sys\n{before}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    code = code.replace("sys.argv[0]", repr(str(ROOT / "tests" / "docs" / "notebooks.py")))
    env = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "GRPO_CACHE": str(cache),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", code, str(NOTEBOOK), "made.ipynb", *settings]
    ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return outputs(json.loads((folder / "made.ipynb").read_text()))


def test_it_runs(tmp_path: Path) -> None:
    made = run(tmp_path, tmp_path, SHORT, "STEPS=2")
    assert "step 2/2" in text(made[3])
    (figure,) = [output for output in made[4] if "data" in output]
    assert base64.b64decode(figure["data"]["image/png"]).startswith(PNG)
    assert "after 2 steps" in text(made[5])
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)
    assert (tmp_path / "adapter" / "adapters.safetensors").is_file()


def test_what_is_stored_is_of_a_whole_run() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    stored = outputs(notebook)
    assert (notebook["nbformat"], len({cell["id"] for cell in notebook["cells"]})) == (4, len(notebook["cells"]))
    assert "step 60/60" in text(stored[3])
    assert any("image/png" in output.get("data", {}) for output in stored[4])
    assert all(str(place) not in NOTEBOOK.read_text() for place in (ROOT, Path.home()))


@pytest.mark.slow
def test_the_whole_run_learns(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made = run(tmp_path, request.config.cache.mkdir("grpo"), "")
    for cells in (made, outputs(json.loads(NOTEBOOK.read_text()))):  # another machine makes another student
        before, after = map(float, re.findall(r"([\d.]+)%", text(cells[5])))
        assert after > before + 25


def test_a_kernel_runs_it_where_there_is_one(tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    notebook.cells = [cell for cell in notebook.cells if "trainer" not in cell.source and "ended" not in cell.source]
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
