"""Reward models as rewards: what they read, what they answer where they cannot, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from model.classifiers import reward_model, score, weights_of

import grpo
from grpo.config import RewardConfig
from grpo.errors import UserError
from grpo.plugins import find_reward, locate_reward, source_file
from grpo.recipes import with_settings
from grpo.scoring.modeled import Modeled
from grpo.scoring.scorer import Scorer
from grpo.types import Conversation, Group, Rollout, Task, Trajectory


@pytest.fixture
def judge_folder(tmp_path: Path, toy_folder: Path) -> Path:
    return reward_model(tmp_path / "judge", toy_folder)


def config(folder: Path, **settings: object) -> RewardConfig:
    return with_settings(RewardConfig(use=f"model:{folder}"), settings)


def group(*texts: str, prompt: str = "What is 1+1?", **columns: object) -> Group:
    task = Task(0, prompt, (5, 6), columns, "data")
    return Group(task, tuple(Rollout(Trajectory.sampled((7, 8), None, text, "length")) for text in texts))


def expected(grader: Modeled, folder: Path, messages: list[dict]) -> float:
    """What transformers would make of these messages."""
    described = json.loads((folder / "config.json").read_text())
    ids = grader.model.tokenizer.apply_chat_template(messages)
    return score(described, weights_of(described), ids)


def test_prompt_and_completion_are_read_whole_in_the_model_s_own_template(judge_folder: Path) -> None:
    """Text prompts as a user's message after the system's, messages as they are; a completion cut off or empty too."""
    scorer = Scorer.of([config(judge_folder)], system="Be brief.")
    (grader,) = scorer.rewards.values()
    said = [("user", "Hi"), ("assistant", "Yes?"), ("user", "2")]
    chat = [{"role": role, "content": text} for role, text in said]
    groups = [group("It is 2.", "It is", ""), group("two", prompt=chat)]
    system = {"role": "system", "content": "Be brief."}
    asked = {"role": "user", "content": "What is 1+1?"}
    whole = [[system, asked, {"role": "assistant", "content": text}] for text in ("It is 2.", "It is", "")]
    whole.append([*chat, {"role": "assistant", "content": "two"}])
    scored = [rollout for one in scorer.score(groups) for rollout in one.rollouts]
    assert [rollout.scores["judge"] for rollout in scored] == pytest.approx(
        [expected(grader, judge_folder, messages) for messages in whole], abs=1e-4
    )
    assert len({round(rollout.scores["judge"], 3) for rollout in scored}) == 4
    assert scorer.failures == {"judge": 0}


def test_a_token_that_begins_texts_is_the_template_s_business(judge_folder: Path) -> None:
    """A tokenizer that puts one before every text would put a second one before a template's."""
    scorer = Scorer.of([config(judge_folder)])
    (before,) = scorer.score([group("It is 2.")])
    file = judge_folder / "tokenizer.json"
    tokens = json.loads(file.read_text())
    name = tokens["added_tokens"][0]["content"]
    begins = {"SpecialToken": {"id": name, "type_id": 0}}
    tokens["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begins, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begins, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [tokens["added_tokens"][0]["id"]], "tokens": [name]}},
    }
    file.write_text(json.dumps(tokens))
    begun = Scorer.of([config(judge_folder)])
    (grader,) = begun.rewards.values()
    tokenizer = grader.model.tokenizer
    assert len(tokenizer.encode("2")) == len(tokenizer.encode("2", add_special_tokens=False)) + 1
    (after,) = begun.score([group("It is 2.")])
    assert after.rollouts[0].scores == before.rollouts[0].scores


def test_of_a_conversation_all_turns_are_read(judge_folder: Path) -> None:
    turns = (
        {"role": "assistant", "content": "Let me look."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "2"},
    )
    talk = Conversation("talk", ({"role": "user", "content": "What is 1+1?"},), turns)
    trajectory = Trajectory((7, 8), (1, 1), {}, "2", "stop", conversation=talk)
    scorer = Scorer.of([config(judge_folder, name="other")])
    (grader,) = scorer.rewards.values()
    (scored,) = scorer.score([Group(Task(0, "What is 1+1?", (5,), {}, "data"), (Rollout(trajectory),))])
    whole = [*talk.prompt, *turns]
    assert scored.rollouts[0].scores["other"] == pytest.approx(expected(grader, judge_folder, whole), abs=1e-4)


def test_what_is_too_long_or_refused_fails_alone(judge_folder: Path) -> None:
    template = judge_folder / "tokenizer_config.json"
    settings = json.loads(template.read_text())
    refusing = "{% if 'ugly' in messages[-1]['content'] %}{{ raise_exception('not this') }}{% endif %}"
    template.write_text(json.dumps({**settings, "chat_template": refusing + settings["chat_template"]}))
    scorer = Scorer.of([config(judge_folder, kwargs={"max_length": 40}, max_failure_rate=1.0)])
    (scored,) = scorer.score([group("fine", "9" * 60, "ugly", "2")])
    values = [rollout.scores["judge"] for rollout in scored.rollouts]
    assert [value is None for value in values] == [False, True, True, False]
    said = [str(rollout.failures.get("judge", "")) for rollout in scored.rollouts]
    assert (
        "tokens, but the reward model reads at most 40 (kwargs.max_length, or the model's number of positions)"
        in said[1]
    )
    assert "the reward model's chat template raised an error on this conversation: not this" in said[2]
    positions = Scorer.of([config(judge_folder, max_failure_rate=1.0)])
    (scored,) = positions.score([group("9" * 600)])
    assert "the reward model reads at most 512" in str(scored.rollouts[0].failures["judge"])


def test_a_sigmoid_makes_probabilities(judge_folder: Path) -> None:
    plain, squeezed = (
        Scorer.of([config(judge_folder, kwargs={"sigmoid": on, "batch_tokens": 50})]) for on in (False, True)
    )
    texts = ("It is 2.", "3", "I do not know at all, my friend")
    (before,), (after,) = plain.score([group(*texts)]), squeezed.score([group(*texts)])
    for a, b in zip(before.rollouts, after.rollouts, strict=True):
        assert b.scores["judge"] == pytest.approx(1 / (1 + math.exp(-a.scores["judge"])), abs=1e-6)


def test_python_users_score_with_it(judge_folder: Path) -> None:
    (scored,) = grpo.score([group("It is 2.", "3")], [grpo.reward(f"model:{judge_folder}", weight=2.0, name="judge")])
    assert all(rollout.reward == pytest.approx(2 * rollout.scores["judge"]) for rollout in scored.rollouts)


def test_names(tmp_path: Path) -> None:
    assert locate_reward("model:org/Skywork-Reward").name == "Skywork-Reward"
    assert locate_reward(f"model:{tmp_path}/").name == tmp_path.name
    assert source_file("model:org/name") is None
    with pytest.raises(UserError, match="this is a model, not a function"):
        find_reward("model:org/name")


def test_two_of_one_name_are_refused(judge_folder: Path) -> None:
    with pytest.raises(UserError, match=r"two rewards have the name 'judge'.*name: \.\.\."):
        Scorer.of([config(judge_folder), config(judge_folder)])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"timeout": 3.0}, "timeout does nothing for a reward model"),
        ({"isolation": "inline"}, "isolation does nothing for a reward model"),
        ({"calls": "group"}, "calls does nothing for a reward model"),
        ({"kwargs": {"max_lenght": 3}}, r"kwargs.max_lenght: there is no such argument. Did you mean 'max_length'\?"),
        ({"kwargs": {"foo": 3}}, "A reward model takes revision, dtype, quantize, max_length, batch_tokens, sigmoid"),
        ({"kwargs": {"batch_tokens": 0}}, "kwargs.batch_tokens: expected greater than 0, got 0"),
        (
            {"kwargs": {"dtype": "half"}},
            "kwargs.dtype: expected 'auto', 'float32', 'bfloat16' or 'float16', got",
        ),
    ],
)
def test_settings_that_do_nothing_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        with_settings(RewardConfig(use="model:org/name"), settings)


def test_a_model_that_is_none_is_refused_with_the_reward_s_name(tmp_path: Path, toy_folder: Path) -> None:
    with pytest.raises(UserError, match=r"^reward 'toy\d+': model .*: is a Qwen3ForCausalLM"):
        Scorer.of([config(toy_folder)])
    with pytest.raises(UserError, match=r"^reward 'nowhere': model .*/nowhere: there is no such folder"):
        Scorer.of([config(tmp_path / "nowhere")])
