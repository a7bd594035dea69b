"""Turns names into things: a reward into its callable, a recipe's name into its file.

Bundled recipes and rewards lie in `recipes/` and `rewards/` at the top of a checkout, and inside the package in
a wheel; bundled tools lie in `grpo/builtin/tools/`. Ours enter by the same door as a researcher's.
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
"""The folder of bundled tools. Each file defines the one function or class that goes by the file's name."""
SESSION = "__main__"
"""The module that stands, in a recipe, for the Python session that a run was made in: `__main__:my_reward`."""


def bundled(kind: str) -> Path:
    """The folder of bundled `recipes` or `rewards`, or of pages, wherever the package was installed from."""
    package = Path(__file__).parent
    in_wheel = package / "_bundled" / kind
    return in_wheel if in_wheel.is_dir() else package.parent / kind


def bundled_names(kind: str, suffix: str) -> list[str]:
    """The names of the bundled `recipes` (`.yaml`) or `rewards` (`.py`), sorted."""
    return sorted(path.stem for path in bundled(kind).glob(f"*{suffix}"))


def find_recipe(name: str) -> Path:
    """A recipe's file: a path, or the name of a bundled one with or without `recipes/` and `.yaml`."""
    path = Path(name)
    if _is_file(path):
        return path
    stem = path.name.removesuffix(".yaml")  # a name may have a dot of its own
    inside = bundled("recipes") / f"{stem}.yaml"
    if _is_file(inside) and path.parent in (Path(), Path("recipes")):
        return inside
    if name and _is_file(path / "recipe.yaml"):
        raise UserError(
            f"{name} is a folder; its recipe is {path / 'recipe.yaml'}: name that (--resume goes on with it)"
        )
    known = bundled_names("recipes", ".yaml")
    hint = did_you_mean(stem, known)
    raise UserError(f"{name or '(empty)'}: there is no such recipe.{hint} Bundled: {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class Located:
    """A name, and the `file.py:function` or `package.module:function` where the thing is. Nothing is imported yet."""

    name: str
    where: str
    what: str
    """How it is spoken of."""
    classes: bool = False
    """Whether it may be a class where `where` is a file alone."""

    def load(self) -> Function:
        """Import it. Raises UserError, as `find_function` does."""
        return find_function(self.where, self.what, self.classes)

    @property
    def file(self) -> str:
        """The file that is named, "" for a module."""
        return file_in(self.where)

    def absolute(self) -> Located:
        """The same in any working directory; a file that is nowhere keeps the name that it was given."""
        file = self.file
        there = bool(file) and _is_file(Path(file))
        return replace(self, where=f"{Path(file).absolute()}{self.where.removeprefix(file)}") if there else self


def file_in(use: str) -> str:
    """The file in `file.py:name` or `file.py`; "" for everything else."""
    place = use if use.endswith(".py") else use.rpartition(":")[0]
    return place if place.endswith(".py") else ""


MODEL = "model:"
"""What a reward's `use` begins with where a model grades: a Hub repository or a folder comes after it."""


JUDGE = "judge"
"""The `use` of the reward that asks the model which is trained, as it was when the run began."""


def model_in(use: str) -> str:
    """The model in `model:org/name` or `model:FOLDER`; "" for a reward that is a function."""
    return use.removeprefix(MODEL) if use.startswith(MODEL) else ""


def find_reward(use: str) -> tuple[str, Function]:
    """A reward's name and callable. Raises UserError, as `locate_reward` and `find_function` do."""
    located = locate_reward(use)
    return located.name, located.load()


def locate_reward(use: str) -> Located:
    """What `use` names: a bundled reward, an entry point in the group `grpo.rewards`, `file.py:function`, `file.py`
    (its `reward`), `package.module:function`, a reward model (`model:NAME`) or `judge`.

    A function called `reward` goes by its file's or module's name, a model by the last part of its own. Raises
    UserError for a name that means nothing, or two things.
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
    """A tool's name, and its function or class. Raises UserError, as `locate_tool` and `find_function` do."""
    located = locate_tool(use)
    return located.name, located.load()


def locate_tool(use: str) -> Located:
    """What `use` names: a bundled tool, an entry point in the group `grpo.tools`, `file.py:name`, `file.py` (the one
    function or class that it defines) or `package.module:name`.

    A function goes by its own name, and so does a class; `file.py` alone goes by the file's name. Raises UserError for
    a name that means nothing, or two things.
    """
    what = f"tool {use!r}"
    if use.endswith(".py"):
        return Located(Path(use).stem, use, "tool", classes=True)
    _, colon, name = use.rpartition(":")
    if colon:
        return Located(name, use, "tool", classes=True)
    return Located(use, _named("tool", use, named_tools()).where, what, classes=True)


def _named(kind: str, use: str, there: list[Located]) -> Located:
    """The one of those that are `there` which goes by the name `use`. Raises UserError where none does, or two do."""
    found = [one for one in there if one.name == use]
    if len(found) > 1:
        both = " and ".join(f"{one.what} ({one.where})" for one in found)
        raise UserError(
            f"{kind} {use!r} means two things: {both}. Write the one that you mean as it stands in brackets"
        )
    if not found:
        known = sorted({one.name for one in there})
        name = "name" if kind == "tool" else "function"
        raise UserError(
            f"{kind} {use!r}: there is no {kind} of that name.{did_you_mean(use, known)} There are {', '.join(known)}; "
            f"your own: file.py:{name} or package.module:{name}"
        )
    return found[0]


def called(place: str, function: str) -> str:
    """A reward's name, where none is given: its function's, or that of its file or module if it is called `reward`."""
    if function != "reward":
        return function
    return Path(place).stem if place.endswith(".py") else place.rpartition(".")[2]


def named_rewards() -> list[Located]:
    """Every reward that has a name: those bundled, and those of installed packages, by their entry points."""
    folder = bundled("rewards")
    ours = [Located(name, f"{folder / name}.py:reward", "bundled") for name in bundled_names("rewards", ".py")]
    return ours + _entry_points("grpo.rewards")


def named_tools() -> list[Located]:
    """Every tool that has a name: those bundled, and those of installed packages, by their entry points."""
    files = sorted(path for path in TOOLS.glob("*.py") if path.stem != "__init__")
    return [Located(path.stem, str(path), "bundled", classes=True) for path in files] + _entry_points("grpo.tools")


def _entry_points(group: str) -> list[Located]:
    import importlib.metadata

    return [
        Located(point.name, point.value, f"of package {point.dist.name}" if point.dist else "of a package")
        for point in importlib.metadata.entry_points(group=group)
    ]


def find_function(use: str, kind: str, classes: bool = False) -> Function:
    """The callable that `file.py:function` or `package.module:function` names; `kind` says in errors what it is for.

    `file.py` alone names the only function that the file defines (names with a leading underscore do not count), with
    `classes` the only function or class, and of an environment the only class.
    Raises UserError for a function that cannot be imported, and says why.
    """
    what, noun = f"{kind} {use!r}", _noun(kind, classes)
    if kind.startswith(("reward", JUDGE)) and (use == JUDGE or model_in(use)):
        raise UserError(f"{what}: is a model, and not a function")
    if use.endswith(".py"):
        return _only(what, _load_beside(what, Path(use)), use, noun)
    place, colon, function = use.rpartition(":")
    if not colon:
        name = _NAMES[noun]
        raise UserError(f"{what}: write file.py:{name}, file.py (of one {noun}) or package.module:{name}")
    if place.endswith(".py"):
        return _attribute(what, _load_beside(what, Path(place)), function, noun)
    if place == SESSION:
        raise UserError(
            f"{what}: this was a Python object of the session that made the run, which no other process has. Put it "
            "into a file, and name it as file.py:function"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module in the working directory, as `python -m` would find it
    try:
        module = _import(what, lambda: importlib.import_module(place))
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{place}.".startswith(f"{cause.name}."):
            file = f"{place.replace('.', '/')}.py"
            raise UserError(f"{what}: there is no module {cause.name!r}. Of a file write {file}:{function}") from cause
        raise
    return _attribute(what, module, function, noun)


_NAMES = {"class": "Class", "function": "function", "function or class": "name"}
"""What stands for a name in advice, by what may have it."""


def _noun(kind: str, classes: bool) -> str:
    """What a name is expected to name."""
    if kind.startswith("environment"):
        return "class"
    return "function or class" if classes else "function"


def source_file(use: str, named: Callable[[], list[Located]] = named_rewards) -> Path | None:
    """The file of code that a `use` names, or None for code that is in no file.

    `named` are those that have names of their own: rewards, or for the `use` of a tool `named_tools`.
    """
    if use == JUDGE or model_in(use):
        return None
    if Path(use).is_absolute() and Path(use).suffix[1:].isalpha() and _is_file(Path(use)):  # of a command; no program
        return Path(use)
    if ":" not in use and not use.endswith(".py"):
        use = next((one.where for one in named() if one.name == use), use)
    place = use if use.endswith(".py") else use.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    if place == SESSION:  # whatever program has been started
        return None
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):  # it will be said where the function is asked for
        return None
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def _load_beside(what: str, file: Path) -> Any:
    """The module that a file makes. A researcher's file may import the files next to it."""
    beside = str(file.parent)
    if file.parent not in (bundled("rewards"), TOOLS) and beside not in sys.path:
        sys.path.append(beside)
    return load_file(what, file)


def load_file(what: str, path: Path) -> Any:
    """The module that a file of Python makes; `what` says in errors what it is. Raises UserError if it cannot."""
    if not path.is_file():
        looked = "" if path.is_absolute() else " (a recipe's are looked for beside it, then in the working directory)"
        raise UserError(f"{what}: there is no file {path}{looked}")
    spec = importlib.util.spec_from_file_location(f"grpo_plugin_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a module up by its name
    loader = spec.loader
    _import(what, lambda: loader.exec_module(module))
    return module


def _import(what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (Exception, SystemExit) as error:  # other people's code: whatever it raises is theirs to see
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
        where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames[-1].filename != __file__ else ""
        raise UserError(f"{what}: cannot be imported: {type(error).__name__}: {error}{where}") from error


def _only(what: str, module: Any, use: str, kind: str) -> Function:
    """The one thing of a kind (`function`, `class`, `function or class`) that a module defines.

    Raises UserError where it defines none, or several.
    """
    own = [
        name
        for name in _own(module)
        if kind == "function or class" or isinstance(getattr(module, name), type) == (kind == "class")
    ]
    if len(own) != 1:
        found = f"defines {_listed(own)}" if own else f"defines no {kind} of its own"
        raise UserError(
            f"{what}: without a {kind}'s name it means the only {kind} that the file defines, and the file {found}."
            f" Write {use}:{own[0] if own else _NAMES[kind]}"
        )
    only: Function = getattr(module, own[0])
    return only


def _listed(names: Sequence[str], most: int = 10) -> str:
    """Names in quotes, and how many more there are than are shown."""
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
        own = _own(module)
        hint = did_you_mean(function, functions) or (f" There are {_listed(own)}" if own else "")
        raise UserError(f"{what}: no {noun} {function!r} there.{hint}")
    callable_: Function = found
    return callable_


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False
