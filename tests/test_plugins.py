"""How a reward's name becomes a callable."""

import math
import sys
from pathlib import Path

import pytest

from grpo.errors import UserError
from grpo.plugins import (
    TOOLS,
    Located,
    bundled,
    find_function,
    find_recipe,
    find_reward,
    find_tool,
    locate_tool,
    named_rewards,
    named_tools,
    source_file,
)


def test_a_function_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def twice(completions, **_):\n    return [2.0] * len(completions)\n")
    name, function = find_reward(f"{path}:twice")
    assert (name, function(completions=["a", "b"])) == ("twice", [2.0, 2.0])
    path.write_text(path.read_text().replace("twice", "reward"))
    assert find_reward(str(path))[0] == "mine"


def test_an_object_of_a_session_is_in_no_file_and_cannot_be_found() -> None:
    assert source_file("__main__:mine") is None
    with pytest.raises(UserError, match="reward '__main__:mine': this was a Python object in the session"):
        find_function("__main__:mine", "reward")


def test_a_function_in_a_module() -> None:
    assert find_reward("math:sqrt") == ("sqrt", math.sqrt)


@pytest.mark.parametrize(
    ("text", "use", "said"),
    [
        ("", "gsm8k_anser", "Did you mean 'gsm8k_answer'?"),
        ("", "absent.py:f", "there is no file absent.py"),
        ("", "no_such_module:f", "there is no module 'no_such_module'"),
        ("def score(): ...", "{file}:scor", "no function 'scor' in it. Did you mean 'score'?"),
        (
            "from math import *\ndef right(): ...\ndef short(): ...",
            "{file}:reward",
            "in it. It defines 'right', 'short'",
        ),
        ("import nothing_like_this", "{file}:f", "cannot be imported: ModuleNotFoundError"),
        ("1/0", "{file}:f", "cannot be imported: ZeroDivisionError: division by zero ({file}:1)"),
        ("def f(:", "{file}:f", "cannot be imported: SyntaxError"),
    ],
)
def test_a_reward_that_cannot_be_had(tmp_path: Path, text: str, use: str, said: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        find_reward(use.format(file=file))
    assert said.format(file=file) in str(error.value)
    assert str(error.value).count(f"{use.format(file=file)!r}") == 1


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "recipes/quickstart.yaml"])
def test_bundled_recipes_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == bundled("recipes") / "quickstart.yaml"


@pytest.mark.parametrize("name", ["qwen2.5-gsm8k-lora", "qwen2.5-gsm8k-lora.yaml"])
def test_a_bundled_recipe_with_a_dot_in_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == bundled("recipes") / "qwen2.5-gsm8k-lora.yaml"


def test_an_unknown_recipe() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'quickstart'\?"):
        find_recipe("quikstart")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes an installed package `their_package` with a reward, or an entry point of another group, by the names."""

    def install(*names: str, group: str = "grpo.rewards") -> None:
        (tmp_path / "their_package.py").write_text("def fair(completions, **_):\n    return [0.5] * len(completions)\n")
        folder = tmp_path / "their_package-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
        lines = [f"{name} = their_package:fair\n" for name in names]
        (folder / "entry_points.txt").write_text(f"[{group}]\n" + "".join(lines))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "their_package", raising=False)

    return install


def test_a_reward_of_an_installed_package(package) -> None:
    package("fair")
    name, function = find_reward("fair")
    assert (name, function(completions=["a"])) == ("fair", [0.5])
    assert "fair" in [located.name for located in named_rewards()]


def test_the_file_that_a_rewards_code_is_in(package, tmp_path: Path) -> None:
    """What W&B keeps, and what a resumed run compares."""
    package("fair")
    theirs = tmp_path / "their_package.py"
    uses = ("length", "fair", "their_package:fair", "mine.py", "mine.py:reward", "nowhere", "no_such_package:fair")
    mine = Path("mine.py")
    assert [source_file(use) for use in uses] == [
        bundled("rewards") / "length.py",
        theirs,
        theirs,
        mine,
        mine,
        None,
        None,
    ]


def test_a_name_that_means_two_things_is_an_error_that_lists_both(package) -> None:
    package("length")
    with pytest.raises(UserError) as error:
        find_reward("length")
    assert "reward 'length' is ambiguous: bundled (" in str(error.value)
    assert "length.py:reward) and of package their-package (their_package:fair)" in str(error.value)
    assert find_reward("their_package:fair")[0] == "fair"


def test_a_file_alone_names_its_only_function(tmp_path: Path) -> None:
    """Other names in the file do not count: what it imports, classes, constants, names with an underscore."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from math import sqrt\nclass Row: ...\nA = 1\ndef _half(x): return x / 2\ndef f(x): return _half(x)\n"
    )
    assert find_function(str(file), "loss")(4) == 2
    for text, said in (
        ("def f(): ...\ndef g(): ...", f"this file defines 'f', 'g'. Write {file}:f"),
        ("from math import sqrt\nclass Row: ...", f"this file defines no function. Write {file}:function"),
        ("def _f(): ...", "this file defines no function."),
    ):
        file.write_text(text)
        with pytest.raises(
            UserError, match=r"loss '.*mine.py': a file without the name of a function must define exactly one"
        ) as error:
            find_function(str(file), "loss")
        assert said in str(error.value)
    with pytest.raises(
        UserError, match=r"logger 'print': write file.py:function, file.py \(with one function\) or pack"
    ):
        find_function("print", "logger")


def test_of_many_names_those_that_are_not_shown_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("".join(f"def f{n:02}(): ...\n" for n in range(12)))
    for use in (file, f"{file}:nowhere"):
        with pytest.raises(UserError, match=r"'f00', 'f01', .*, 'f09' and 2 more"):
            find_function(str(use), "loss")


def test_code_of_every_kind_imports_the_file_next_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_it.py").write_text("ONE = 1\n")
    (tmp_path / "mine.py").write_text("import beside_it\ndef f(): return beside_it.ONE\n")
    assert find_function(f"{tmp_path}/mine.py:f", "loss")() == find_function(f"{tmp_path}/mine.py", "logger")() == 1


def test_bundled_tools_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(sys.path)
    assert [tool.name for tool in named_tools()] == ["calculator", "python"]
    name, calculator = find_tool("calculator")
    assert (name, calculator("1 + 1")) == ("calculator", "2")
    assert isinstance(find_tool("python")[1], type)
    assert sys.path == before, "a file called python.py beside others could stand in for a module"
    assert source_file("python", named_tools) == TOOLS / "python.py"


def test_a_tool_in_a_file_or_a_module(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from math import sqrt\nclass Notes: ...\ndef find(): ...\n")
    assert locate_tool(f"{file}:Notes").name == find_tool(f"{file}:Notes")[1].__name__ == "Notes"
    assert find_tool(f"{file}:find")[0] == "find"
    assert find_tool("math:sqrt") == ("sqrt", math.sqrt)
    with pytest.raises(
        UserError,
        match=r"a file without the name of a function or class must define exactly one function or class, .* ",
    ):
        find_tool(str(file))
    file.write_text("class Notes: ...\n")
    assert (find_tool(str(file))[0], find_tool(str(file))[1].__name__) == ("mine", "Notes")


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (
            "calcuator",
            "no tool of that name. Did you mean 'calculator'? Known names: calculator, python. For your own",
        ),
        ("absent.py", "there is no file absent.py"),
        ("math:sqr", "no function or class 'sqr' in it"),
        ("__main__:mine", "a Python object in the session"),
    ],
)
def test_a_tool_that_cannot_be_had(use: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        find_tool(use)
    assert said in str(error.value)
    assert str(error.value).startswith(f"tool {use!r}")


def test_a_tool_of_an_installed_package(package) -> None:
    package("fair", group="grpo.tools")
    assert find_tool("fair")[1].__name__ == "fair"
    with pytest.raises(UserError, match="no reward of that name"):
        find_reward("fair")


def test_environments_are_classes(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("class Shop: ...\ndef helper(): ...\n")
    assert find_function(str(file), "environment").__name__ == "Shop"
    file.write_text("def helper(): ...\n")
    for use, said in (
        (str(file), f"must define exactly one class, but this file defines no class. Write {file}:Class"),
        (f"{file}:Shpo", "no class 'Shpo' in it. It defines 'helper'"),
        ("Shop", r"write file.py:Class, file.py \(with one class\) or package.module:Class"),
        ("absent_shop:Shop", "there is no module 'absent_shop'. For a file, write absent_shop.py:Shop$"),
        ("absent.shop:Shop", "there is no module 'absent'. For a file, write absent/shop.py:Shop$"),
        ("absent.py:Shop", r"no file absent.py \(grpo looks next to the recipe, then in the working directory"),
    ):
        with pytest.raises(UserError, match=said):
            find_function(use, "environment")


def test_a_missing_file_keeps_its_name() -> None:
    assert Located("E", "absent.py:E", "environment").absolute().where == "absent.py:E"
