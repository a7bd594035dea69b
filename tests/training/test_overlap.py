"""A run whose groups are scored while others decode is the run whose groups are scored after all of them."""

import json
import sys
from pathlib import Path

import pytest
from runs.driver import run, same_end

from grpo.errors import RunError
from grpo.runs.completions import read_completions
from grpo.runs.folder import FAILED
from grpo.scoring.session import Scoring

REWARDS = '''
import os, sys
CALLS = "group"
def digits(completions, log_extra, log_metric, **columns):
    """Fails on some completions, and its process dies in some calls."""
    if sum(map(len, completions)) % 7 == 0:
        os._exit(1)
    log_extra("length", [len(text) for text in completions])
    log_metric("group_length", sum(map(len, completions)))
    return [float("nan") if len(text) % 5 == 0 else float(any(c.isdigit() for c in text)) for text in completions]
def each(completions, log_extra, log_metric, **columns):
    log_extra("length", [-len(text) for text in completions])
    log_metric("first", float(completions[0][:1].isdigit()))
    return [float(len(set(text))) if text else None for text in completions]
def whole(completions, **columns):
    longest = max(map(len, completions))
    return [len(text) / max(1, longest) for text in completions]
'''
SETTINGS = (
    "rewards=[{use: 'mine.py:digits', max_failure_rate: 1.0}, {use: 'mine.py:each', calls: completion, weight: 0}, "
    "{use: 'mine.py:whole', calls: step, weight: 0}, "
    "{use: 'mine.py:whole', name: inline, isolation: inline, weight: 0}]",
    "rollout={prompts_per_step: 3, num_generations: 4, max_completion_length: 12, dynamic_sampling: 1, "
    "max_concurrency: 5}",
    "eval={source: train.jsonl, split: train, every: 2, prompts: 3, samples: 2}",
    "optim.steps=3",
)


ADD = Scoring.add


@pytest.fixture
def early(monkeypatch):
    """The places of the groups that are given to a scoring while others decode, in the order of that."""
    places = []

    def noted(self, place, group) -> None:
        if not is_at_the_end():
            places.append(place)
        ADD(self, place, group)

    monkeypatch.setattr(Scoring, "add", noted)
    return places


def is_at_the_end() -> bool:
    return sys._getframe(2).f_code is Scoring.answers.__code__


def test_the_same_run_in_both_orders(recipe, early, monkeypatch) -> None:
    Path("mine.py").write_text(REWARDS)
    run(recipe, "output_dir=runs/early", *SETTINGS)
    assert early != sorted(early)
    monkeypatch.setattr(Scoring, "add", lambda *args: ADD(*args) if is_at_the_end() else None)
    run(recipe, "output_dir=runs/late", *SETTINGS)
    same_end(Path("runs/early"), Path("runs/late"))
    lines = [json.loads(line) for line in Path("runs/early/metrics.jsonl").read_text().splitlines()]
    evaluations = Path("runs/early/eval.jsonl").read_text().splitlines()
    assert len(early) == sum(line["num_prompts"] for line in lines) + len(evaluations) * 2 * 3  # greedy, and sampled
    assert lines[-1]["rewards/digits/failures"] > 0
    assert {"group_length", "first"} <= lines[0].keys()
    assert max(line["num_prompts"] for line in lines) > 3  # groups without variance were sampled anew


def test_a_broken_reward_tells_of_all_groups_as_ever(recipe, early) -> None:
    Path("mine.py").write_text(
        "CALLS = 'group'\ndef broken(completions, **columns):\n    raise ValueError('by hand')\n"
    )
    with pytest.raises(RunError, match="reward 'broken' failed on 8 of the last 8 completions"):
        run(recipe, "rewards=[{use: 'mine.py:broken'}]")
    assert sorted(early) == [0, 1]
    assert [len(group.rollouts) for group in read_completions(Path("runs/toy", FAILED))[1]] == [4, 4]
