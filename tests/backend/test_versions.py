"""What is read of versions and of grpo's own requirements."""

import importlib.metadata

import pytest

from grpo.backend import versions

LINES = ["mlx<0.33,>=0.32.2", "mlx-lm (<0.33,>=0.32)", "numpy", "mlx[cpu]; extra == 'cpu'", "x<2; python_version < '4'"]


def test_requirements_without_extras_and_conditions(monkeypatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: LINES)
    assert versions.requirements() == {"mlx": "<0.33,>=0.32.2", "mlx-lm": "<0.33,>=0.32", "numpy": ""}


def test_a_checkout_that_is_not_installed_requires_nothing(monkeypatch) -> None:
    def absent(_: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert versions.requirements() == {}


@pytest.mark.parametrize(
    ("version", "newer"), [("0.32.99", False), ("0.33", True), ("0.33.0.dev1", True), ("0.100", True), ("1", True)]
)
def test_a_version_at_the_bound_or_above_is_untested(version: str, newer: bool) -> None:
    found = versions.untested({"mlx": version, "numpy": "9"}, {"mlx": "<0.33,>=0.32", "numpy": "", "wandb": "<1"})
    assert found == ({"mlx": "0.33"} if newer else {})
