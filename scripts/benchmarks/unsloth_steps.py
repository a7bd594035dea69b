"""Times GRPO steps of Unsloth on MLX, for `grpo bench train --peer unsloth --peer-python`. Runs in its own environment.

usage: unsloth_steps.py MODEL PROMPTS COMPLETIONS PROMPT_LENGTH COMPLETION_LENGTH
                        [--blas] [--no-checkpointing] [--no-cce] [--no-compile]

It needs only unsloth_zoo 2026.10.9 (`pip install --no-deps unsloth_zoo`), mlx, mlx-lm, transformers and numpy, but no
torch. Uses Unsloth's defaults, except for settings that must be the same on both sides: LoRA of rank 16 on every linear
layer, AdamW, temperature 1, no penalty, all rows of a step in one batch. Runs one step per line of input, and prints
its figures as a line of JSON. It wraps `GRPOBatchPlan._generate` (rollout and reward) and `generate_batch` (rollout).
"""

import contextlib
import io
import json
import os
import random
import sys
from pathlib import Path

from served import Turns, preload_blas

prompts, completions, prompt_length, completion_length = map(int, sys.argv[2:6])
options = set(sys.argv[6:])
if odd := options - {"--blas", "--no-checkpointing", "--no-cce", "--no-compile"}:
    sys.exit(f"there is no option {min(odd)}")
if "--blas" in options:
    preload_blas()
# Unsloth cannot be imported on Linux without its own switch, which disables torch and CUDA.
os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_ZOO_DISABLE_GPU_INIT="1", TOKENIZERS_PARALLELISM="false")

import mlx.core as mx  # noqa: E402  after the BLAS
import unsloth_zoo.mlx.generate as generation  # noqa: E402
import unsloth_zoo.mlx.grpo as grpo  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
from unsloth_zoo.mlx.loader import FastMLXModel  # noqa: E402
from unsloth_zoo.mlx.trainer import MLXGRPOConfig, MLXGRPOTrainer  # noqa: E402


def copied_model(source: Path, folder: Path) -> int:
    """Copy the model with a tokenizer of one word per token, whose end token has no logit, so that no completion stops
    early. Returns the size of the vocabulary."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    vocabulary = config["vocab_size"]
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": vocabulary, "pad_token_id": 0}))
    for weights in source.glob("*.safetensors"):
        (folder / weights.name).symlink_to(weights.resolve())
    words = {**{f"w{i}": i for i in range(vocabulary)}, "<end>": vocabulary}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="w0", unk_token="w0")
    fast.save_pretrained(str(folder))
    return vocabulary


def parity(prompts, completions, completion_ids, **_):  # noqa: ARG001  the signature is TRL's
    """The reward of grpo's side: the number of even token ids."""
    return [float(sum(i % 2 == 0 for i in ids)) for ids in completion_ids]


rows, longest = prompts * completions, prompt_length + completion_length + 8
turns = Turns(rows * completion_length)
generate_rows, generate_step = generation.generate_batch, grpo.GRPOBatchPlan._generate


def timed_rows(*given, **named):
    results = generate_rows(*given, **named)
    turns.sampled(sum(len(result.token_ids) for result in results))
    return results


def timed_step(self, visit):
    turns.begin()
    made = generate_step(self, visit)
    turns.scored()
    return made


generation.generate_batch, grpo.GRPOBatchPlan._generate = timed_rows, timed_step
checkpointing = "--no-checkpointing" not in options
with contextlib.redirect_stdout(io.StringIO()):
    folder = Path("unsloth").absolute()
    vocabulary = copied_model(Path(sys.argv[1]), folder)
    draw = random.Random(0)
    dataset = [
        {"prompt": " ".join(f"w{draw.randrange(10, vocabulary)}" for _ in range(prompt_length))}
        for _ in range(max(64, prompts))
    ]
    gpu = mx.default_device().type == mx.DeviceType.gpu
    model, tokenizer = FastMLXModel.from_pretrained(
        str(folder),
        max_seq_length=longest,
        dtype="bfloat16" if gpu else "float32",
        load_in_4bit=False,
        load_in_16bit=True,
        text_only=True,
    )
    model = FastMLXModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth" if checkpointing else False,
    )
    config = MLXGRPOConfig(
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_generations=completions,
        max_completion_length=completion_length,
        max_seq_length=longest,
        beta=0.0,
        temperature=1.0,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=100_000,
        logging_steps=1,
        save_steps=0,
        output_dir="out",
        gradient_checkpointing=checkpointing,
        compile="--no-compile" not in options,
        use_cce="--no-cce" not in options,
    )
    MLXGRPOTrainer(model, tokenizer, dataset, args=config, reward_funcs=[parity]).train()
