"""A name means one thing: no two public classes of the package are called the same, and no two files are the runs."""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "grpo"

SHARED = {"app", "log", "warn", "Trainer"}
"""What a module calls its own, everywhere the same: its commands, its logger. And `grpo.Trainer`, the run around the
trainer of `training/`: who knows TRL looks for it under this name."""


def public_names(source: str) -> list[str]:
    """The public classes of a module, and the types that it names (`Row = tuple[...]`)."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("_") and not name.isupper()]


def named_twice(sources: dict[str, str]) -> dict[str, list[str]]:
    """Where each name is defined that more than one module defines."""
    places = defaultdict(list)
    for file, source in sources.items():
        for name in public_names(source):
            places[name].append(file)
    return {name: files for name, files in places.items() if len(files) > 1 and name not in SHARED}


def test_no_class_or_type_is_defined_twice() -> None:
    sources = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    assert named_twice(sources) == {}


def test_a_second_meaning_is_noticed() -> None:
    one, other = "class Row:\n    pass\n", "Row = tuple[int, ...]\nROWS = 3\nlog = 1\n"
    assert named_twice({"a.py": one, "b.py": other, "c.py": "ROWS = 4\nlog = 2\n_Row = int\n"}) == {
        "Row": ["a.py", "b.py"]
    }


def test_run_is_the_name_of_a_command_alone() -> None:
    """A file that is called run or runs says nothing of what it runs."""
    called_so = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.stem in ("run", "runs")}
    assert called_so == {"cli/runs.py"}
