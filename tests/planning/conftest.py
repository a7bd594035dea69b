import pytest


@pytest.fixture(autouse=True)
def measured_once() -> None:
    """Planning is tested here: every plan measures for itself."""
