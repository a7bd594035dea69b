"""Times GRPO steps of mlx-lm-lora, for `grpo bench train --peer-python`. Runs in a separate environment.

usage: mlx_lm_lora_steps.py MODEL PROMPTS COMPLETIONS PROMPT_LENGTH COMPLETION_LENGTH [--blas]

Uses mlx-lm-lora's entry point and defaults, except for settings that must be the same on both sides: LoRA of rank 16 on
every layer, AdamW, temperature 1, no penalty. Runs one step per line of input, and prints its figures as JSON.
"""

import contextlib
import io
import json
import os
import random
import sys
from pathlib import Path

from served import Turns, preload_blas

model = sys.argv[1]
prompts, completions, prompt_length, completion_length = map(int, sys.argv[2:6])
if "--blas" in sys.argv:
    preload_blas()
os.environ["HF_HUB_OFFLINE"] = "1"

import mlx.core as mx  # noqa: E402  after the BLAS
import mlx_lm_lora.train as cli  # noqa: E402
import mlx_lm_lora.trainer.grpo_trainer as trainer  # noqa: E402
from mlx_lm_lora.trainer.grpo_reward_functions import register_reward_function  # noqa: E402


@register_reward_function("bench_digits")
def bench_digits(prompts, completions, answer, types=None):  # noqa: ARG001  the signature is mlx-lm-lora's
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


turns = Turns(prompts * completions * completion_length)
generate = trainer.generate_grpo
draw = random.Random(0)


def timed(**given):
    turns.begin()
    rows = given["prompt_tokens"]
    rows[:] = [[draw.randrange(10, 300) for _ in range(prompt_length)] for _ in rows]  # the requested length
    given["tokenizer"].eos_token_ids = {10**9}  # nothing stops: every completion has its full length
    made = generate(**{**given, "end_token": ""})
    mx.eval(made[0])
    turns.sampled(sum(completion.size for completion in made[0]))
    return made


trainer.generate_grpo = timed
cli.save_pretrained_merged = lambda **_: None
Path("lora.yaml").write_text(json.dumps({"lora_parameters": {"rank": 16, "scale": 2.0, "dropout": 0.0}}))
row = json.dumps({"prompt": "?", "answer": "1", "system": "?"})  # `timed` replaces its tokens
Path("data").mkdir()
Path("data/train.jsonl").write_text(f"{row}\n" * max(64, prompts))
sys.argv = f"""x --model {model} --data data --train --train-mode grpo --train-type lora --num-layers -1 -c lora.yaml
 --batch-size {prompts} --group-size {completions} --max-completion-length {completion_length} --iters 1000000
 --steps-per-report 1 --steps-per-eval 10000000 --val-batches 1 --save-every 10000000 --learning-rate 1e-5
 --optimizer adamw --temperature 1.0 --beta 0.0 --max-seq-length 4096 --seed 0
 --reward-functions bench_digits --adapter-path adapter""".split()
with contextlib.redirect_stdout(io.StringIO()):
    cli.main()
