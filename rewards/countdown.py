"""Countdown: whether an expression of the given numbers equals the target (the task of TinyZero)."""

import ast
import re
from collections.abc import Iterator
from fractions import Fraction
from operator import add, mul, sub, truediv
from typing import Any

from grpo.scoring.text import texts

CALLS = "completion"

LONGEST = 200  # maximum number of characters of an expression, which bounds the cost of evaluating it
EXPRESSION = re.compile(rf"[0-9+\-*/() ]{{1,{LONGEST}}}")
SIGNS = str.maketrans("×÷−", "*/-")
OPERATORS: dict[type[ast.operator], Any] = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}


def reward(
    completions: list[Any], numbers: list[Any], target: list[Any], leave_out: bool = False, **_: Any
) -> list[float | None]:
    """1.0 if the completion's expression equals `target` and uses each of `numbers` exactly once, else 0.0.

    `leave_out`: each number at most once. The expression is the content of the last `<answer>...</answer>`, or else the
    last line. It may contain whole numbers, + - * / and parentheses, is evaluated in fractions, and may end in
    `= target`. None if the row's numbers or target are not whole numbers.
    """
    rows = zip(texts(completions), numbers, target, strict=True)
    return [_grade(text, given, goal, leave_out) for text, given, goal in rows]


def _grade(completion: str, numbers: Any, target: Any, leave_out: bool) -> float | None:
    if not (isinstance(numbers, list) and all(isinstance(number, int) for number in [*numbers, target])):
        return None
    tree = _parsed(_expression(completion, target))
    if tree is None or not _fits(list(_numbers(tree)), numbers, leave_out):
        return 0.0
    try:
        return float(_value(tree) == target)
    except ZeroDivisionError:
        return 0.0


def _expression(completion: str, target: int) -> str:
    """The text of the expression, without `= target`."""
    _, opened, text = completion.rpartition("</answer>")[0].rpartition("<answer>")
    if not opened:
        text = completion.strip().rpartition("\n")[2]
    left, equals, right = text.rpartition("=")
    return (left if equals and right.strip() == str(target) else text).translate(SIGNS).strip()


def _parsed(text: str) -> ast.expr | None:
    """The syntax tree of an expression of whole numbers, + - * / and minus signs; None for any other text."""
    if not EXPRESSION.fullmatch(text):
        return None
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        return None
    return tree if _is_plain(tree) else None


def _is_plain(tree: ast.expr) -> bool:
    if isinstance(tree, ast.BinOp):
        return type(tree.op) in OPERATORS and _is_plain(tree.left) and _is_plain(tree.right)
    if isinstance(tree, ast.UnaryOp):
        return isinstance(tree.op, ast.USub) and _is_plain(tree.operand)
    return isinstance(tree, ast.Constant)


def _numbers(tree: ast.expr) -> Iterator[int]:
    return (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))  # type: ignore[misc]


def _fits(used: list[int], given: list[int], leave_out: bool) -> bool:
    if not leave_out:
        return sorted(used) == sorted(given)
    return all(used.count(number) <= given.count(number) for number in used)


def _value(tree: ast.expr) -> Fraction:
    """The value of an expression. Raises ZeroDivisionError."""
    if isinstance(tree, ast.BinOp):
        return Fraction(OPERATORS[type(tree.op)](_value(tree.left), _value(tree.right)))
    if isinstance(tree, ast.UnaryOp):
        return -_value(tree.operand)
    assert isinstance(tree, ast.Constant)
    return Fraction(tree.value)  # type: ignore[arg-type]


_ROW = {"numbers": [3, 7, 5], "target": 16}
_LEAVE_OUT = {"kwargs": {"leave_out": True}}
CASES = [
    {"completion": "<think>3*7=21</think>\n<answer>3*7-5</answer>", **_ROW, "score": 1.0},
    {"completion": "<answer> (7 * 3) - 5 = 16 </answer>", **_ROW, "score": 1.0},
    {"completion": "<answer>3 × 7 − 5</answer>", **_ROW, "score": 1.0},
    {"completion": "<answer>-5+3*7</answer>", **_ROW, "score": 1.0},
    {"completion": "So it is:\n3*7-5", **_ROW, "score": 1.0},
    {"completion": "<answer>3+7+5</answer> no, <answer>3*7-5</answer>", **_ROW, "score": 1.0},
    {"completion": "<answer>3*7-5</answer> no, <answer>3+7+5</answer>", **_ROW, "score": 0.0},
    {"completion": "<answer>8/(3-8/3)</answer>", "numbers": [3, 3, 8, 8], "target": 24, "score": 1.0},
    {"completion": "<answer>7+9</answer>", **_ROW, "score": 0.0},
    {"completion": "<answer>16</answer>", **_ROW, "score": 0.0},
    {"completion": "<answer>16</answer>", "numbers": [16], "target": 16, "score": 1.0},
    {"completion": "<answer>7+7+5-3</answer>", **_ROW, "score": 0.0},
    {"completion": "<answer>5+7</answer>", "numbers": [3, 7, 5], "target": 12, "score": 0.0},
    {"completion": "<answer>5+7</answer>", "numbers": [3, 7, 5], "target": 12, **_LEAVE_OUT, "score": 1.0},
    {"completion": "<answer>5+5</answer>", "numbers": [3, 7, 5], "target": 10, **_LEAVE_OUT, "score": 0.0},
    {"completion": "<answer>3*7-5=15</answer>", **_ROW, "score": 0.0},
    {"completion": "<answer>3*7-5</answer>", "numbers": [3, 7, 5], "target": None, "score": None},
    {"completion": "<answer>3*7-5</answer>", "numbers": "3 7 5", "target": 16, "score": None},
    {"completion": "<answer>7/(5-5)</answer>", "numbers": [5, 5, 7], "target": 1, "score": 0.0},
    {"completion": "<answer>9**9**9</answer>", "numbers": [9, 9, 9], "target": 1, "score": 0.0},
    {"completion": "<answer>9//9</answer>", "numbers": [9, 9], "target": 1, "score": 0.0},
    {"completion": "<answer>3(7)-5</answer>", **_ROW, "score": 0.0},
    {"completion": "<answer>٣*٧-٥</answer>", **_ROW, "score": 0.0},
    {"completion": "<answer>3*7-5 #</answer>", **_ROW, "score": 0.0},
    {"completion": "<answer>__import__('os')</answer>", **_ROW, "score": 0.0},
    {"completion": "<answer>" + "(" * 90 + "3" + ")" * 90 + "*7-5</answer>", **_ROW, "score": 1.0},
    {"completion": "<answer>" + "(" * 99_000 + "</answer>", **_ROW, "score": 0.0},
    {"completion": "<answer>" + "-" * 190 + "3*7-5</answer>", **_ROW, "score": 1.0},
    {"completion": "<answer>" * 100_000, **_ROW, "score": 0.0},
    {"completion": "", **_ROW, "score": 0.0},
    {"completion": [{"role": "assistant", "content": "<answer>3*7-5</answer>"}], **_ROW, "score": 1.0},
]
