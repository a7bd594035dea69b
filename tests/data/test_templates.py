"""Values in a template: text and numbers as people write them; what is missing drops the row, the rest is refused."""

from __future__ import annotations

import math

import pytest

from grpo.data.templates import filled
from grpo.errors import UserError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        (3, "3"),
        (3.0, "3"),  # of a CSV file with a gap in its column of whole numbers
        (-0.5, "-0.5"),
        (1e300, "1e+300"),
        (True, "True"),
        ([1, 2.0, 2.5], "1, 2, 2.5"),
    ],
)
def test_values_as_people_write_them(value: object, text: str) -> None:
    assert filled("<{x}>", {"x": value}, "row 0") == f"<{text}>"


@pytest.mark.parametrize("value", [None, math.nan])
def test_what_is_missing_has_no_prompt(value: object) -> None:
    assert filled("{x}{y}", {"x": 1, "y": value}, "row 0") is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"What", r"column 'x' of row 5 of rows is binary \(4 bytes\), not text"),
        ([], "a template takes only text"),
        (["a", "b"], r"is \['a', 'b'\]; a template takes only text.*\{first: x.0\}"),
        ([1, None], "a template takes only text"),
        ([1, math.nan], "a template takes only text"),
        ({"a": 1}, "a template takes only text"),
    ],
)
def test_values_that_are_no_text_are_refused_by_name(value: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        filled("{x}", {"x": value}, "row 5 of rows")
