"""Runs that begin from an adapter of `mlx_lm.lora` or PEFT.

They compute what its maker computes, say what to write in the recipe, and need its folder no more once they have begun.
"""

from __future__ import annotations

import json
import re
import shutil
import types
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm import lora
from runs.driver import run

from grpo.config import ModelConfig
from grpo.errors import UserError
from grpo.model.adapters import load_adapter
from grpo.model.load import load
from grpo.recipes import load_recipe
from grpo.runs.checkpoint import checkpoints
from grpo.runs.prepare import prepare

TOKENS = mx.array([[5, 6, 7, 8], [9, 10, 11, 12]])


def by_mlx_lm(toy_folder: Path, folder: Path) -> mx.array:
    """Train an adapter on the last block with mlx-lm's own command; the logits that mlx-lm's own loading gives."""
    data = folder.parent / "lessons"
    data.mkdir()
    rows = "".join(json.dumps({"text": f"{n} and {n} is {2 * n}"}) + "\n" for n in range(4))
    for split in ("train", "valid"):
        (data / f"{split}.jsonl").write_text(rows)
    asked = {"model": str(toy_folder), "train": True, "data": str(data), "iters": 3, "batch_size": 2, "num_layers": 1}
    asked |= {"adapter_path": str(folder), "learning_rate": 0.01, "val_batches": 1, "lr_schedule": None}
    asked |= {"lora_parameters": {"rank": 4, "scale": 5.0, "dropout": 0.0}}
    lora.run(types.SimpleNamespace(**{**lora.CONFIG_DEFAULTS, **asked}))
    model, _ = mlx_lm.load(str(toy_folder), adapter_path=str(folder))
    return model(TOKENS)


def by_peft(toy_folder: Path, folder: Path) -> mx.array:
    """An adapter on q_proj and down_proj as PEFT saves it; the logits of W + alpha / r × B A, multiplied in float64."""
    model, _ = load(ModelConfig(name=str(toy_folder)))
    draw, arrays = np.random.default_rng(0), {}
    for block, layer in enumerate(model.layers):
        for name, linear in (("self_attn.q_proj", layer.self_attn.q_proj), ("mlp.down_proj", layer.mlp.down_proj)):
            outputs, inputs = linear.weight.shape
            a, b = (draw.normal(0, 0.3, shape).astype(np.float32) for shape in ((2, inputs), (outputs, 2)))
            linear.weight = mx.array((np.array(linear.weight, np.float64) + 8 / 2 * b @ a).astype(np.float32))
            path = f"base_model.model.model.layers.{block}.{name}"
            arrays |= {f"{path}.lora_A.weight": mx.array(a), f"{path}.lora_B.weight": mx.array(b)}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return model(TOKENS)


def what_to_write(recipe: Path, folder: Path) -> str:
    """The section that a recipe is told to have, as an override, with the adapter's folder."""
    with pytest.raises(UserError) as refused:
        prepare(load_recipe(recipe, [f"adapter.path={folder}", "adapter.rank=3"]))
    section = re.search(r"To continue from it, set this in the recipe: adapter: \{(.*)\}$", str(refused.value))
    assert section, str(refused.value)
    return f"adapter={{{section[1]}, path: {folder}}}"


@pytest.mark.quick_cases("by_peft")
@pytest.mark.parametrize("make", [by_mlx_lm, by_peft])
def test_a_run_begins_where_others_ended_and_keeps_what_it_needs(
    recipe: Path, toy_folder: Path, tmp_path: Path, run_cli, make
) -> None:
    made = tmp_path / "made"
    expected, base = make(toy_folder, made), load(ModelConfig(name=str(toy_folder)))[0](TOKENS)
    assert mx.abs(expected - base).max() > 0.05
    begin = what_to_write(recipe, made)
    prepared = prepare(load_recipe(recipe, [begin]))
    policy = prepared.trainer.policy
    assert mx.allclose(policy.model(TOKENS), expected, atol=1e-4)
    with policy.use("reference"):
        assert mx.allclose(policy.model(TOKENS), expected, atol=1e-4)
    prepared.opened.close()

    more = [begin, "checkpoint.every=1", "loss.beta=0.1", "optim.learning_rate=0.001"]
    whole = run(recipe, "output_dir=whole", *more)
    shutil.copytree("whole", "parts")
    shutil.rmtree(checkpoints(Path("parts/checkpoints"))[-1])
    shutil.rmtree(made)
    parts = run(recipe, "output_dir=parts", *more, resume=True)
    one, other = (mx.load(str(end.checkpoint / "adapters.safetensors")) for end in (whole, parts))
    assert all(mx.array_equal(array, other[path]) for path, array in one.items())
    loaded, _ = load(ModelConfig(name=str(toy_folder)))
    load_adapter(loaded, parts.checkpoint)  # the checkpoint alone, as `grpo generate` and mlx-lm read it
    moved, began = (mx.abs(logits - expected).mean().item() for logits in (loaded(TOKENS), base))
    assert 1e-4 < moved < 0.5 * began
    ran = run_cli("eval", "parts", "--data", "train.jsonl", "--split", "train", "--prompts", "2", "--samples", "1")
    assert ran.code == 0, ran.err
    assert "start (adapter.path)" in ran.out
