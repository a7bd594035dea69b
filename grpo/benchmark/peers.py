"""Runs GRPO steps of other toolkits for comparison: scripts of the repository, each in its own environment."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from grpo.benchmark.models import write_model
from grpo.benchmark.process import Peer
from grpo.benchmark.setting import Setting
from grpo.config import ModelConfig
from grpo.errors import UserError
from grpo.model.load import model_folder

SCRIPTS = Path(__file__).parents[2] / "scripts/benchmarks"
PEERS = {"mlx-lm-lora": SCRIPTS / "mlx_lm_lora_steps.py", "unsloth": SCRIPTS / "unsloth_steps.py"}


@dataclass(frozen=True, slots=True)
class Toolkit:
    """One of `PEERS` by name, the Python of its environment, whether it uses the BLAS that grpo loads, and the options
    of its script."""

    name: str
    python: Path
    blas: bool = False
    options: str = ""

    def __str__(self) -> str:
        options = f", {self.options}" if self.options else ""
        return f"{self.name}{', same BLAS' if self.blas else ''}{options}"


@contextmanager
def running(toolkit: Toolkit, setting: Setting) -> Iterator[Peer]:
    """A process that runs one GRPO step per request, with the same weights, prompts and lengths.

    Raises UserError for an unknown toolkit, and if its script is missing.
    """
    if toolkit.name not in PEERS:
        raise UserError(f"--peer {toolkit.name}: expected {' or '.join(PEERS)}")
    script = PEERS[toolkit.name]
    if not script.is_file():
        raise UserError(f"--peer-python: {script} is missing: it is in the repository, but not in the package")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = model_folder(ModelConfig(name=setting.model)) if setting.model else folder / "model"
        if not setting.model:
            write_model(setting, model)
        sizes = (setting.prompts, setting.completions, setting.prompt_length, setting.completion_length)
        own = [*(["--blas"] if toolkit.blas else []), *shlex.split(toolkit.options)]
        with Peer(str(toolkit), [toolkit.python, script, model, *map(str, sizes), *own], folder=folder) as peer:
            yield peer
