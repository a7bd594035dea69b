"""Resolves names: a reward's name to its function, a recipe's name to its file.

Bundled recipes and rewards are in `recipes/` and `rewards/` at the top of a checkout, and inside the package in a
wheel; bundled tools are in `grpo/builtin/tools/`. Bundled code is loaded in the same way as a user's code.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo.errors import UserError, did_you_mean

Function = Callable[..., Any]
TOOLS = Path(__file__).parent / "builtin" / "tools"
"""The folder of bundled tools. Each file defines one function or class, and the file's name is the tool's name."""
SESSION = "__main__"
"""The module that stands, in a recipe, for the Python session that created the run: `__main__:my_reward`."""


def bundled(kind: str) -> Path:
    """The folder of bundled `recipes`, `rewards` or pages, in a checkout or in an installed wheel."""
    package = Path(__file__).parent
    in_wheel = package / "_bundled" / kind
    return in_wheel if in_wheel.is_dir() else package.parent / kind


def bundled_names(kind: str, suffix: str) -> list[str]:
    """The names of the bundled `recipes` (`.yaml`) or `rewards` (`.py`), sorted."""
    return sorted(path.stem for path in bundled(kind).glob(f"*{suffix}"))


def find_recipe(name: str) -> Path:
    """A recipe's file, from a path or from the name of a bundled recipe, with or without `recipes/` and `.yaml`.

    Raises UserError for an unknown recipe, and for a folder.
    """
    path = Path(name)
    if _is_file(path):
        return path
    stem = path.name.removesuffix(".yaml")  # a recipe's name may contain a dot
    inside = bundled("recipes") / f"{stem}.yaml"
    if _is_file(inside) and path.parent in (Path(), Path("recipes")):
        return inside
    if name and _is_file(path / "recipe.yaml"):
        raise UserError(
            f"{name} is a folder. Name the recipe in it: {path / 'recipe.yaml'} (with --resume, its run continues)"
        )
    known = bundled_names("recipes", ".yaml")
    hint = did_you_mean(stem, known)
    sought = "file" if path.suffix == ".yaml" or len(path.parts) > 1 else "recipe"
    raise UserError(f"{name or '(empty)'}: there is no such {sought}.{hint} Bundled recipes: {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class Located:
    """A name, and the `file.py:function` or `package.module:function` of its code, which is not imported yet."""

    name: str
    where: str
    what: str
    """The label in error messages, such as `reward`."""
    classes: bool = False
    """Whether the code may be a class if `where` is only a file."""

    def load(self) -> Function:
        """Import the code. Raises UserError like `find_function`."""
        return find_function(self.where, self.what, self.classes)

    @property
    def file(self) -> str:
        """The named file; "" for a module."""
        return file_in(self.where)

    def absolute(self) -> Located:
        """The same with an absolute path, if the file exists."""
        file = self.file
        there = bool(file) and _is_file(Path(file))
        return replace(self, where=f"{Path(file).absolute()}{self.where.removeprefix(file)}") if there else self


def file_in(use: str) -> str:
    """The file in `file.py:name` or `file.py`; "" for everything else."""
    place = use if use.endswith(".py") else use.rpartition(":")[0]
    return place if place.endswith(".py") else ""


MODEL = "model:"
"""The prefix in the `use` of a reward model; a Hub repository or a folder follows."""


JUDGE = "judge"
"""The `use` of the reward that asks the model in training, as it was at the start of the run."""


def model_in(use: str) -> str:
    """The model in `model:org/name` or `model:FOLDER`; "" for a reward function."""
    return use.removeprefix(MODEL) if use.startswith(MODEL) else ""


def find_reward(use: str) -> tuple[str, Function]:
    """A reward's name and function. Raises UserError like `locate_reward` and `find_function`."""
    located = locate_reward(use)
    return located.name, located.load()


def locate_reward(use: str) -> Located:
    """The reward that `use` names: a bundled reward, an entry point in the group `grpo.rewards`, `file.py:function`,
    `file.py` (its `reward`), `package.module:function`, a reward model (`model:NAME`) or `judge`.

    A function called `reward` gets the name of its file or module, a model the last part of its name. Raises UserError
    for an unknown or ambiguous name.
    """
    what = f"reward {use!r}"
    if use == JUDGE:
        return Located(JUDGE, JUDGE, "judge")
    if model := model_in(use):
        return Located(Path(model).name or model, use, "reward model")
    if use.endswith(".py"):
        return Located(Path(use).stem, f"{use}:reward", "reward")
    place, colon, function = use.rpartition(":")
    if colon:
        return Located(called(place, function), use, "reward")
    return Located(use, _named("reward", use, named_rewards()).where, what)


def find_tool(use: str) -> tuple[str, Function]:
    """A tool's name, and its function or class. Raises UserError like `locate_tool` and `find_function`."""
    located = locate_tool(use)
    return located.name, located.load()


def locate_tool(use: str) -> Located:
    """The tool that `use` names: a bundled tool, an entry point in the group `grpo.tools`, `file.py:name`, `file.py`
    (the only function or class that it defines) or `package.module:name`.

    A function or class keeps its own name; a `file.py` without a name gets the file's name. Raises UserError for an
    unknown or ambiguous name.
    """
    what = f"tool {use!r}"
    if use.endswith(".py"):
        return Located(Path(use).stem, use, "tool", classes=True)
    _, colon, name = use.rpartition(":")
    if colon:
        return Located(name, use, "tool", classes=True)
    return Located(use, _named("tool", use, named_tools()).where, what, classes=True)


def _named(kind: str, use: str, there: list[Located]) -> Located:
    """The only item of `there` with the name `use`. Raises UserError if there is none, or more than one."""
    found = [located for located in there if located.name == use]
    if len(found) > 1:
        both = " and ".join(f"{located.what} ({located.where})" for located in found)
        raise UserError(f"{kind} {use!r} is ambiguous: {both}. Write the text in parentheses of the one that you mean")
    if not found:
        known = sorted({located.name for located in there})
        name = "name" if kind == "tool" else "function"
        raise UserError(
            f"{kind} {use!r}: there is no {kind} of that name.{did_you_mean(use, known)} Known names: "
            f"{', '.join(known)}. For your own code, write file.py:{name} or package.module:{name}"
        )
    return found[0]


def called(place: str, function: str) -> str:
    """A reward's default name: the function's name, or the name of its file or module if the function is `reward`."""
    if function != "reward":
        return function
    return Path(place).stem if place.endswith(".py") else place.rpartition(".")[2]


def named_rewards() -> list[Located]:
    """All named rewards: bundled rewards, and entry points of installed packages."""
    folder = bundled("rewards")
    files = [Located(name, f"{folder / name}.py:reward", "bundled") for name in bundled_names("rewards", ".py")]
    return files + _entry_points("grpo.rewards")


def named_tools() -> list[Located]:
    """All named tools: bundled tools, and entry points of installed packages."""
    files = sorted(path for path in TOOLS.glob("*.py") if path.stem != "__init__")
    return [Located(path.stem, str(path), "bundled", classes=True) for path in files] + _entry_points("grpo.tools")


def _entry_points(group: str) -> list[Located]:
    import importlib.metadata

    return [
        Located(point.name, point.value, f"of package {point.dist.name}" if point.dist else "of a package")
        for point in importlib.metadata.entry_points(group=group)
    ]


def find_function(use: str, kind: str, classes: bool = False) -> Function:
    """The callable that `file.py:function` or `package.module:function` names; `kind` is its label in errors.

    `file.py` without a name means the only function that the file defines (names with a leading underscore do not
    count); with `classes` the only function or class; for an environment the only class.
    Raises UserError, with the reason, if the callable cannot be imported.
    """
    what, noun = f"{kind} {use!r}", _noun(kind, classes)
    if kind.startswith(("reward", JUDGE)) and (use == JUDGE or model_in(use)):
        raise UserError(f"{what}: this is a model, not a function")
    if use.endswith(".py"):
        return _only(what, _load_beside(what, Path(use)), use, noun)
    place, colon, function = use.rpartition(":")
    if not colon:
        name = _NAMES[noun]
        raise UserError(f"{what}: write file.py:{name}, file.py (with one {noun}) or package.module:{name}")
    if place.endswith(".py"):
        return _attribute(what, _load_beside(what, Path(place)), function, noun)
    if place == SESSION:
        raise UserError(
            f"{what}: this was a Python object in the session that created the run, and other processes do not have "
            "it. Put it into a file, and write file.py:function"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # find modules in the working directory, like `python -m`
    try:
        module = _import(what, lambda: importlib.import_module(place))
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{place}.".startswith(f"{cause.name}."):
            file = f"{place.replace('.', '/')}.py"
            advice = f"For a file, write {file}:{function}"
            raise UserError(f"{what}: there is no module {cause.name!r}. {advice}") from cause
        raise
    return _attribute(what, module, function, noun)


_NAMES = {"class": "Class", "function": "function", "function or class": "name"}
"""Placeholders for a name in advice, by the noun of `_noun`."""


def _noun(kind: str, classes: bool) -> str:
    """The type of object that a name is expected to name."""
    if kind.startswith("environment"):
        return "class"
    return "function or class" if classes else "function"


def source_file(use: str, named: Callable[[], list[Located]] = named_rewards) -> Path | None:
    """The file of the code that a `use` names, or None for code that is not in a file.

    `named` returns the named rewards, or for the `use` of a tool the named tools (`named_tools`).
    """
    if use == JUDGE or model_in(use):
        return None
    if Path(use).is_absolute() and Path(use).suffix[1:].isalpha() and _is_file(Path(use)):  # a script in a command
        return Path(use)
    if ":" not in use and not use.endswith(".py"):
        use = next((located.where for located in named() if located.name == use), use)
    place = use if use.endswith(".py") else use.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    if place == SESSION:  # this would be the program that was started
        return None
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):  # loading the function reports it
        return None
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def _load_beside(what: str, file: Path) -> Any:
    """The module of a file. A user's file may import the files next to it."""
    beside = str(file.parent)
    if file.parent not in (bundled("rewards"), TOOLS) and beside not in sys.path:
        sys.path.append(beside)
    return load_file(what, file)


def load_file(what: str, path: Path) -> Any:
    """The module of a Python file; `what` is its label in errors. Raises UserError if it cannot be imported."""
    if not path.is_file():
        looked = "" if path.is_absolute() else " (grpo looks next to the recipe, then in the working directory)"
        raise UserError(f"{what}: there is no file {path}{looked}")
    spec = importlib.util.spec_from_file_location(f"grpo_plugin_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look up modules by name
    loader = spec.loader
    _import(what, lambda: loader.exec_module(module))
    return module


def _import(what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (Exception, SystemExit) as error:  # the user's code may raise anything, and the user needs to see it
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
        where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames[-1].filename != __file__ else ""
        raise UserError(f"{what}: cannot be imported: {type(error).__name__}: {error}{where}") from error


def _only(what: str, module: Any, use: str, kind: str) -> Function:
    """The only object of a kind (`function`, `class`, `function or class`) that a module defines.

    Raises UserError if the module defines none, or several.
    """
    defined = [
        name
        for name in _own(module)
        if kind == "function or class" or isinstance(getattr(module, name), type) == (kind == "class")
    ]
    if len(defined) != 1:
        found = f"defines {_listed(defined)}" if defined else f"defines no {kind}"
        raise UserError(
            f"{what}: a file without the name of a {kind} must define exactly one {kind}, but this file {found}."
            f" Write {use}:{defined[0] if defined else _NAMES[kind]}"
        )
    only: Function = getattr(module, defined[0])
    return only


def _listed(names: Sequence[str], most: int = 10) -> str:
    """At most `most` names in quotes, and the number of further names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _own(module: Any) -> list[str]:
    """The names of the callables that a module defines itself, without those that begin with an underscore."""
    named = [(name, value) for name, value in vars(module).items() if callable(value) and name[0] != "_"]
    return [name for name, value in named if getattr(value, "__module__", None) == module.__name__]


def _attribute(what: str, module: Any, function: str, noun: str) -> Function:
    found = getattr(module, function, None)
    if not callable(found):
        functions = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
        defined = _own(module)
        hint = did_you_mean(function, functions) or (
            f" It defines {_listed(defined)}: write the name after a colon" if defined else ""
        )
        raise UserError(f"{what}: there is no {noun} {function!r} in it.{hint}")
    callable_: Function = found
    return callable_


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # not a valid file name
        return False
