"""The judge: the model of the run, as it was at the start, is asked about each completion."""

from __future__ import annotations

import mlx.core as mx
import pytest
from conftest import shaken

import grpo
from grpo.config import JudgeConfig, ModelConfig, RewardConfig
from grpo.errors import UserError
from grpo.model.load import load
from grpo.plugins import find_reward, locate_reward, source_file
from grpo.recipes import with_settings
from grpo.scoring.judge import Judged
from grpo.scoring.scorer import Scorer
from grpo.types import Group, Rollout, Task, Trajectory

ASKED = "{prompt} {completion}?"
LABELS = {"7": 1.0, "8": 0.0, "9": -2.0}


def config(**kwargs: object) -> RewardConfig:
    given = {"prompt": ASKED, "labels": LABELS, **kwargs}
    return with_settings(RewardConfig(use="judge"), {"kwargs": given, "max_failure_rate": 1.0})


def group(*texts: str, **columns: object) -> Group:
    task = Task(0, "What is 1+1?", (5, 6), columns, "data")
    return Group(task, tuple(Rollout(Trajectory.sampled((7, 8), None, text, "stop")) for text in texts))


def by_hand(toy_folder, asked: str) -> tuple[float, float]:
    """The score by the base model's logits after this question, and the probability of all labels together."""
    model, tokenizer = load(ModelConfig(name=str(toy_folder)))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
    probabilities = mx.softmax(model(mx.array([ids]))[0, -1].astype(mx.float32))
    first = [tokenizer.encode(label, add_special_tokens=False)[0] for label in LABELS]
    masses = [probabilities[token].item() for token in first]
    worth = sum(mass * value for mass, value in zip(masses, LABELS.values(), strict=True))
    return worth / sum(masses), sum(masses)


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_the_score_is_the_mean_of_labels_by_the_model_of_the_start(make_policy, toy_folder, batch_tokens: int) -> None:
    """Whatever becomes of the policy: it is another by then, and is the policy again afterwards."""
    toy = make_policy(trained=False)
    scorer = Scorer.of([config(batch_tokens=batch_tokens)])
    scorer.judges[0].bind(toy.policy, toy.tokenizer)
    moved = {path: 5 * array for path, array in shaken(toy.policy.adapters.state()).items()}
    toy.policy.adapters.load_state(moved)
    texts = ("It is 2.", "3", "")
    scorer.begin(1)
    (scored,) = scorer.score([group(*texts)])
    expected = [by_hand(toy_folder, f"What is 1+1? {text}?") for text in texts]
    scores = [rollout.scores["judge"] for rollout in scored.rollouts]
    assert scores == pytest.approx([score for score, _ in expected], abs=1e-5)
    assert len(set(scores)) == 3
    assert scorer.metrics()["judge/label_mass"] == pytest.approx(sum(mass for _, mass in expected) / 3, abs=1e-6)
    assert toy.policy.adapters.active == "policy"
    assert all(mx.array_equal(array, moved[path]) for path, array in toy.policy.adapters.state().items())
    by_policy = toy.policy.next_logits(mx.array([[5, 6, 7]]), mx.array([2]))
    with toy.policy.use("judge"):
        assert not mx.allclose(by_policy, toy.policy.next_logits(mx.array([[5, 6, 7]]), mx.array([2])), atol=1e-3)


def test_columns_are_asked_about_and_null_is_no_question(make_policy, toy_folder) -> None:
    toy = make_policy(trained=False)
    scorer = Scorer.of([config(prompt="{prompt} {completion}? Right is {answer}")])
    scorer.judges[0].bind(toy.policy, toy.tokenizer)
    one, none = scorer.score([group("2", answer=4), group("2", answer=None)])
    expected, _ = by_hand(toy_folder, "What is 1+1? 2? Right is 4")
    assert one.rollouts[0].scores["judge"] == pytest.approx(expected, abs=1e-5)
    assert none.rollouts[0].scores["judge"] is None
    assert scorer.failures == {"judge": 0}
    scorer.check(["answer"])
    with pytest.raises(UserError, match=r"kwargs.prompt uses \{answer\}, but the dataset has no such column"):
        scorer.check(["gold"])


def test_what_is_too_long_fails_alone(make_policy) -> None:
    toy = make_policy(trained=False)
    scorer = Scorer.of([config(max_length=60)])
    scorer.judges[0].bind(toy.policy, toy.tokenizer)
    (scored,) = scorer.score([group("2", "9" * 80)])
    assert scored.rollouts[0].scores["judge"] is not None
    assert "tokens, but the judge reads at most 60" in str(scored.rollouts[1].failures["judge"])


def test_a_system_message_and_the_template_s_arguments_are_given(make_policy) -> None:
    toy = make_policy(trained=False)
    template = "{{ tone }}{% for message in messages %}{{ message.content }}{% endfor %}"
    toy.tokenizer._tokenizer.chat_template = template
    scores = set()
    for kwargs in ({}, {"system": "You are strict."}, {"chat_template_kwargs": {"tone": "Well, "}}):
        scorer = Scorer.of([config(**kwargs)])
        scorer.judges[0].bind(toy.policy, toy.tokenizer)
        (scored,) = scorer.score([group("2")])
        scores.add(round(scored.rollouts[0].scores["judge"], 5))
    assert len(scores) == 3


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"prompt": "{prompt}"}, r"kwargs.prompt does not contain \{completion\}"),
        ({"prompt": "{completion} {"}, "kwargs.prompt is not a valid template"),
        (
            {"prompt": "{completion} {0}"},
            r"kwargs.prompt may contain only plain names, \{like_this\}, and \{0\} is not a plain name",
        ),
        ({"labels": {"Yes": 1.0}}, "kwargs.labels: .*at least 2"),
        ({"labels": ["Yes", "No"]}, "kwargs.labels: expected keys and values, got"),
        ({"labels": {"Yes": "much", "No": 0}}, "kwargs.labels.Yes: expected a valid number"),
        ({"labels": {True: 1, False: 0}}, "labels has false: YAML reads Yes, No"),
        ({"label": {}}, "kwargs.label: there is no such argument. Did you mean 'labels'"),
        ({"temperature": 1}, "A judge takes prompt, system, labels"),
    ],
)
def test_settings_that_cannot_be(kwargs: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        with_settings(RewardConfig(use="judge"), {"kwargs": kwargs})
    with pytest.raises(UserError, match="timeout does nothing for the judge"):
        with_settings(RewardConfig(use="judge"), {"timeout": 3.0})


def test_labels_must_differ_where_they_are_read(make_policy) -> None:
    toy = make_policy(trained=False)
    for labels in ({"71": 1, "72": 0}, {"7": 1, "": 0}):
        (judge,) = Scorer.of([config(labels=labels)]).judges
        with pytest.raises(UserError, match="all labels must differ in their first token"):
            judge.bind(toy.policy, toy.tokenizer)


def test_its_metric_is_not_the_run_s_own() -> None:
    """Or each completion would fail, once the run is under way."""
    with pytest.raises(UserError, match=r"reward 'time': the judge logs the metric time/label_mass, .* another name"):
        Judged(RewardConfig(use="judge", name="time"))
    assert Judged(RewardConfig(use="judge", name="time_told")).judge.name == "time_told"


def test_outside_of_a_run_there_is_no_judge(run_cli) -> None:
    assert locate_reward("judge").name == "judge"
    assert source_file("judge") is None
    assert JudgeConfig().columns == ["prompt", "completion"]
    with pytest.raises(UserError, match="this is a model, not a function"):
        find_reward("judge")
    with pytest.raises(UserError, match="the judge is the model of a run"):
        grpo.score([group("2")], ["judge"])
    tried = run_cli("rewards", "test", "judge")
    assert (tried.code, "the judge is the model of a run" in tried.err) == (2, True), tried.err
