"""A whole run in conversations: rewards of turns, `get_reward`, a function that takes `environments`, metrics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean, stdev

import pytest
from runs.driver import timeless

from grpo.runs.completions import read_completions, stored_steps
from grpo.types import Group

TEMPLATE = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
ROOM = """
class Step:
    def __init__(self, result, reward, done):
        self.result, self.reward, self.done = result, reward, done

class Room:
    def reset(self, **row):
        self.told, self.mark = [], row["answer"]
    def step(self, text):
        self.told.append(len(text))
        return Step("go on", float(len(text) % 4), len(self.told) == 3)
    def get_reward(self):
        return 10.0 * len(self.told)
"""
SEEN = '''
def reward(completions, environments, answer, log_metric, **_):
    """How much an environment was told; it is wrong where it is another completion's."""
    for messages, room, own in zip(completions, environments, answer):
        said = [len(m["content"]) for m in messages if m["role"] == "assistant"]
        assert room.told == said[: len(room.told)] and room.mark == own, (room.told, said)
    log_metric("mine/rooms", len(environments))
    return [float(sum(room.told)) for room in environments]
'''


@pytest.fixture
def talking(recipe: Path, toy_folder: Path) -> Path:
    shutil.copytree(toy_folder, "talker")
    config = json.loads(Path("talker/tokenizer_config.json").read_text())
    Path("talker/tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    Path("room.py").write_text(ROOM)
    Path("seen.py").write_text(SEEN)
    text = recipe.read_text().replace(str(toy_folder), "talker")
    text = text.replace("max_completion_length: 8", "max_completion_length: 96")
    text = text.replace("digits.py:reward", "seen.py")
    recipe.write_text(text + 'environment: {use: "room.py:Room", weight: 0.5, workers: 1, max_turns: 3}\n')
    return recipe


def all_rows(folder: str) -> list:
    read = [read_completions(path)[1] for path in stored_steps(Path(folder) / "completions")]
    return [(group, rollout) for groups in read for group in groups for rollout in group.rollouts]


def learnt(folder: Path) -> list[dict]:
    """A run's metrics without the clock's, and without differences of logprobs: which rows decode together, and so how
    their logprobs are rounded, depends on how fast environments answer."""
    records = timeless(folder / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name[:9] != "sampling/"} for record in records]


def by_turns(group: Group) -> list[list[float]]:
    """Advantages of turns from stored scores, by loops: weight 0.5 of the room's, and 1 of what was seen."""
    rewards = []
    for rollout in group.rollouts:
        own = [None if r is None else 0.5 * r for r in rollout.trajectory.conversation.turn_rewards]
        own[-1] = (own[-1] or 0.0) + 0.5 * rollout.trajectory.conversation.outcome + rollout.scores["seen"]
        rewards.append(own)
    known = [reward for own in rewards for reward in own if reward is not None]
    mean, deviation = fmean(known), stdev(known) + 1e-4
    normal = [[0.0 if r is None else (r - mean) / deviation for r in own] for own in rewards]
    return [[sum(own[turn:]) for turn in range(len(own))] for own in normal]


@pytest.mark.slow
def test_a_run_with_rewards_of_turns_and_of_environments(talking: Path, run_cli) -> None:
    """Everything at once, on real processes; a run that goes on from its first step is the same."""
    ran = run_cli("train", talking, "advantage.turns=turn", "output_dir=whole")
    assert ran.code == 0, ran.err
    rows = all_rows("whole")
    assert len(rows) == 16
    for _, rollout in rows:
        conversation = rollout.trajectory.conversation
        given = [reward for reward in conversation.turn_rewards if reward is not None]
        assert rollout.scores["Room"] == sum(given) + conversation.outcome
        assert conversation.outcome == 10 * len(given)
        assert rollout.reward == pytest.approx(rollout.scores["seen"] + 0.5 * rollout.scores["Room"])
        assert len(rollout.turn_advantages) == rollout.trajectory.turns == len(conversation.turn_rewards)
    assert any(len(set(rollout.turn_advantages)) > 1 for _, rollout in rows)
    for group in (rows[at][0] for at in range(0, 16, 4)):
        for rollout, expected in zip(group.rollouts, by_turns(group), strict=True):
            assert rollout.turn_advantages == pytest.approx(expected, abs=1e-4)
    told = learnt(Path("whole"))
    assert [record["mine/rooms"] for record in told] == [4.0, 4.0]
    assert all(record["rewards/seen/failures"] == record["rewards/Room/failures"] == 0 for record in told)
    run_cli("train", talking, "advantage.turns=turn", "output_dir=parts", "checkpoint.every=1")
    shutil.rmtree("parts/checkpoints/step-000002")
    again = run_cli("train", talking, "advantage.turns=turn", "output_dir=parts", "checkpoint.every=1", "--resume")
    assert again.code == 0, again.err
    assert learnt(Path("parts")) == told
    assert [rollout.turn_advantages for _, rollout in all_rows("parts")] == [r.turn_advantages for _, r in rows]


@pytest.mark.slow
def test_without_reward_functions_the_environment_grades(talking: Path, run_cli) -> None:
    """In training, in its evaluations, for the best checkpoint, and by `grpo eval`."""
    text = "\n".join(line for line in talking.read_text().splitlines() if not line.startswith("rewards:"))
    talking.write_text(text + "\neval: {split: train, samples: 2, every: 2, prompts: 2}\n")
    ran = run_cli("train", talking, "checkpoint.metric_for_best_model=rewards/Room")
    assert ran.code == 0, ran.err
    first, *_ = [json.loads(line) for line in Path("runs/toy/eval.jsonl").read_text().splitlines()]
    assert first["grader"] == "Room"
    assert "rewards/Room" in first
    measured = run_cli("eval", "runs/toy")
    assert measured.code == 0, measured.err
    assert "Room" in measured.out
