"""Cases that repeat others are slow, and no test is slow by mistake."""

from __future__ import annotations

import pytest
from thinning import thin


@pytest.mark.parametrize("case", ["one-two"])
def test_a_quick_case_that_no_test_has_is_a_mistake(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    item = request.node
    monkeypatch.setattr(item.config, "args", ["tests"])
    monkeypatch.setitem(item.config.option.__dict__, "lf", False)
    item.add_marker(pytest.mark.quick_cases("two"))
    thin([item])
    assert item.get_closest_marker("slow") is None
    item.add_marker(pytest.mark.quick_cases("three"), append=False)
    with pytest.raises(pytest.UsageError, match="no case has 'three' in its id"):
        thin([item])
    assert item.get_closest_marker("slow") is not None
