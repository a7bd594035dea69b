"""What `import grpo` costs, and that a wheel brings its recipes and rewards."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from docs.pagerun import blocks

ROOT = Path(__file__).parents[1]
HEAVY = ["mlx.core", "mlx_lm", "numpy", "datasets", "wandb", "transformers", "pydantic", "rich", "math_verify"]


def python(code: str, *paths: Path, cwd: Path | None = None) -> str:
    """What a fresh interpreter prints, with `paths` before everything else."""
    env = {"PYTHONPATH": ":".join(map(str, paths)), "PATH": "/usr/bin:/bin", "HOME": str(cwd or ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=cwd, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_import_loads_nothing_but_the_standard_library() -> None:
    """Not even what is small: `import grpo` is what a notebook begins with."""
    code = (
        "import sys; before = set(sys.modules); import grpo; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    assert python(code).strip() == "['grpo']"


def test_help_loads_no_model_code() -> None:
    code = f"import sys, grpo.cli; print([name for name in {HEAVY[:6]} if name in sys.modules])"
    assert python(code).strip() == "[]"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, installed from a wheel that is built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return site


STUDENT = """
from grpo.builtin import models
models.MODELS["builtin:arithmetic-student"] = models.Student(steps=2, warmup=1)
"""
"""The student is made in a second, and has learned next to nothing."""


def loop_from_the_manual() -> str:
    (loop,) = (block.body for block in blocks("python.md") if block.body.startswith("import grpo\n"))
    return loop


def test_a_loop_of_ones_own_runs_from_the_wheel_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    loop = loop_from_the_manual()
    assert "range(30)" in loop
    where = "import os; os.environ['GRPO_CACHE'] = '../cache'"
    empty = tmp_path / "empty"
    empty.mkdir()
    said = python(f"{where}\n{STUDENT}\n{loop.replace('range(30)', 'range(2)')}\nprint(grpo.__file__)", site, cwd=empty)
    lines = said.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["0", "1"]
    assert lines[-1].startswith(str(site))
    assert {path.name for path in (empty / "adapter").iterdir()} == {"adapters.safetensors", "adapter_config.json"}


def test_the_readme_of_the_package_has_no_relative_links(site: Path) -> None:
    (metadata,) = site.glob("grpo_mlx-*.dist-info/METADATA")
    _, _, readme = metadata.read_text(encoding="utf-8").partition("\n\n")
    assert readme.startswith("# grpo\n")
    assert re.findall(r"\]\((?![a-z]+:)[^)]*\)", readme) == []
    assert "images/" not in readme
    assert "How fast has more" in readme


def test_wheel_outside_the_checkout_finds_recipes_and_rewards(site: Path, tmp_path: Path) -> None:
    code = (
        "import grpo; from grpo.plugins import *; from grpo.recipes import load_recipe;"
        "print(grpo.__file__); print(bundled_names('recipes', '.yaml')); print(bundled_names('rewards', '.py'));"
        "print(load_recipe(find_recipe('quickstart')).model.name); print(find_reward('gsm8k_answer')[0])"
    )
    lines = python(code, site, cwd=tmp_path).splitlines()
    assert lines[0].startswith(str(site))
    assert lines[1] == str(sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")))
    assert lines[2] == str(sorted(path.stem for path in (ROOT / "rewards").glob("*.py")))
    assert lines[3:] == ["builtin:arithmetic-student", "gsm8k_answer"]
    assert (site / "grpo" / "py.typed").is_file()
    page = "from grpo.telemetry.report import report; print(report([]).count('uPlot') > 1)"
    assert python(page, site, cwd=tmp_path).strip() == "True"  # the page's files are there
    assert "loss.beta" in python("from grpo.trl import answer; print(answer('beta').keys)", site, cwd=tmp_path)
    said = python("from grpo.backend.versions import requirements as r; print(r()['mlx'], r()['mlx-lm'])", site)
    assert said.split() == ["<0.33,>=0.32.2", "<0.33,>=0.32"]  # both are bounded above, as the doctor reads them
