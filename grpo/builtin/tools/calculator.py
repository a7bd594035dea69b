"""`calculator`: arithmetic for the model, exact for whole numbers. It does not run expressions as Python code."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence

Operand = int | float

_LONGEST = 1000
"""Maximum length of an expression, in characters."""
_DIGITS = 1000
"""Maximum number of digits of a whole number, including intermediate results."""
_SHOWN = 15
"""Significant digits of a result with a decimal point: as many as a double holds exactly."""
_WRITTEN_OTHERWISE = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})


def calculator(expression: str) -> str:
    """
    Computes an arithmetic expression and returns its value.

    Args:
        expression: The expression, for example "(3 + 4) * 2 ** 10 / 7" or "sqrt(2) * pi". Operators: + - * / // % **
            and parentheses. Functions: abs, round, floor, ceil, min, max, sum, sqrt, exp, log, log2, log10, sin, cos,
            tan, asin, acos, atan, degrees, radians, factorial, comb, perm, gcd, lcm. Constants: pi, e.

    Returns:
        The value. Whole numbers are exact.
    """
    text = str(expression).strip().translate(_WRITTEN_OTHERWISE)
    if len(text) > _LONGEST:
        raise ValueError(f"the expression has {len(text)} characters; at most {_LONGEST} are allowed")
    try:
        value = _value(_parsed(text))
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except OverflowError:
        raise ValueError("an intermediate number is too large") from None
    except RecursionError:
        raise ValueError("the expression is nested too deeply") from None
    if isinstance(value, int):
        return str(value)
    return f"{value:.{_SHOWN}g}"


def _parsed(text: str) -> ast.expr:
    if not text:
        raise ValueError("the expression is empty")
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text[:60]!r} is not an arithmetic expression: {error.msg}") from None
    except (ValueError, MemoryError) as error:  # null bytes; too many parentheses
        raise ValueError(f"this is not an arithmetic expression: {error}") from None


def _value(node: ast.expr) -> Operand:
    """Return the value of an expression. Recursive: a sum of many terms is a tree as deep as its number of terms."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(number)
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _value(inner)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _bounded(_OPERATORS[type(op)](_value(left), _value(right)))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _called(name, arguments)
    raise ValueError(_refusal(node))


def _called(name: str, arguments: Sequence[ast.expr]) -> Operand:
    numbers = [_value(argument) for argument in arguments]
    try:
        return _bounded(_FUNCTIONS[name](*numbers))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}({', '.join(map(_short, numbers))}): {error}") from None


def _bounded(number: Operand) -> Operand:
    """Return the number. Raises ValueError or OverflowError if it is not real, or too large."""
    if isinstance(number, complex):
        raise ValueError("the result is not a real number")
    if isinstance(number, float):
        if not math.isfinite(number):
            raise OverflowError
    elif _digits(number) > _DIGITS:
        raise ValueError(_too_long(_digits(number)))
    return number


def _digits(number: int) -> float:
    return number.bit_length() * math.log10(2)


def _too_long(digits: float) -> str:
    return f"an intermediate whole number would have about {digits:,.0f} digits; at most {_DIGITS:,} are allowed"


def _expect(digits: float) -> None:
    """Raise ValueError if a result would have too many digits, before it is computed."""
    if digits > _DIGITS + 1:
        raise ValueError(_too_long(digits))


def _power(base: Operand, exponent: Operand) -> Operand:
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1 and exponent > 0:
        _expect(math.log10(abs(base)) * exponent)
    power: Operand = base**exponent
    return power


def _quotient(left: Operand, right: Operand) -> Operand:
    """Return the quotient: a whole number if whole numbers divide without a remainder."""
    if isinstance(left, int) and isinstance(right, int) and right and left % right == 0:
        return left // right
    return left / right


def _rounded(number: Operand, places: Operand = 0) -> Operand:
    if not isinstance(places, int) or abs(places) > _DIGITS:
        raise ValueError(f"the number of places must be a whole number up to {_DIGITS:,}")
    return round(number, places) if places else round(number)


def _factorial(number: Operand) -> int:
    whole = _whole(number)
    _expect(math.lgamma(min(whole, 10**9) + 1) / math.log(10))
    return math.factorial(whole)


def _chosen(number: Operand, of: Operand) -> int:
    """Return the number of ways to choose `of` items from `number` items. The result is at least (n/k)^k."""
    whole, taken = _whole(number), _whole(of)
    fewer = min(taken, whole - taken)
    if fewer > 0:
        _expect(fewer * (math.log10(whole) - math.log10(fewer)))
    return math.comb(whole, taken)


def _arranged(number: Operand, of: Operand | None = None) -> int:
    """Return the number of ways to choose `of` items from `number` items in order. The result is at least (n/e)^k."""
    whole = _whole(number)
    taken = whole if of is None else _whole(of)
    if 0 < taken <= whole:
        _expect(taken * (math.log10(whole) - math.log10(math.e)))
    return math.perm(whole, taken)


def _whole(number: Operand) -> int:
    if number < 0 or number != int(number):
        raise ValueError("it takes whole numbers of at least 0")
    return int(number)


def _summed(*numbers: Operand) -> Operand:
    return sum(numbers)


def _short(number: Operand) -> str:
    text = str(number)
    return text if len(text) <= 40 else f"{text[:20]}…"


def _refusal(node: ast.expr) -> str:
    """Return what to write instead of a node that is not arithmetic."""
    match node:
        case ast.BinOp(op=ast.BitXor()):
            return "^ is not an operator here: write ** for a power"
        case ast.Tuple():
            return "write numbers without commas (1000, not 1,000), and one expression at a time"
        case ast.Name(id=name):
            return f"there is no {name!r} here: constants are {', '.join(_CONSTANTS)}"
        case ast.Call(func=ast.Name(id=name)) if name in _FUNCTIONS:
            return f"{name} takes only numbers, without names of arguments"
        case ast.Call(func=ast.Name(id=name)):
            return f"there is no function {name!r} here: functions are {', '.join(_FUNCTIONS)}"
    return f"{ast.unparse(node)[:40]!r} is not arithmetic: write numbers, + - * / // % **, parentheses and functions"


_CONSTANTS = {"pi": math.pi, "e": math.e}
_OPERATORS: Mapping[type[ast.operator], Callable[[Operand, Operand], Operand]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _quotient,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_FUNCTIONS: Mapping[str, Callable[..., Operand]] = {
    "abs": abs,
    "round": _rounded,
    "floor": math.floor,
    "ceil": math.ceil,
    "min": min,
    "max": max,
    "sum": _summed,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "log2": math.log2,
    "log10": math.log10,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "asin": math.asin,
    "acos": math.acos,
    "atan": math.atan,
    "degrees": math.degrees,
    "radians": math.radians,
    "factorial": _factorial,
    "comb": _chosen,
    "perm": _arranged,
    "gcd": math.gcd,
    "lcm": math.lcm,
}
