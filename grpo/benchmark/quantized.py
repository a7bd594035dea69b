"""`grpo bench quantized`: weights as stored, quantized at load, and stored quantized."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.backend.device import setup
from grpo.benchmark.models import write_model, write_weights
from grpo.benchmark.protocol import Measurement, Side, Values, alternate, milliseconds
from grpo.benchmark.rollout import ours
from grpo.benchmark.setting import Setting
from grpo.config import ModelConfig
from grpo.model.drawn import trained_adapters
from grpo.model.load import load, model_folder
from grpo.model.quantized import quantization

BITS: Literal[4] = 4


def quantized_costs(setting: Setting) -> list[Measurement]:
    """Tokens per second, GB of weights, and milliseconds to load, for three forms of one model's weights.

    Raises UserError for a model that is already quantized.
    """
    setup()
    with _stored(setting) as (plain, quantized):
        ways = {
            "as stored": ModelConfig(name=str(plain)),
            f"{BITS} bits, at load": ModelConfig(name=str(plain), quantize=BITS),
            f"{BITS} bits, stored": ModelConfig(name=str(quantized)),
        }
        sides = [_side(name, cfg, setting) for name, cfg in ways.items()]
        return alternate(str(setting), sides, setting.runs)


@contextmanager
def _stored(setting: Setting) -> Iterator[tuple[Path, Path]]:
    """The folders of the model and of its quantized copy, while the block runs."""
    with TemporaryDirectory() as folder:
        plain, quantized = Path(folder) / "plain", Path(folder) / "quantized"
        if setting.model:
            plain = model_folder(ModelConfig(name=setting.model))
        else:
            write_model(setting, plain)
        model, _ = load(ModelConfig(name=str(plain), quantize=BITS))
        config = json.loads((plain / "config.json").read_text())
        write_weights(model, {**config, "quantization": quantization(BITS).config}, quantized)
        yield plain, quantized


def _side(name: str, cfg: ModelConfig, setting: Setting) -> Side:
    model = _adapted(cfg, setting)
    generation = ours(model, setting)
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters())) / 1e9

    def run() -> Values:
        spent = milliseconds(lambda: load(cfg))
        mx.clear_cache()
        return {"tok/s": generation.run()["tok/s"], "GB": weights, "ms load": spent}

    return Side(name, run)


def _adapted(cfg: ModelConfig, setting: Setting) -> nn.Module:
    model, _ = load(cfg)
    if setting.lora:
        trained_adapters(model)
    return model
