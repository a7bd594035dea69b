"""What the tests of built-in tasks share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    """Keeps the made students from one run of the tests to the next."""
    return request.config.cache.mkdir("grpo")
