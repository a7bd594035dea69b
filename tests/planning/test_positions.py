"""Sequences that are longer than what a model was made for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo.errors import UserError
from grpo.model.mlxlm import new_model
from grpo.planning.positions import position_note

YARN = {"rope_type": "yarn", "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}


def test_all_positions_may_be_used_and_no_more(zoo) -> None:
    model = zoo("tied")  # of 512 positions
    assert position_note(model, 500, 12) is None
    with pytest.raises(
        UserError, match=r"up to 500 tokens and completions of up to 13 .* are 513 tokens .* for 512 \("
    ):
        position_note(model, 500, 13)


def test_scaled_positions_warn(zoo) -> None:
    model = zoo("tied", rope_scaling=YARN)
    assert position_note(model, 500, 12) is None
    note = position_note(model, 500, 13)
    assert note is not None
    assert "are 513 tokens together, but the model was made for 512 (max_position_embeddings): its rope_scaling" in note


@pytest.mark.parametrize(("scaling", "warns"), [({"rope_type": "default"}, False), ({"type": "linear"}, True)])
def test_either_name_of_the_scaling_is_read_and_default_is_none(zoo, scaling, warns: bool) -> None:
    for name in ("rope_scaling", "rope_parameters"):
        model = zoo("tied")
        setattr(model.args, name, scaling)
        if warns:
            assert position_note(model, 512, 1)
        else:
            with pytest.raises(UserError):
                position_note(model, 512, 1)


def test_limits_of_the_text_part_and_none_at_all(zoo) -> None:
    model = zoo("tied")
    model.args.max_position_embeddings = None
    assert position_note(model, 10**6, 1) is None
    model.args.text_config = {"max_position_embeddings": 8}
    with pytest.raises(UserError, match="made for 8"):
        position_note(model, 8, 1)


def test_a_model_without_attention_has_no_positions() -> None:
    """mlx-lm gives each Mamba-2 model 2,056 of them, which no config says."""
    config = {
        "model_type": "mamba2", "num_heads": 2, "head_dim": 16, "vocab_size": 32, "hidden_size": 16,
        "intermediate_size": 32, "state_size": 8, "num_hidden_layers": 1, "layer_norm_epsilon": 1e-5, "conv_kernel": 4,
        "n_groups": 1, "use_bias": False, "use_conv_bias": True, "tie_word_embeddings": True,
        "time_step_limit": (0.0, 1.0), "time_step_rank": "auto",
    }  # fmt: skip
    model = new_model(config)
    assert model.args.max_position_embeddings == 2056
    assert position_note(model, 2048, 4096) is None


@pytest.mark.parametrize("heads", ["num_attention_heads", "n_head", "n_heads"])
def test_learned_positions_are_a_limit(heads: str) -> None:
    model = SimpleNamespace(args=SimpleNamespace(n_positions=8, **{heads: 2}))
    with pytest.raises(UserError, match="made for 8"):
        position_note(model, 8, 1)


def test_the_plan_says_it_of_the_longest_prompt_there_is(recipe, run_cli, toy_folder) -> None:
    """By measured lengths, held-out prompts included, not by data.max_prompt_length."""
    folder = shutil.copytree(toy_folder, "model")
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    dry = ["train", recipe, "--dry-run", "model.name=model"]
    assert run_cli(*dry).code == 0
    refused = run_cli(*dry, "rollout.max_completion_length=64")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert "completions of up to 64 (rollout.max_completion_length)" in refused.err
    assert "Lower rollout.max_completion_length or data.max_prompt_length" in refused.err
    Path("long.jsonl").write_text(json.dumps({"question": "2 + 2? " * 20, "answer": "4"}) + "\n")
    held_out = "eval={source: long.jsonl, split: train, prompts: 1, samples: 1}"
    assert "the model was made for 64" in run_cli(*dry, held_out).err
    scaled = {"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (Path(folder) / "config.json").write_text(json.dumps(config | scaled))
    warned = run_cli(*dry, held_out)
    assert warned.code == 0, warned.err
    assert "its rope_scaling may reach further" in " ".join(warned.out.split())
