"""What a user does with the Hub, against the stand-in: the commands that they run, and what they see."""

import json
from pathlib import Path

from hub.server import Hub

RECIPE = Path(__file__).parents[2] / "recipes/qwen3-math.yaml"
SMALL = (
    *("optim.steps=1", "optim.warmup_steps=0", "rollout.prompts_per_step=2", "rollout.num_generations=2"),
    *("rollout.max_completion_length=8", "eval.prompts=2", "eval.samples=1"),
)
"""The recipe as it is, but small."""


def test_a_recipe_trains_from_the_hub_and_then_from_the_cache(hub: Hub) -> None:
    first = hub.grpo("train", RECIPE, *SMALL)
    assert first.returncode == 0, first.stderr
    assert "Qwen/Qwen3-0.6B on openai/gsm8k" in first.stdout
    assert "eval at step 1" in first.stdout
    run = hub.home.parent / "runs/qwen3-math"
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 1
    assert {request.status for request in hub.asked("GET /cdn/")} == {200}

    hub.requests.clear()
    again = hub.grpo("train", RECIPE, *SMALL, "output_dir=again")
    assert again.returncode == 0, again.stderr
    assert not hub.asked("GET .*(/cdn/|/resolve/)"), "it was there already"
