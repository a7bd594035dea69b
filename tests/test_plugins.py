"""How a reward's name becomes a callable."""

import math
from pathlib import Path

import pytest

from grpo.errors import UserError
from grpo.plugins import bundled, find_recipe, find_reward


def cases() -> list[tuple[str, dict]]:
    found = []
    for path in sorted(bundled("rewards").glob("*.py")):
        _, function = find_reward(path.stem)
        found += [(path.stem, case) for case in function.__globals__["CASES"]]
    return found


@pytest.mark.parametrize(("name", "case"), cases(), ids=lambda value: str(value)[:60])
def test_bundled_rewards_grade_their_own_cases(name: str, case: dict) -> None:
    columns = {key: [value] for key, value in case.items() if key not in ("completion", "score")}
    scores = find_reward(name)[1](prompts=["?"], completions=[case["completion"]], completion_ids=[[1]], **columns)
    assert scores == [case["score"]]


def test_a_function_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def twice(completions, **_):\n    return [2.0] * len(completions)\n")
    name, function = find_reward(f"{path}:twice")
    assert (name, function(completions=["a", "b"])) == ("twice", [2.0, 2.0])


def test_a_function_in_a_module() -> None:
    assert find_reward("math:sqrt") == ("sqrt", math.sqrt)


@pytest.mark.parametrize(
    ("text", "use", "said"),
    [
        ("", "gsm8k_anser", "Did you mean 'gsm8k_answer'?"),
        ("", "absent.py:f", "there is no file absent.py"),
        ("", "no_such_module:f", "No module named 'no_such_module'"),
        ("def score(): ...", "{file}:scor", "no function 'scor' there. Did you mean 'score'?"),
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


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "recipes/quickstart.yaml"])
def test_bundled_recipes_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == bundled("recipes") / "quickstart.yaml"


def test_an_unknown_recipe() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'quickstart'\?"):
        find_recipe("quikstart")
