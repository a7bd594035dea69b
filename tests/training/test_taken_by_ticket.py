"""Runs of two processes that take prompts as they become free: they are runs of one process, whoever takes which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs.driver import run
from test_divided_runs import check_alike
from test_ranks import LAUNCH, launch

pytestmark = pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed beside this Python")

TAKES = """
import json, os
from grpo.backend.ranks import Ranks
from grpo.backend.tickets import Deal
ticket, merge, greedy = Deal._ticket, Deal.merge, int(os.environ.get("GREEDY", -1))
def taken(self, wait):
    if greedy not in (-1, self._ranks.rank):
        self._left = False
        return None
    return ticket(self, wait)
def merged(self, mine):
    with open(f"taken-{Ranks.launched().everyone.rank}", "a") as file:
        print(json.dumps(self.taken), file=file)
    return merge(self, mine)
Deal._ticket, Deal.merge = taken, merged
from grpo.cli import main; main()
"""
SIZES = "rollout={prompts_per_step: 6, num_generations: 4, max_completion_length: 24, max_concurrency: 4}"
MORE = (
    SIZES,
    "optim.steps=2",
    "eval={split: train, every: 2, prompts: 4, samples: 2}",
    "checkpoint.every=1",
    "loss.beta=0.05",
)


def taken(rank: int) -> list[list[int]]:
    return [json.loads(line) for line in Path(f"taken-{rank}").read_text().splitlines()]


@pytest.mark.slow
def test_one_process_may_take_all_that_is_left(recipe: Path) -> None:
    ran = launch(2, "-c", TAKES, "train", recipe, *MORE, "output_dir=runs/two", GREEDY="1")
    assert "finished after step 2" in ran.stdout, ran.stdout + ran.stderr
    said = "sampling: each of 2 processes starts with 1 prompt, as many as its 4 slots hold, and takes"
    assert said in ran.stdout
    rollouts = taken(0), taken(1)
    assert [one for one in rollouts[1] if len(one) > 2] == [[1, 2, 3, 4, 5]] * 2
    assert [0] in rollouts[0]
    run(recipe, *MORE, "output_dir=runs/one")
    check_alike(Path("runs/one"), Path("runs/two"), range(1, 3))


@pytest.mark.slow
def test_the_other_may_too_or_both(recipe: Path) -> None:
    """With prompts that are sampled again because their rewards were equal, and older ones in their place."""
    Path("rare.py").write_text(
        "def reward(completions, **columns):\n"
        "    return [float(sum(map(ord, text)) % 9 == 0) for text in completions]\n"
    )
    settings = [*MORE, "rollout.dynamic_sampling=2", "rollout.reuse=1", "rewards=[{use: 'rare.py:reward'}]"]
    run(recipe, *settings, "output_dir=runs/one")
    for name, greedy in (("first", "0"), ("both", "-1")):
        ran = launch(2, "-c", TAKES, "train", recipe, *settings, f"output_dir=runs/{name}", GREEDY=greedy)
        assert "finished after step 2" in ran.stdout, ran.stdout + ran.stderr
        check_alike(Path("runs/one"), Path(f"runs/{name}"), range(1, 3))
    assert [0, 2, 3, 4, 5] in taken(0)


@pytest.mark.slow
def test_a_run_that_is_gone_on_with_draws_the_same(recipe: Path) -> None:
    ran = launch(2, "-c", TAKES, "train", recipe, *MORE, "output_dir=runs/two", "optim.steps=4")
    assert "finished after step 4" in ran.stdout, ran.stdout + ran.stderr
    at = "runs/two/checkpoints/step-000002"
    ran = launch(
        2, "-c", TAKES, "train", recipe, *MORE, "output_dir=runs/on", "optim.steps=4", "--resume-from", at, GREEDY="0"
    )
    assert "finished after step 4" in ran.stdout, ran.stdout + ran.stderr
    check_alike(Path("runs/two"), Path("runs/on"), range(3, 5))


@pytest.mark.slow
def test_conversations_of_different_lengths_are_those_of_one_process(recipe: Path) -> None:
    """Their environments live where the prompt was taken, and so do the rewards that look at these."""
    Path("talk.py").write_text(
        "from grpo.step import Step\n"
        "class Asks:\n"
        "    def reset(self, answer, **row):\n"
        "        self.left = 1 if int(answer) < 6 else 4\n"
        "    def step(self, text):\n"
        "        self.left -= 1\n"
        "        return Step('Go on.', reward=len(text) % 3, done=self.left == 0)\n"
        "def reward(completions, environments, **columns):\n"
        "    return [one.left / 8 for one in environments]\n"
    )
    talks = ["environment={use: 'talk.py:Asks', workers: 2}", "rewards=[{use: 'talk.py:reward'}]"]
    longer = "rollout.max_completion_length=96"
    settings = [*MORE, *talks, longer, "data.max_prompt_length=64"]
    run(recipe, *settings, "output_dir=runs/one")
    for name, greedy in (("second", "1"), ("both", "-1")):
        ran = launch(2, "-c", TAKES, "train", recipe, *settings, f"output_dir=runs/{name}", GREEDY=greedy, timeout=400)
        assert "finished after step 2" in ran.stdout, ran.stdout + ran.stderr
        check_alike(Path("runs/one"), Path(f"runs/{name}"), range(1, 3))


@pytest.mark.slow
def test_processes_that_hold_a_model_together_take_the_same_tickets(recipe: Path) -> None:
    """Two groups of two."""
    settings = [*MORE, "optim.steps=1", "rollout.speculate=off"]
    run(recipe, *settings, "output_dir=runs/one")
    begin = TAKES.replace("import json, os", "import json, os, standin_groups\nstandin_groups.install()")
    divided = "model.shard=tensor", "model.shard_size=2", "output_dir=runs/four"
    ran = launch(4, "-c", begin, "train", recipe, *settings, *divided, timeout=400)
    assert "finished after step 1" in ran.stdout, ran.stdout + ran.stderr
    check_alike(Path("runs/one"), Path("runs/four"), range(1, 2))
    assert taken(0) == taken(1)
    assert taken(2) == taken(3)
    assert len(taken(0)[-1]) < 6
