"""Configs of models that no model has: an answer at once, in one line."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
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
        ({"num_hidden_layers": 2_001}, "config.json: num_hidden_layers is 2001, but no model has more than 2,000"),
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


READ = """
import json, sys
import grpo
from grpo.config import ModelConfig
from grpo.errors import UserError
from grpo.model.load import load
from grpo.model.outline import costs_of_config

config = json.load(open(f"{sys.argv[1]}/config.json"))
for read in (lambda: costs_of_config(config), lambda: load(ModelConfig(name=sys.argv[1]))):
    try:
        read()
    except UserError as error:
        print(error)
"""
"""Both readers' answers to the config of the model folder in the first argument, a line for each."""


def bounded() -> None:
    """Limit this process to 10 seconds of CPU and 4 GB, far more than an answer takes."""
    resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
    if sys.platform == "linux":  # macOS counts what is reserved, not what is used
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))


@pytest.mark.parametrize("layers", [1_000_000, 10**30])
def test_layers_without_end_are_refused_before_one_is_made(toy_folder: Path, tmp_path: Path, layers: int) -> None:
    """In a process of its own: if nothing bounded the layers, they would take all the memory of the machine."""
    folder = shutil.copytree(toy_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    asked = [sys.executable, "-c", READ, str(folder)]
    ran = subprocess.run(asked, preexec_fn=bounded, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-1000:]
    said = f"config.json: num_hidden_layers is {layers:.6g}, but no model has more than 2,000 layers"
    assert ran.stdout.splitlines() == [said, said]


@pytest.mark.parametrize(
    ("text", "said"), [("[1]", "expected keys and values"), ("{", "not JSON"), ("[" * 9999, "not")]
)
def test_a_config_that_is_none(toy_folder: Path, tmp_path: Path, text: str, said: str) -> None:
    folder = shutil.copytree(toy_folder, tmp_path / "model")
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=said):
        load(ModelConfig(name=str(folder)))
