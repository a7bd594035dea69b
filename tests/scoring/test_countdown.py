"""The countdown reward: it agrees with Python's arithmetic in fractions, and nothing hostile gets a point."""

import random
import re
from fractions import Fraction

import pytest

from grpo.plugins import find_reward

reward = find_reward("countdown")[1]


def graded(text: str, numbers: list[int], target: int, **kwargs) -> float | None:
    (score,) = reward([f"<answer>{text}</answer>"], [numbers], [target], **kwargs)
    return score


def random_expression(draw: random.Random, numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    cut = draw.randint(1, len(numbers) - 1)
    left, right = random_expression(draw, numbers[:cut]), random_expression(draw, numbers[cut:])
    text = f"{left}{draw.choice(['+', ' - ', '*', ' / '])}{right}"
    return f"({text})" if draw.random() < 0.5 else text


def test_it_agrees_with_python_in_fractions() -> None:
    draw, right = random.Random(0), 0
    for _ in range(2000):
        numbers = [draw.randint(0, 9) for _ in range(draw.randint(1, 5))]
        text = random_expression(draw, numbers)
        try:
            value = eval(re.sub(r"\d+", r"Fraction(\g<0>)", text), {"Fraction": Fraction})
        except ZeroDivisionError:
            assert graded(text, numbers, 0) == 0.0
            continue
        whole = value.denominator == 1
        right += whole
        shuffled = draw.sample(numbers, len(numbers))
        assert graded(text, shuffled, int(value)) == float(whole), text
        assert graded(text, shuffled, int(value) + 1) == 0.0
        assert graded(text, [*numbers, 3], int(value)) == 0.0  # one is left over
        assert graded(text, [*numbers, 3], int(value), leave_out=True) == float(whole)
        assert graded(text, numbers[1:], int(value), leave_out=True) == 0.0  # one is used that was not given
    assert right > 500


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9",
        "9" * 100_000,
        "(" * 5_000 + "9" + ")" * 5_000,
        "-" * 100_000 + "9",
        "9+" * 50_000 + "9",
        "9*" * 99 + "9",
        "٩+٩",
        "９+９",
        "9+⁹",
        "9<<9",
        "9%9",
        "9//9",
        "9/(9-9)",
        "9/0",
        "9e9",
        "0x9",
        "9_9",
        "9.0+9",
        "9j",
        "9 9",
        "09+9",
        "9,9",
        "(9)(9)",
        "9 if 9 else 9",
        "[9+9]",
        "9+9;9",
        "9+9\n",
        "9+\n9",
        "9+9#",
        "x:=9+9",
        "lambda: 18",
        "__import__('os').system('true')",
        "exit()",
        "18",
        "",
        "()",
        "\x00",
    ],
)
def test_what_is_no_plain_expression_of_the_numbers_scores_nothing(text: str) -> None:
    assert graded(text, [9, 9], 19) == 0.0
    if text != "9+9\n":  # white space around an expression is none of its own
        assert graded(text, [9, 9], 18) == 0.0


@pytest.mark.parametrize(
    ("numbers", "target"), [(None, 18), ("9 9", 18), ([9, None], 18), ([9, 9], None), ([9, 9], "18")]
)
def test_a_row_that_is_none_has_no_score(numbers, target) -> None:
    assert graded("9+9", numbers, target) is None
