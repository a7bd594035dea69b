"""The map of the project: a file imports only from rooms above its own."""

import ast
from pathlib import Path
from statistics import median

import pytest

PACKAGE = Path(__file__).parents[1] / "grpo"

ROOMS = [
    "errors alarm progress step types presets config document mistakes overrides recipes plugins trl backend",
    "processes",
    "builtin",
    "model",
    "generation",
    "data",
    "environments",
    "serving",
    "agents",
    "scoring",
    "objective",
    "rollout",
    "training",
    "evaluation",
    "alarms",
    "planning",
    "runs",
    "tools",
    "telemetry",
    "benchmark",
    "doctor",
    "door",
    "cli",
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms.split()}

# Narrower than "above": the walls that matter most.
FORBIDDEN = {
    "objective": {"model", "generation", "data", "environments", "rollout", "scoring", "builtin"},
    "telemetry": {"training"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(source: str) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("grpo.")}
    return rooms - {"__version__"}


def wrong_imports(room: str, source: str) -> set[str]:
    return {
        other
        for other in imported_rooms(source)
        if other != room and (LEVEL[other] > LEVEL[room] or other in FORBIDDEN.get(room, ()))
    }


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_upwards(path: Path) -> None:
    assert wrong_imports(room_of(path), path.read_text()) == set()


def imported_modules(source: str) -> set[str]:
    """Full names, those of type checkers' imports and of lazy ones included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def importers(prefix: str) -> set[str]:
    """The files with an import of this module, or of anything in it."""
    return {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(f"{name}.".startswith(f"{prefix}.") for name in imported_modules(path.read_text()))
    }


def test_one_file_imports_mlx_lm() -> None:
    assert importers("mlx_lm") == {"model/mlxlm.py"}, "what else is needed of mlx-lm goes through grpo.model.mlxlm"


def test_outside_of_benchmark_only_the_command_s_registration_names_it() -> None:
    outside = {name for name in importers("grpo.benchmark") if not name.startswith("benchmark/")}
    assert outside == {"cli/__init__.py"}


def test_a_wrong_import_is_noticed() -> None:
    assert wrong_imports("model", "from grpo.training.trainer import Trainer") == {"training"}
    assert wrong_imports("objective", "import grpo.model.policy") == {"model"}
    assert imported_modules("def f():\n    from mlx_lm import utils") == {"mlx_lm.utils"}
    assert wrong_imports("data", "def f():\n    from grpo import cli") == {"cli"}


def test_every_room_is_on_the_map() -> None:
    there = {room_of(path) for path in FILES} - {"__pycache__"}
    assert there == set(LEVEL)


WHOLE_RECIPE = {
    # what a recipe is, and how it is read, changed and explained
    "config/__init__.py config/describe.py recipes.py overrides.py mistakes.py",
    # a run begins with one, writes it down, and compares it when it goes on
    "runs/prepare.py runs/folder.py runs/resume.py runs/revisions.py runs/starting.py",
    "runs/publishing.py runs/health.py runs/sections.py door/opening.py door/handing.py",
    # a trainer hands each of its rooms the section that it needs
    "training/trainer.py training/apart.py",
    # commands and tools read one, a run's or their own; a card and W&B show all of it; an estimate is of all of it
    "cli/commands.py tools/card.py tools/evaluate.py telemetry/recorded.py telemetry/loggers.py",
    "telemetry/weights_and_biases.py telemetry/trackio.py",
    "planning/elsewhere.py planning/estimate.py benchmark/work.py benchmark/updates.py",
    # Python users hold one
    "door/recipes.py door/trainer.py",
}
"""The files whose subject is a whole recipe. Every other one takes the sections that it needs."""
LONGEST_FUNCTION, LONGEST_FILE, MEDIAN_FILE = 60, 400, 150
STILL_LONGER: set[str] = set()


def names_recipe(source: str) -> bool:
    """Whether a file imports the class of whole recipes."""
    return any(
        isinstance(node, ast.ImportFrom) and any(alias.name == "Recipe" for alias in node.names)
        for node in ast.walk(ast.parse(source))
    )


def long_functions(source: str, most: int = LONGEST_FUNCTION) -> list[str]:
    """The functions with more lines than `most`, signature and docstring included."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= most
    ]


def test_rooms_take_their_sections_and_not_the_whole_recipe() -> None:
    allowed = {file for files in WHOLE_RECIPE for file in files.split()}
    naming = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if names_recipe(path.read_text())}
    assert naming - allowed == set()
    assert allowed - naming == set(), "these take sections by now: leave them out of the list"


def test_functions_and_files_stay_small() -> None:
    long = {f"{path.relative_to(PACKAGE)}: {name}" for path in FILES for name in long_functions(path.read_text())}
    assert long - STILL_LONGER == set()
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in FILES}
    assert {file: length for file, length in lengths.items() if length > LONGEST_FILE} == {}
    assert median(lengths.values()) <= MEDIAN_FILE


def test_what_is_too_long_or_takes_too_much_is_noticed() -> None:
    assert long_functions("def f():\n" + "    pass\n" * 60) == ["f"]
    assert long_functions("def f():\n" + "    pass\n" * 59) == []
    assert names_recipe("if True:\n    from grpo.config import LossConfig, Recipe")
    assert not names_recipe("from grpo.config import LossConfig")


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest would run only the first of them."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
