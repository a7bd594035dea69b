"""`import grpo` is light, and gives each public name when it is asked for."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import grpo

ROOT = Path(__file__).parents[2]
PUBLIC = sorted(grpo._PLACES)


def test_no_name_is_hidden_by_a_module_of_the_package() -> None:
    """Importing `grpo.recipe` would put the module in the place of the function."""
    modules = {path.stem for path in (ROOT / "grpo").iterdir()}
    assert not modules & set(PUBLIC)


def test_every_name_is_there_for_type_checkers_too() -> None:
    tree = ast.parse((ROOT / "grpo" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == grpo._PLACES
    assert set(PUBLIC) <= set(dir(grpo))


@pytest.mark.parametrize("name", PUBLIC)
def test_each_name_is_what_its_module_has(name: str) -> None:
    value = getattr(grpo, name)
    assert value is getattr(importlib.import_module(grpo._PLACES[name]), name)
    assert value.__doc__ or name == "STOP"


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'grpo' has no attribute 'lod'"):
        grpo.lod  # noqa: B018


def test_a_recipe_and_its_errors_need_no_mlx() -> None:
    code = (
        "import sys, grpo\n"
        "assert grpo.recipe('quickstart', steps=20).optim.steps == 20\n"
        "assert grpo.tasks([{'q': 'Hi'}], prompt='q', n=1)\n"
        "assert 'mlx' not in sys.modules, 'mlx'"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_a_type_checker_sees_the_types(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import grpo\n"
        "trainer = grpo.Trainer(grpo.recipe('quickstart', steps=2))\n"
        "reveal_type(trainer.train().step)\n"
        "reveal_type(grpo.load('x').sample(['hi'])[0].rollouts[0].reward)\n"
        "grpo.lod\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(tmp_path / "mine.py")]
    said = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout
    assert 'Revealed type is "int"' in said or 'Revealed type is "builtins.int"' in said, said
    assert "float | None" in said or "Union[builtins.float, None]" in said, said
    assert 'has no attribute "lod"' in said, said
