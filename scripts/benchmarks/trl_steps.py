"""Times GRPO steps of TRL on a CUDA machine, for a comparison with `grpo bench train --shape qwen3-0.6b`.

usage: trl_steps.py [--steps 5] [--prompts 8] [--completions 8] [--prompt-length 256] [--completion-length 128]
                    [--micro-batch ROWS] [--no-checkpointing]

By default, gradients are checkpointed, as in TRL's defaults, and all rows are one micro-batch. The model has
Qwen3-0.6B's shape and random bf16 weights, rollouts use Hugging Face's generate, LoRA has rank 16 on every linear
layer, and there is no penalty. Needs an environment with torch, transformers, trl and peft. Prints one line of JSON.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time

os.environ["WANDB_DISABLED"] = "true"

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

VOCABULARY = 151_936

parser = argparse.ArgumentParser()
for name, default in (
    ("steps", 5),
    ("prompts", 8),
    ("completions", 8),
    ("prompt-length", 256),
    ("completion-length", 128),
):
    parser.add_argument(f"--{name}", type=int, default=default)
parser.add_argument("--micro-batch", type=int, help="completions per micro-batch (default: all)")
parser.add_argument("--no-checkpointing", action="store_true")
cli = parser.parse_args()
rows = cli.prompts * cli.completions
micro_batch = cli.micro_batch or rows
if rows % micro_batch:
    parser.error(f"--micro-batch {micro_batch} does not divide the {rows} completions of a step")

torch.manual_seed(0)
config = Qwen3Config(
    hidden_size=1024,
    num_hidden_layers=28,
    intermediate_size=3072,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=VOCABULARY,
    tie_word_embeddings=True,
    max_position_embeddings=40_960,
    rms_norm_eps=1e-6,
)
model = Qwen3ForCausalLM(config).to(torch.bfloat16)
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w151645", pad_token="w151643", unk_token="w0")
draw = random.Random(0)
texts = [" ".join(f"w{draw.randrange(1000, 100_000)}" for _ in range(cli.prompt_length)) for _ in range(64)]


class Clock(TrainerCallback):
    """Measures the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *_args, **_kwargs) -> None:
        torch.cuda.synchronize()
        self.started = time.perf_counter()

    def on_step_end(self, *_args, **_kwargs) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)


clock = Clock()
with tempfile.TemporaryDirectory() as folder:
    arguments = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=rows // micro_batch,
        num_generations=cli.completions,
        max_completion_length=cli.completion_length,
        max_steps=cli.steps,
        bf16=True,
        report_to=[],
        beta=0.0,
        learning_rate=1e-5,
        gradient_checkpointing=not cli.no_checkpointing,
        save_strategy="no",
        temperature=1.0,
        disable_tqdm=True,
        loss_type="dapo",
    )
    GRPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        reward_funcs=lambda completions, **_: [random.random() for _ in completions],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[clock],
    ).train()
warm = clock.seconds[1:]
measured = {"s": statistics.fmean(warm), "runs": clock.seconds, "GB": torch.cuda.max_memory_allocated() / 1e9}
print(json.dumps(measured))
