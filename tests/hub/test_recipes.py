"""Every shipped recipe, with its models and datasets served under their names: each checks out, and each trains."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hub.server import Hub
from hub.shelves import DATASETS, write
from model.classifiers import reward_model

from grpo.builtin.shop import SHOP
from grpo.builtin.template import template
from grpo.config import Recipe
from grpo.plugins import bundled
from grpo.processes.sandbox.runner import missing
from grpo.recipes import load_recipe

RECIPES = {path.stem: load_recipe(path) for path in sorted(bundled("recipes").glob("*.yaml"))}
FROM_THE_HUB = [name for name, recipe in RECIPES.items() if not recipe.model.name.startswith("builtin:")]

SEVERAL = """
import json, sys
from grpo.cli import main
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv = ["grpo", "train", name, *arguments]
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    print(f"\\n{name} ended with {code}", flush=True)
"""
"""Several commands in one process, which imports the libraries once."""


@pytest.fixture
def whole_hub(hub: Hub, qwen3_folder: Path, tmp_path: Path) -> Hub:
    """The stand-in with a model, whose chat template knows tools, and a dataset for each recipe."""
    model = shutil.copytree(qwen3_folder, tmp_path / "shelves" / "with_tools")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template(SHOP)}))
    for recipe in RECIPES.values():
        hub.add_model(recipe.model.name, model)
        if recipe.teacher is not None and recipe.teacher.model is not None:
            hub.add_model(recipe.teacher.model.name, model)
        for grader in filter(None, (reward.model for reward in recipe.rewards)):
            hub.add_model(grader, reward_model(tmp_path / "shelves" / "graders" / grader, qwen3_folder))
    for name, splits in DATASETS.items():
        hub.add_dataset(name, write(splits, tmp_path / "shelves" / name))
    return hub


@pytest.fixture
def judge() -> Iterator[str]:
    """The address of a judge that gives every answer a 5."""

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"choices": [{"message": {"content": "Score: 5"}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def run(hub: Hub, commands: dict[str, list[str]], untrained: bool = False) -> str:
    """Run `grpo train NAME ARGUMENTS` for each; what they print. `untrained`: rewards may all be equal, and the run end
    with 1 for that."""
    ran = subprocess.run(
        [sys.executable, "-c", SEVERAL, json.dumps(commands)],
        env=hub.environment, cwd=hub.home.parent, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    others = [name for name in commands if f"{name} ended with 0" not in ran.stdout]
    assert len(others) == (ran.stderr.count("nothing was trained in 1 step:") if untrained else 0), (others, ran.stderr)
    return ran.stdout


def without_a_sandbox(name: str) -> list[str]:
    unsafe = {"code-tests": "rewards.0.kwargs.unsafe=true", "qwen3-python-math": "tools.0.kwargs.unsafe=true"}
    return [unsafe[name]] if name in unsafe and missing() is not None else []


@pytest.mark.slow
def test_every_recipe_checks_out_as_it_is(whole_hub: Hub) -> None:
    said = run(whole_hub, {name: ["--dry-run", *without_a_sandbox(name)] for name in FROM_THE_HUB})
    for name in FROM_THE_HUB:
        recipe = RECIPES[name]
        assert f"{recipe.model.name} on {recipe.data.label}" in said
        assert f"{recipe.optim.steps} steps of {recipe.rollout.prompts_per_step} prompts" in said
    assert not (whole_hub.home.parent / "runs").exists(), "nothing was to be written"


def test_costs_are_told_of_any_model_without_its_weights(hub: Hub, qwen3_folder: Path) -> None:
    hub.add_model("some/model", qwen3_folder)
    ran = hub.grpo("recipes", "costs", "qwen3-math", "model.name=some/model")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("H200 ")
    assert hub.asked("GET /some/model/resolve/main/config.json")
    assert not hub.asked("safetensors")


def small(recipe: Recipe) -> list[str]:
    """What makes a recipe one short step, and all of its sections take part."""
    optional = {
        "advantage.soft_overlong_cache=4": recipe.advantage.soft_overlong_cache is not None,
        "rollout.dynamic_sampling=1": recipe.rollout.dynamic_sampling > 0,
        "log.wandb=null": recipe.log.wandb is not None,
        **dict.fromkeys(["eval.prompts=2", "eval.samples=2"], recipe.eval is not None),
    }
    prompts = max(recipe.optim.num_minibatches, 4 * len(recipe.data.sources))  # of each source some
    lengths = ["rollout.num_generations=2", "rollout.max_completion_length=8"]
    steps = ["optim.steps=1", "optim.warmup_steps=0", f"rollout.prompts_per_step={prompts}"]
    return [*steps, *lengths, *(setting for setting, applies in optional.items() if applies)]


@pytest.mark.slow
def test_every_recipe_trains_a_small_step(whole_hub: Hub, judge: str) -> None:
    commands = {name: [*small(RECIPES[name]), *without_a_sandbox(name)] for name in FROM_THE_HUB}
    commands["llm-judge"] += [f"rewards.0.kwargs.base_url={judge}", "rewards.0.kwargs.cache=null"]
    run(whole_hub, commands, untrained=True)
    for name in FROM_THE_HUB:
        folder = whole_hub.home.parent / "runs" / name
        (step,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert step["step"] == 1
        rates = {key: value for key, value in step.items() if key.endswith("error_rate")}
        assert len(rates) >= len(RECIPES[name].rewards), name
        assert set(rates.values()) <= {0}, (name, rates)
        assert ("turns/mean" in step) is bool(RECIPES[name].conversations), name
        assert (folder / "checkpoints/step-000001/adapters.safetensors").is_file()


@pytest.mark.slow
def test_older_groups_come_again_in_the_recipe_that_replays_them(whole_hub: Hub) -> None:
    """With a reward that few completions get; those of the recipe's own are all 0 here."""
    (whole_hub.home.parent / "rare.py").write_text(
        "def reward(completions, **columns):\n"
        "    return [float(sum(map(ord, text)) % 9 == 0) for text in completions]\n"
    )
    lengths = ["rollout.num_generations=4", "rollout.max_completion_length=8", "rollout.prompts_per_step=4"]
    several = ["optim.steps=5", "optim.warmup_steps=0", "log.wandb=null", "rewards=[{use: 'rare.py:reward'}]"]
    run(whole_hub, {"replay": [*lengths, *several]})
    metrics = whole_hub.home.parent / "runs" / "replay" / "metrics.jsonl"
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert max(step["reuse/groups"] for step in steps) > 0
    assert max(step["policy_lag/max"] for step in steps) <= 4


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_streamed_and_goes_on_where_it_was(whole_hub: Hub) -> None:
    settings = [*small(RECIPES["qwen3-math"]), "data.streaming=true", "data.window=5", "rollout.prompts_per_step=3"]
    said = run(whole_hub, {"qwen3-math": settings}, untrained=True)
    assert "because rows are streamed; they are shuffled in windows of 5" in said
    whole_hub.grpo("train", "qwen3-math", *settings, "optim.steps=3", "--resume-changed")  # ends with 1: all rewards 0
    folder = whole_hub.home.parent / "runs" / "qwen3-math"
    state = json.loads((folder / "checkpoints/step-000003/state.json").read_text())
    assert state["counts"]["tasks"]["window"] * 5 + state["counts"]["tasks"]["taken"] == 9
    assert any(name.startswith("data openai/gsm8k") for name in state["revisions"])
