"""The plan of a run with environments: how long prompts may get, what waiting completions keep, how many processes."""

import os
from pathlib import Path

import pytest

from grpo.recipes import load_recipe
from grpo.runs import partners
from grpo.runs.prepare import prepare

TALK = """
class Talk:
    def reset(self, **_):
        return " And 1+1?"

    def step(self, text):
        return None if len(text) > 3 else "more"


class Mute:
    def step(self, text):
        return None
"""


def test_the_plan_counts_longer_prompts_and_completions_that_wait(recipe: Path) -> None:
    (recipe.parent / "talk.py").write_text(TALK)
    runs = []
    for overrides in ([], ["environment.use=talk.py:Mute"], ["environment.use=talk.py:Talk"]):
        runs.append(prepare(load_recipe(recipe, ["data.max_prompt_length=100", "rollout.speculate=off", *overrides])))
        runs[-1].opened.close()
    lengths = [len(task.prompt_ids) for task in runs[0].tasks]
    assert [run.plan.tokens for run in runs] == [8 * (longest + 8) for longest in (max(lengths), max(lengths), 100)]
    _, mute, talk = (next(note for note in run.notes if note.startswith("prompts: at most")) for run in runs)
    assert talk == (
        f"{mute}; planned for data.max_prompt_length (100 tokens), because an environment's reset may lengthen them"
    )
    keys_and_values = 2 * 2 * 16 * 2 * 4  # two heads of 16, of each, in each of two layers, four bytes each
    own = [8, 8 + 100 - min(lengths)]
    assert [run.plan.waiting for run in runs] == [0, *(8 * tokens * keys_and_values for tokens in own)]
    for run in runs:
        beside = sum(run.plan.stays.values()) + run.plan.phases["rollout"] - run.plan.waiting
        beside += run.planner.load.need().wider(run.trainer.engine.generator.decoding, run.plan.slots, 8)
        assert run.trainer.engine.generator.kept_bytes == run.plan.kept_bytes == int(0.9 * run.plan.memory) - beside


@pytest.mark.parametrize(
    ("cores", "groups", "workers"), [(8, 3, 3), (2, 8, 8), (2, 12, 8), (16, 12, 12), (None, 1, 1), (4, 0, 1)]
)
def test_each_group_has_a_process_up_to_eight_or_as_many_as_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, groups: int, workers: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert partners.workers_for(groups) == workers
