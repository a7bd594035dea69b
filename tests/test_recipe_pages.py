"""The pages beside the recipes name what there is: settings, metrics, recipes and their figures."""

from __future__ import annotations

import json
import re

import pytest

from grpo.config.describe import settings
from grpo.plugins import bundled

RECIPES = bundled("recipes")
KEYS = {setting.key for setting in settings()}
SECTIONS = {key.partition(".")[0] for key in KEYS}


def page(name: str) -> str:
    return (RECIPES / name).read_text(encoding="utf-8")


def tables(text: str) -> list[list[str]]:
    """The rows of a page's tables, without heads and rules."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not set(row[0]) <= set("- ")]


def ticked(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def keys_in(text: str) -> set[str]:
    """What in a text looks like a key of a recipe, values cut off."""
    found = {one.partition(":")[0].strip() for one in ticked(text)}
    return {one for one in found if re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)+", one) and one.split(".")[0] in SECTIONS}


@pytest.mark.parametrize("name", ["README.md", "FROM_TRL.md", "TROUBLESHOOTING.md"])
def test_every_key_on_a_page_is_one(name: str) -> None:
    assert keys_in(page(name)) - KEYS == set()


def test_a_wrong_key_is_noticed() -> None:
    assert keys_in("Set `loss.bata: 1` or `rollout.top_p`, in `recipe.yaml`.") - KEYS == {"loss.bata"}


TRL = """
model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout cast_lm_head_to_fp32 num_generations
num_generations_eval max_completion_length ds3_gather_for_generation shuffle_dataset pad_to_multiple_of
generation_batch_size steps_per_generation temperature top_p top_k min_p generation_kwargs chat_template_kwargs
repetition_penalty cache_implementation use_vllm beta num_iterations epsilon delta epsilon_high sapo_temperature_neg
sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg importance_sampling_level reward_weights
multi_objective_aggregation scale_rewards loss_type mask_truncated_completions sync_ref_model ref_model_mixup_alpha
ref_model_sync_steps top_entropy_quantile entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max
entropy_coef_delta entropy_target max_tool_calling_iterations vllm_importance_sampling_correction
vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
off_policy_mask_threshold use_bias_correction_kl log_completions log_multimodal num_completions_to_print
log_unique_prompts log_completions_hub_repo use_transformers_continuous_batching transformers_continuous_batching_config
use_transformers_paged vllm_importance_sampling_cap remove_unused_columns
"""
"""GRPOConfig's own fields in TRL 1.10, but for the rest of those that begin with vllm_."""


def test_every_setting_of_trl_has_its_row() -> None:
    named = {name for row in tables(page("FROM_TRL.md")) for name in ticked(row[0])}
    assert set(TRL.split()) - named == set()


def test_what_is_said_to_be_here_is_here() -> None:
    translated = page("FROM_TRL.md").partition("## Settings")[2].partition("## What is not here")[0]
    for row in tables(translated):
        assert set(ticked(row[1])) <= KEYS, row


def test_every_metric_on_a_page_is_measured(run_cli, recipe, tmp_path) -> None:
    more = ["loss.beta=0.1", "loss.off_policy_mask_threshold=0.5", "advantage.soft_overlong_cache=2"]
    ran = run_cli("train", recipe, "output_dir=run", *more)
    assert ran.code == 0, ran.err
    measured = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    looked_at = {name for row in tables(page("TROUBLESHOOTING.md")) for name in ticked(row[0])}
    assert {name.replace("<name>", "digits") for name in looked_at} - set(measured) == set()
    assert len(looked_at) > 25


SHOWN = ("H200", "RTX 4090 24 GB", "M4 Max 128 GB", "M4 16 GB")


def figures(head: str) -> list[str]:
    """What the index tells of a recipe, from the lines at its head: memory on the H200, and a step on each machine."""
    said = dict(re.findall(rf"^#   ({'|'.join(SHOWN)}) +(.+)$", head, re.MULTILINE))
    steps = {chip: re.search(r"step (?:about|roughly|over) (.+?)  +run", line) for chip, line in said.items()}
    return [
        said["H200"].partition(" GB")[0] + " GB",
        *(found[1] if (found := steps[chip]) else said[chip].partition(":")[0] for chip in SHOWN),
    ]


def test_the_index_has_every_recipe_with_the_figures_of_its_head() -> None:
    rows = {ticked(row[0])[0]: row for row in tables(page("README.md")) if ticked(row[0])}
    heads = {path.stem: path.read_text(encoding="utf-8").partition("\nseed:")[0] for path in RECIPES.glob("*.yaml")}
    assert rows.keys() == heads.keys()
    assert f"its plan is {rows.pop('quickstart')[3]}," in heads.pop("quickstart")
    assert {name: row[3:8] for name, row in rows.items()} == {name: figures(head) for name, head in heads.items()}
