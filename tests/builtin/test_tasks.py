"""The built-in tasks: what is held out is new, the good way is right, and the cheap way is right now and then."""

import pytest

from grpo.builtin.arithmetic import ARITHMETIC
from grpo.builtin.countdown import COUNTDOWN
from grpo.builtin.format import FORMAT
from grpo.builtin.models import MODELS
from grpo.builtin.sorting import SORTING
from grpo.builtin.tasks import TASKS, rows
from grpo.config import Recipe
from grpo.errors import UserError
from grpo.plugins import bundled, find_reward
from grpo.recipes import load_recipe
from grpo.scoring.contract import Reward

NAMES = [name.partition(":")[2] for name, task in TASKS.items() if task.environment is None]


def learning(name: str) -> Recipe:
    return load_recipe(bundled("recipes") / "learning" / f"{name}.yaml")


def scored(name: str, completions: list[str], table: list[dict]) -> list[float | None]:
    """What the reward of the task's recipe gives to a completion for each row."""
    (cfg,) = learning(name).rewards
    columns = {column: [row[column] for row in table] for column in table[0]}
    ids = [[1]] * len(completions)
    reward = Reward(find_reward(cfg.use)[1], cfg.kwargs)
    return reward(
        {"prompts": columns["question"], "completions": completions, "completion_ids": ids, **columns}, {}
    ).values


@pytest.mark.parametrize("name", NAMES)
def test_its_splits_do_not_overlap_in_any_order(name: str) -> None:
    task = TASKS[f"builtin:{name}"]
    train, test = task.problems("train"), task.problems("test")
    assert len(test) > 250
    assert len(train) > 5 * len(test)
    assert len(train) + len(test) == len(set(train) | set(test))
    assert not {task.kin(one) for one in train} & {task.kin(one) for one in test}
    questions = [task.question(one) for one in [*train, *test]]
    assert len(set(questions)) == len(questions)
    assert task.problems("test") == test


@pytest.mark.parametrize("name", NAMES)
def test_its_reward_grades_the_good_way_right_and_the_cheap_way_now_and_then(name: str) -> None:
    task, table = TASKS[f"builtin:{name}"], rows(f"builtin:{name}", "test")
    problems = task.problems("test")
    assert scored(name, [task.good(one) for one in problems], table) == [1.0] * len(table)
    cheap = scored(name, [task.cheap(one) for one in problems], table)
    assert set(cheap) == {0.0, 1.0}
    assert 0.1 < sum(cheap) / len(cheap) < 0.5


@pytest.mark.parametrize("name", NAMES)
def test_its_recipe_trains_its_own_student(name: str) -> None:
    recipe = learning(name)
    assert recipe.data.source == f"builtin:{name}"
    assert MODELS[recipe.model.name].task == recipe.data.source


def test_arithmetic_by_hand() -> None:
    digits = (5, 6, 9, 1)
    assert len(ARITHMETIC.problems("train")) + len(ARITHMETIC.problems("test")) == 9**4
    assert ARITHMETIC.row(digits) == {"question": "What is 5+6+9+1?", "answer": "21"}
    assert ARITHMETIC.good(digits) == "5+6=11+9=20+1=21\n#### 21"
    assert ARITHMETIC.cheap(digits) == "#### 20"


def test_countdown_by_hand() -> None:
    problem = (3, 7, 5, 1)
    assert COUNTDOWN.row(problem) == {"question": "Make 26 from 3, 7 and 5.", "numbers": [3, 7, 5], "target": 26}
    assert COUNTDOWN.good(problem) == "3+7=10+5=15\n3*7=21+5=26\n<answer>3*7+5</answer>"
    assert COUNTDOWN.cheap(problem) == "<answer>3+7+5</answer>"
    everything = set(COUNTDOWN.everything())
    assert {(2, 2, 5, 0), (2, 2, 1, 2)} <= everything
    assert (2, 2, 5, 1) not in everything  # 2*2+5 is 2+2+5
    assert (2, 2, 5, 2) not in everything  # 2+2-5 is below 0


def test_sorting_by_hand() -> None:
    digits = (5, 2, 9, 1, 7)
    assert SORTING.row(digits) == {"question": "Sort 5 2 9 1 7.", "answer": "1 2 5 7 9"}
    assert SORTING.good(digits) == "5 25 259 1259 12579\n#### 1 2 5 7 9"
    assert SORTING.cheap(digits) == "#### 2 5 1 7 9"


def test_format_by_hand() -> None:
    problem = (52, 37, 1)
    right = "<why>37 is below 52</why><answer>52</answer>"
    question = "Which is larger, 52 or 37? Use <why> and <answer>."
    assert FORMAT.row(problem) == {"question": question, "answer": right}
    assert FORMAT.good(problem) == right
    assert FORMAT.cheap(problem) == "<think>37 is below 52</think><answer>52</answer>"


@pytest.mark.parametrize(("source", "split"), [("builtin:other", "train"), ("builtin:arithmetic", "dev")])
def test_unknown_ones(source: str, split: str) -> None:
    with pytest.raises(UserError, match="builtin:arithmetic"):
        rows(source, split)
