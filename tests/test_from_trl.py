"""The page for those who come from TRL: every name that TRL 1.16 has is on it, and a message says what the page says.

The names are kept here, so that no test needs TRL: the fields of its `GRPOConfig`, the arguments of its `GRPOTrainer`,
the fields of PEFT 0.21's `LoraConfig` and of transformers 5.24's `TrainingArguments`.
"""

from __future__ import annotations

import re

import pytest

from grpo.config.describe import settings
from grpo.errors import UserError
from grpo.plugins import bundled
from grpo.recipes import load_recipe
from grpo.trl import FOLDER, PAGE, answer, answers

GRPO_CONFIG = """
learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout cast_lm_head_to_fp32
remove_unused_columns num_generations num_generations_eval max_completion_length ds3_gather_for_generation
shuffle_dataset pad_to_multiple_of generation_batch_size steps_per_generation temperature top_p top_k min_p
generation_kwargs chat_template_kwargs repetition_penalty cache_implementation use_vllm vllm_mode vllm_model_impl
vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port
vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size beta
num_iterations epsilon delta epsilon_high sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos
vespo_k_neg vespo_lambda_neg importance_sampling_level reward_weights multi_objective_aggregation scale_rewards
loss_type mask_truncated_completions sync_ref_model ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile
entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target
max_tool_calling_iterations vllm_importance_sampling_correction vllm_importance_sampling_mode
vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min off_policy_mask_threshold use_bias_correction_kl
log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged
vllm_importance_sampling_cap
"""
"""Its own fields, without those of `TrainingArguments`."""
GRPO_TRAINER = """
model reward_funcs args train_dataset eval_dataset processing_class reward_processing_classes callbacks optimizers
quantization_config peft_config tools rollout_func environment_factory
"""
"""Arguments of its constructor."""
LORA_CONFIG = """
r target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save
init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core
trainable_token_indices loftq_config eva_config corda_config lora_ga_config use_dora velora_config
alora_invocation_tokens use_qalora qalora_group_size monteclora_config layer_replication runtime_config lora_bias
target_parameters use_bdlora arrow_config kasa_config ensure_weight_tying
"""
TRAINING_ARGUMENTS = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
gradient_accumulation_steps average_tokens_across_devices max_grad_norm label_smoothing_factor bf16 fp16
bf16_full_eval fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode use_liger_kernel
liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size logging_strategy
logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start
eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub
hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed
data_seed use_cpu accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers
dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
dataloader_in_order remove_unused_columns label_names train_sampling_strategy length_column_name
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
fsdp_config deepspeed debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
"""

KEYS = {one.key for one in settings()}


@pytest.mark.parametrize("names", [GRPO_CONFIG, GRPO_TRAINER, LORA_CONFIG, TRAINING_ARGUMENTS])
def test_every_name_is_on_the_page(names: str) -> None:
    assert [name for name in names.split() if answer(name) is None] == []


def test_every_field_of_grpo_config_is_written_out() -> None:
    page = (bundled(FOLDER) / PAGE).read_text(encoding="utf-8")
    assert [name for name in GRPO_CONFIG.split() if f"`{name}`" not in page] == []


def test_a_name_of_nobody_is_not() -> None:
    assert answer("num_generation") is None


def test_every_name_on_the_page_is_one_of_theirs() -> None:
    older = {
        "vllm_importance_sampling_cap",
        "warmup_ratio",
        "bf16",
        "fp16",
        "dtype",
        "torch_dtype",
        "trust_remote_code",
    }
    earlier = {"replay_buffer_size"}  # of GRPOWithReplayBufferConfig, which 1.16 no longer has
    scripts = {"lora_r", "lora_target_modules", "task_type", "peft_type", "inference_mode"}
    theirs = {
        *f"{GRPO_CONFIG} {GRPO_TRAINER} {LORA_CONFIG} {TRAINING_ARGUMENTS}".split(),
        *older,
        *earlier,
        *scripts,
    }
    assert {name for name in answers() if "*" not in name} - theirs == set()


def test_what_is_said_to_be_here_is_here() -> None:
    assert {key for found in answers().values() for key in found.keys} - KEYS == set()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.lora_alpha=32", "TRL's lora_alpha is adapter.scale here (alpha / rank, so alpha is scale × rank)."),
        ("optim.num_train_epochs=3", "TRL's num_train_epochs is optim.steps here (counts rollouts: for epochs it is"),
        (
            "per_device_train_batch_size=8",
            "TRL's per_device_train_batch_size is rollout.prompts_per_step here (batch × accumulation × processes",
        ),
        (
            "optim.gradient_accumulation_steps=8",
            "TRL's gradient_accumulation_steps is rollout.prompts_per_step here (batch × accumulation × processes",
        ),
        ("reward_weights=[1, 2]", "TRL's reward_weights is rewards.0.weight here (each reward has its own: rewards.N"),
        ("vllm_mode=colocate", "TRL's vllm_mode is not a setting here: one model samples and trains: there is no"),
        (
            "environment_factory=a.py:Game",
            "TRL's environment_factory is environment.use here (the class runs",
        ),
        (
            "rollout.max_tool_calling_iterations=3",
            "TRL's max_tool_calling_iterations is environment.max_turns here",
        ),
        ("environments.chess.max_turn=3", "Did you mean environments.chess.max_turns?"),
        ("tools=[{use: calculator, time_out: 3}]", "Did you mean tools.0.timeout?"),
        (
            "sync_ref_model=true",
            "TRL's sync_ref_model is adapter.sync_reference_every here (a number of rollouts, not updates; null",
        ),
        (
            "adapter.lora_dropout=0.1",
            "TRL's lora_dropout is adapter.dropout here (in the update only).",
        ),
        ("r=8", "TRL's r is adapter.rank here."),
        (
            "rollout.replay_buffer_size=64",
            "TRL's replay_buffer_size is rollout.reuse here (a setting of GRPOWithReplayBufferTrainer in",
        ),
        ("rollout.beta=1", "Did you mean loss.beta?"),
        ("loss.bata=1", "Did you mean loss.beta?"),
    ],
)
def test_the_page_answers_in_the_message(recipe, override: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(recipe, [override])
    assert re.search(rf": unknown key \S+\. {re.escape(said)}", str(error.value))


def test_a_key_under_trls_name_is_not_said_to_be_missing(recipe) -> None:
    recipe.write_text(recipe.read_text().replace("steps: 2", "max_steps: 2"))
    with pytest.raises(UserError, match=r"TRL's max_steps is optim\.steps here") as error:
        load_recipe(recipe)
    assert "missing" not in str(error.value)
