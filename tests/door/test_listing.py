"""The shortest description of the door, run as it stands: a model and a dataset of the Hub, and the quickstart."""

import subprocess
import sys
from pathlib import Path

from door.students import PATCH
from hub.server import Hub

LISTING = """
import grpo
policy = grpo.load("Qwen/Qwen3-0.6B", rank=16)                    # model, tokenizer, adapter, generator
tasks  = grpo.tasks("openai/gsm8k", prompt="{question}", n=8)     # an iterator of lists
opt    = grpo.optimizer("adamw", learning_rate=1e-5)
for step in range(100):
    groups = policy.sample(next(tasks), n=8, max_tokens=512, key=step)
    groups = grpo.advantages(grpo.score(groups, [my_reward]), scale_rewards="group")
    for batch in grpo.batches(groups, loss=grpo.Loss("dapo")):
        ...                                                      # policy.gradient(batch, my_loss) and opt, or policy.update(batches, opt)
trainer = grpo.Trainer(grpo.recipe("quickstart", steps=20), rewards=[my_reward], callbacks=[my_callback])   # the same loop as the command, rewards and datasets as Python objects
trainer.train(); trainer.evaluate(); trainer.save("adapter")
"""  # noqa: E501
REST = """
def my_reward(completions, answer, **_):
    return [len(text) % 7 / 7 for text in completions]
def my_callback(record):
    print(type(record).__name__, record.step)
"""
AFTER = """
print(policy.gradient(batch, lambda current, batch, cfg: -batch.advantages * current).loss)
"""


def test_the_listing_runs(hub: Hub, tmp_path: Path) -> None:
    """Fewer and shorter steps than it says: what is shown here is that each line does what it says."""
    short = LISTING.replace("range(100)", "range(1)").replace("max_tokens=512", "max_tokens=6")
    short = short.replace("steps=20", "steps=2, max_completion_length=6, eval={'prompts': 4}")
    env = {**hub.environment, "GRPO_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    code = f"{PATCH}{REST}{short}{AFTER}"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "EvalMetrics 0\n" in ran.stdout
    assert "StepMetrics 2\n" in ran.stdout
    assert (tmp_path / "adapter" / "adapters.safetensors").is_file()
    assert (tmp_path / "runs" / "quickstart" / "metrics.jsonl").is_file()
