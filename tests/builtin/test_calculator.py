"""The calculator: what it computes, and what it says of what it does not."""

import pytest
from transformers.utils import get_json_schema

from grpo.builtin.tools.calculator import calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", "14"),
        ("-(2 + 3) ** 2", "-25"),
        ("7 / 2", "3.5"),
        ("6 / 2", "3"),
        ("10 ** 20 / 10", "10000000000000000000"),
        ("7 // 2 + 7 % 4", "6"),
        ("0.1 + 0.2", "0.3"),
        ("2 / 3", "0.666666666666667"),
        ("2 ** 100", "1267650600228229401496703205376"),
        ("2 ** -1", "0.5"),
        ("1 ** 10 ** 20", "1"),
        ("3 × 4 ÷ 2 − 1", "5"),
        ("sqrt(2) * pi", "4.44288293815837"),
        ("round(2.345, 2) + abs(-1) + max(1, 2, 3)", "6.35"),
        ("factorial(20) / comb(20, 10)", "13168189440000"),
        ("perm(5, 2) + gcd(12, 18) + lcm(4, 6)", "38"),
        ("sum(1, 2, 3)", "6"),
        ("+".join(["1"] * 400), "400"),
    ],
)
def test_what_it_computes(expression: str, value: str) -> None:
    assert calculator(expression) == value


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("9**9**9", "would have about 369,693,100 digits; at most 1,000"),
        ("factorial(10**8)", r"factorial\(100000000\): an intermediate whole number would have about 7"),
        ("comb(10**7, 10**6)", "would have about 1,000,000 digits"),
        ("perm(10**7, 10**6)", "would have about 6,565,706 digits"),
        ("10**999 * 10**999", "digits; at most 1,000"),
        ("round(1, -10**9)", "the number of places"),
        ("10**400 / 3", "too large"),
        ("10.0 ** 400", "too large"),
        ("1e400", "too large"),
        ("1 / 0", "division by zero"),
        ("1 % 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("(-8) ** (1 / 3)", "not a real number"),
        ("sqrt(-1)", r"sqrt\(-1\): "),
        ("2 ^ 3", r"write \*\* for a power"),
        ("1,000 * 3", "without commas"),
        ("x + 1", "there is no 'x' here: constants are pi, e"),
        ("open('x')", "there is no function 'open' here: functions are abs"),
        ("__import__('os').system('ls')", "is not arithmetic"),
        ("(1).real", "is not arithmetic"),
        ("[1 for x in (1, 2)]", "is not arithmetic"),
        ("True + 1", "is not arithmetic"),
        ("'a' * 3", "is not arithmetic"),
        ("2j * 2", "is not arithmetic"),
        ("max(*[1, 2])", "is not arithmetic"),
        ("round(1, ndigits=2)", "round takes only numbers"),
        ("1 +", "'1 [+]' is not an arithmetic expression"),
        ("x = 1", "is not an arithmetic expression"),
        ("", "is empty"),
        ("1\0", "is not an arithmetic expression"),
        ("1" * 1001, "has 1001 characters; at most 1000"),
        ("-" * 990 + "1", "nested too deeply"),
        ("(" * 499 + "1" + ")" * 499, "is not an arithmetic expression"),
    ],
)
def test_what_it_refuses(expression: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        calculator(expression)
    assert len(str(error.value)) < 400


def test_its_schema_is_what_the_model_reads() -> None:
    function = get_json_schema(calculator)["function"]
    assert function["name"] == "calculator"
    assert function["description"] == "Computes an arithmetic expression and returns its value."
    assert list(function["parameters"]["properties"]) == function["parameters"]["required"] == ["expression"]
