"""A model is loaded, cast and quantised with no more beside it than what one array is made of."""

from __future__ import annotations

import gc
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import COMMON, ZOO, make_model
from mlx.utils import tree_flatten, tree_map

from grpo.backend.ranks import Ranks
from grpo.benchmark.models import write_weights
from grpo.config import ModelConfig
from grpo.model.load import load

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 1024, "num_hidden_layers": 12}
LARGEST = {"untied": 512 * 256, "moe": 4 * 256 * 256}
"""Numbers of a layer's largest array. The embedding is as large or larger, and is made while there is nothing else."""
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 256}


def stored(folder: Path, kind: str, dtype: mx.Dtype) -> Path:
    """A model's folder, its weights of this dtype."""
    args = {**WIDE, **(EXPERTS if kind == "moe" else {})}
    model = make_model(kind, **args)
    model.update(tree_map(lambda a: a.astype(dtype), model.parameters()))
    architecture, own = ZOO[kind]
    write_weights(model, {**COMMON, "model_type": architecture, **own, **args}, folder)
    return folder


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["untied", "moe"])
@pytest.mark.parametrize(
    ("source", "settings"),
    [
        (mx.bfloat16, {"quantize": 4}),
        (mx.float32, {"quantize": 4}),
        (mx.float32, {"quantize": 8, "dtype": "bfloat16"}),
        (mx.bfloat16, {}),
    ],
)
def test_loading_takes_the_model_and_what_one_array_is_made_of(tmp_path, kind: str, source, settings: dict) -> None:
    folder = stored(tmp_path / "model", kind, source)
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _ = load(ModelConfig(name=str(folder), **settings))
    arrays = tree_flatten(model.parameters())
    result = sum(array.nbytes for _, array in arrays)
    assert mx.get_active_memory() - before < 1.05 * result
    # An array as stored and as cast: at most 6 bytes a number where the result has half a byte.
    made_of = LARGEST[kind] * (source.size + getattr(mx, settings.get("dtype", "float32")).size)
    assert mx.get_peak_memory() - before < 1.05 * result + made_of


class Quarter(Ranks):
    """One of four processes that hold a model together; the others are not there, and nothing is exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 4
        self.group = type("Four", (), {"size": lambda _: 4, "rank": lambda _: 2})()


@pytest.mark.parametrize("settings", [{}, {"quantize": 4}])
def test_a_divided_model_is_loaded_with_no_more_than_a_process_s_part_and_one_array(tmp_path, settings: dict) -> None:
    more = {"intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 24}
    model = make_model("untied", **{**WIDE, **more})
    architecture, own = ZOO["untied"]
    write_weights(model, {**COMMON, "model_type": architecture, **own, **WIDE, **more}, tmp_path / "model")
    whole = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    del model
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _ = load(ModelConfig(name=str(tmp_path / "model"), **settings), Quarter())
    arrays = dict(tree_flatten(model.parameters()))
    part = sum(array.nbytes for array in arrays.values())
    assert arrays["model.layers.3.mlp.down_proj.weight"].shape[1] * (8 if settings else 1) == 256
    assert part < (0.15 if settings else 0.35) * whole
    assert (model.args.num_attention_heads, model.args.num_key_value_heads) == (2, 1)  # memory is reckoned by them
    made_of = 3 * 4 * 1024 * 256  # an array as stored, as it is cut, and quantised
    assert mx.get_peak_memory() - before < 1.05 * part + made_of
