"""Which configuration of a Hub dataset is read where the recipe names none."""

import pytest

from grpo.config import DataConfig
from grpo.data.loading import _with_main

MISSING = "Config name is missing.\nPlease pick one among the available configs: {}"


def rows_of(known: list[str], **settings):
    """What is read of a dataset with these configurations."""

    def loaded(config: str | None) -> str:
        if config is None:
            raise ValueError(MISSING.format(known))
        return config

    return _with_main(loaded, DataConfig(source="org/data", prompt="{question}", **settings))


def test_main_is_taken_where_it_is_one_of_several() -> None:
    assert rows_of(["main", "socratic"]) == "main"
    assert rows_of(["main", "socratic"], config="socratic") == "socratic"


def test_without_main_the_recipe_has_to_choose() -> None:
    with pytest.raises(ValueError, match="Config name is missing"):
        rows_of(["algebra", "geometry"])
