"""Configs of models that no model has: an answer at once, in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from grpo.config import ModelConfig
from grpo.errors import UserError
from grpo.model.load import load
from grpo.model.outline import costs_of_config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 1_000_000}, "config.json: num_hidden_layers is 1e+06, and no model has more than 2,000"),
        ({"num_hidden_layers": 10**30}, "config.json: num_hidden_layers is 1e+30"),
        ({"text_config": {"n_layers": 5_000}}, "config.json: n_layers is 5000"),
        ({"hidden_size": 10**12}, "outside the supported range"),
        ({"head_dim": 0}, "cannot be raised to a negative power"),
    ],
)
def test_it_is_refused_by_both_that_read_it(toy_folder: Path, tmp_path: Path, changes: Any, said: str) -> None:
    folder = shutil.copytree(toy_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    for read in (lambda: costs_of_config(config), lambda: load(ModelConfig(name=str(folder)))):
        with pytest.raises(UserError, match=r"model|config") as error:
            read()
        assert said in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"), [("[1]", "expected keys and values"), ("{", "not JSON"), ("[" * 9999, "not")]
)
def test_a_config_that_is_none(toy_folder: Path, tmp_path: Path, text: str, said: str) -> None:
    folder = shutil.copytree(toy_folder, tmp_path / "model")
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=said):
        load(ModelConfig(name=str(folder)))
