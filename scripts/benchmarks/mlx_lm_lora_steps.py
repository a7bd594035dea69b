"""mlx-lm-lora's GRPO steps, timed, for `grpo bench train --peer-python`. Runs in an environment of its own.

usage: mlx_lm_lora_steps.py MODEL DATA STEPS PROMPTS COMPLETIONS PROMPT_LENGTH COMPLETION_LENGTH [--blas]

Through its own entry point, with its defaults but for what must be the same on both sides: LoRA of rank 16 on every
layer, AdamW, temperature 1, no penalty. Prints one line of JSON: seconds a step, of which rollout, and peak GB; the
first half of the steps warms up.
"""

import contextlib
import ctypes
import glob
import io
import json
import os
import random
import statistics
import sys
import time

arguments = [argument for argument in sys.argv[1:] if argument != "--blas"]
model, data = arguments[:2]
steps, prompts, completions, prompt_length, completion_length = map(int, arguments[2:])
if "--blas" in sys.argv:
    for library in glob.glob(f"{sys.prefix}/lib/libmkl_rt.so*")[:1]:
        os.environ.setdefault("KMP_BLOCKTIME", "1")
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
os.environ["HF_HUB_OFFLINE"] = "1"

import mlx.core as mx  # noqa: E402  after the BLAS
import mlx_lm_lora.train as cli  # noqa: E402
import mlx_lm_lora.trainer.grpo_trainer as trainer  # noqa: E402
from mlx_lm_lora.trainer.grpo_reward_functions import register_reward_function  # noqa: E402


@register_reward_function("bench_digits")
def bench_digits(prompts, completions, answer, types=None):  # noqa: ARG001  its signature
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


starts, rollouts, tokens = [], [], []
generate = trainer.generate_grpo
draw = random.Random(0)


def timed(**given):
    started = time.perf_counter()
    starts.append(started)
    rows = given["prompt_tokens"]
    rows[:] = [[draw.randrange(10, 300) for _ in range(prompt_length)] for _ in rows]  # the length that is asked for
    given["tokenizer"].eos_token_ids = {10**9}  # nothing stops: every completion has its full length
    made = generate(**{**given, "end_token": ""})
    mx.eval(made[0])
    rollouts.append(time.perf_counter() - started)
    tokens.append(sum(completion.size for completion in made[0]))
    return made


trainer.generate_grpo = timed
cli.save_pretrained_merged = lambda **_: None
with open("lora.yaml", "w") as file:
    json.dump({"lora_parameters": {"rank": 16, "scale": 2.0, "dropout": 0.0}}, file)
sys.argv = f"""x --model {model} --data {data} --train --train-mode grpo --train-type lora --num-layers -1 -c lora.yaml
 --batch-size {prompts} --group-size {completions} --max-completion-length {completion_length} --iters {steps}
 --steps-per-report 1 --steps-per-eval 1000000 --val-batches 1 --save-every 1000000 --learning-rate 1e-5
 --optimizer adamw --temperature 1.0 --beta 0.0 --max-seq-length 4096 --seed 0
 --reward-functions bench_digits --adapter-path adapter""".split()
with contextlib.redirect_stdout(io.StringIO()):
    cli.main()
ends = [*starts[1:], time.perf_counter()]
warm = steps // 2
whole = [end - start for start, end in zip(starts, ends, strict=True)][warm:-1]
measured = {
    "s": statistics.fmean(whole),
    "s rollout": statistics.fmean(rollouts[warm:-1]),
    "GB": mx.get_peak_memory() / 1e9,
}
expected = prompts * completions * completion_length
if min(tokens) < expected:
    sys.exit(f"completions ended early: {min(tokens)} of {expected} tokens")
print(json.dumps(measured))
