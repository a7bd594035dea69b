"""Texts and chat messages: each reward gets the form that it reads, whatever the dataset has."""

from collections.abc import Sequence
from typing import Any, TypedDict

import pytest

from grpo.config import RewardConfig
from grpo.scoring.contract import Reward
from grpo.scoring.forms import Probe, declared_form, expects_messages
from grpo.scoring.scorer import Scorer
from grpo.types import Group, Rollout, Task, Trajectory


class Message(TypedDict):
    role: str
    content: str


class Called:
    def __call__(self, completions: list[list[Message]], **_):
        return [float(len(one[-1]["content"])) for one in completions]


def texts(completions: list[str], **_):
    return [float(len(text)) for text in completions]


def strings(completions: "Sequence[str]", **_):
    return texts(completions)


def messages(completions: list[list[dict[str, str]]], **_):
    return [float(len(one[0]["content"])) for one in completions]


def loose(completions: list[list], **_):
    return messages(completions)


def listed(completions: list[dict], **_):
    return messages(completions)


def undeclared(completions, **_):
    return texts(completions)


def undeclared_messages(completions, **_):
    return messages(completions)


def gets(completions, **_):
    return [float(len(one[0].get("content", ""))) for one in completions]


def either(completions: list[str | list[Message]], **_):
    return [float(len(one if isinstance(one, str) else one[0]["content"])) for one in completions]


def anything(completions: list[Any], **_):
    return either(completions)


def unknown(completions: "list[Unheard]", **_):  # noqa: F821
    return either(completions)


@pytest.mark.parametrize(
    ("function", "form"),
    [
        (texts, "text"),
        (strings, "text"),
        (messages, "messages"),
        (loose, "messages"),
        (listed, "messages"),
        (Called(), "messages"),
        (undeclared, None),
        (either, None),
        (anything, None),
        (unknown, None),
        (lambda completion_ids, **_: [], None),
        (max, None),
    ],
)
def test_what_an_annotation_says(function, form) -> None:
    assert declared_form(function, "completions") == form


TEXT = {"prompts": ["one?"] * 2, "completions": ["a", "bb"], "completion_ids": [[1]] * 2}
CHAT = {
    "prompts": [[{"role": "user", "content": "one?"}]] * 2,
    "completions": [[{"role": "assistant", "content": text}] for text in ("a", "bb")],
    "completion_ids": [[1]] * 2,
}


@pytest.mark.parametrize("columns", [TEXT, CHAT], ids=["text", "chat"])
@pytest.mark.parametrize(
    "function", [texts, strings, messages, loose, Called(), either, anything, unknown, undeclared_messages, gets]
)
def test_each_gets_the_form_that_it_reads(function, columns) -> None:
    assert Reward(function, {})(columns, {}).values == [1.0, 2.0]


def test_what_says_nothing_gets_what_the_dataset_has() -> None:
    seen = []
    reward = Reward(lambda prompts, completions, **_: seen.append((prompts, completions)) or [0.0, 0.0], {})
    for columns in (TEXT, CHAT):
        reward(columns, {})
        assert seen[-1] == (columns["prompts"], columns["completions"])


def test_the_recipe_has_the_last_word() -> None:
    seen = []
    keep = lambda prompts, completions, **_: seen.append((prompts, completions)) or [0.0, 0.0]  # noqa: E731
    Reward(keep, {}, "text")(CHAT, {})
    assert seen[-1] == (TEXT["prompts"], TEXT["completions"])
    Reward(keep, {}, "messages")(TEXT, {})
    assert seen[-1] == (CHAT["prompts"], CHAT["completions"])


def test_prompts_are_the_messages_that_the_model_was_given() -> None:
    seen = []
    reward = Reward(lambda prompts, **_: seen.extend(prompts) or [0.0, 0.0], {}, "messages", system="Be brief.")
    reward(TEXT, {})
    assert seen[0] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one?"}]
    reward(CHAT, {})
    assert seen[2] == CHAT["prompts"][0]  # a dataset's messages are whole as they are


def test_a_reward_that_was_found_to_read_messages_is_not_tried_on_texts_again() -> None:
    seen = []

    def mine(completions, log_metric, **_):
        seen.append(type(completions[0]))
        log_metric("calls", 1.0)
        return messages(completions)

    reward = Reward(mine, {})
    assert reward(TEXT, {}).metrics == {"calls": [1.0]}  # of the try that counted
    reward(TEXT, {})
    assert seen == [str, Probe, list, list]


def test_a_mistake_of_another_kind_is_told_as_it_is() -> None:
    """Text rewards that index a text by mistake fail on messages too: the first error says more."""
    calls = []

    def mine(completions, **_):
        calls.append(1)
        return [{"score": "1"}["score"]["value"] for _ in completions]

    answer = Reward(mine, {})(TEXT, {})
    assert "string indices must be integers" in answer.failures[0]
    assert "test_forms.py" in answer.failures[0]
    assert "contract.py" not in answer.failures[0]
    assert len(calls) == 2
    declared = Reward(lambda completions, **_: texts(completions[0]["content"]), {}, "text")
    assert "string indices must be integers" in declared(TEXT, {}).failures[0]
    for error in (TypeError("other"), KeyError("content"), AttributeError("'str' object has no attribute 'role'")):
        assert not expects_messages(error)


def test_a_mistake_that_only_looks_like_it_leaves_a_reward_for_texts() -> None:
    """On messages this one would never come to its mistake, and score everything 0."""

    def mine(completions, answer, **_):
        return [float(reply["x"]) if "b" in text else 0.0 for text, reply in zip(completions, answer, strict=True)]

    reward = Reward(mine, {})
    answer = reward(TEXT | {"answer": ["{}", "{}"]}, {})
    assert (answer.values, len(answer.failures)) == ([None, None], 2)
    assert "string indices must be integers" in answer.failures[0]
    assert reward(TEXT | {"answer": [{"x": 1}] * 2}, {}).values == [0.0, 1.0]


def test_what_has_answered_on_texts_is_called_once_when_it_fails_later() -> None:
    calls = []

    def mine(completions, **_):
        calls.append(completions)
        return [1.0, 2.0] if len(calls) == 1 else messages(completions)

    reward = Reward(mine, {})
    assert reward(TEXT, {}).values == [1.0, 2.0]
    assert "string indices" in reward(TEXT, {}).failures[0]
    assert calls == [TEXT["completions"]] * 2


def test_a_paid_one_is_not_called_again(monkeypatch) -> None:
    calls = []

    def mine(completions, **_):
        calls.append(1)
        return messages(completions)

    monkeypatch.setitem(globals(), "PAID", True)
    said = Reward(mine, {})(TEXT, {}).failures[0]
    assert (len(calls), "write completions: messages next to its `use`" in said) == (1, True)
    other = Reward(lambda **_: int("x"), {})(TEXT, {}).failures[0]
    assert "completions: messages" not in other.splitlines()[0]
    assert Reward(mine, {}, "messages")(TEXT, {}).values == [1.0, 2.0]


@pytest.mark.parametrize(
    "read",
    [
        lambda c: c[0]["content"],
        lambda c: c[-1].get("content"),
        lambda c: "".join(m["content"] for m in c),
        lambda c: next(iter(c))["content"],
    ],
)
def test_however_messages_are_read(read) -> None:
    assert Reward(lambda completions, **_: [float(len(read(c))) for c in completions], {})(TEXT, {}).values == [
        1.0,
        2.0,
    ]


def test_an_empty_completion_hides_neither_form() -> None:
    empty = TEXT | {"completions": ["", "bb"]}
    assert Reward(undeclared_messages, {})(empty, {}).values == [0.0, 2.0]
    begins = Reward(lambda completions, **_: [float(text[0] == "b") for text in completions], {})
    assert "IndexError" in begins(empty, {}).failures[0]
    assert begins(TEXT, {}).values == [0.0, 1.0]  # and so it stays one for texts


def template_groups() -> list[Group]:
    rollouts = tuple(Rollout(Trajectory.sampled((1, 2), None, text, "stop")) for text in ("a", "bb"))
    return [Group(Task(0, "one?", (7,), {"question": "one?"}), rollouts)]


@pytest.mark.parametrize("isolation", ["process", "inline"])
def test_in_a_recipe(tmp_path, isolation: str) -> None:
    (tmp_path / "mine.py").write_text(
        "def plain(completions, **_):\n    return [float(len(c[0]['content'])) for c in completions]\n"
        "def declared(prompts, completions: list[list[dict]], **_):\n"
        "    assert prompts[0] == [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'one?'}]\n"
        "    return plain(completions)\n"
        "def swallowing(completions, **_):\n"
        "    try:\n        return plain(completions)\n    except Exception:\n        return [0.0] * len(completions)\n"
    )
    settings = {"plain": {}, "declared": {}, "swallowing": {"completions": "messages"}}
    configs = [
        RewardConfig(use=f"{tmp_path}/mine.py:{name}", isolation=isolation, **more) for name, more in settings.items()
    ]
    scorer = Scorer.of(configs, system="Be brief.")
    try:
        (scored,) = scorer.score(template_groups())
    finally:
        scorer.close()
    assert [dict(rollout.scores) for rollout in scored.rollouts] == [
        dict.fromkeys(settings, 1.0),
        dict.fromkeys(settings, 2.0),
    ]


def test_a_run_with_a_reward_written_for_trl(run_cli, recipe, tmp_path) -> None:
    (tmp_path / "mine.py").write_text(
        "def correct(completions, answer, **kwargs):\n"
        "    responses = [completion[0]['content'] for completion in completions]\n"
        "    return [float(len(r) % 2) for r in responses]\n"
        "def asked(prompts, completions: list[list[dict]], **kwargs):\n"
        "    assert all(p[-1]['content'].startswith('What is') for p in prompts)\n"
        "    return [float(p[0]['content'] == 'Be brief.') for p in prompts]\n"
    )
    use = "rewards=[{use: 'mine.py:correct'}, {use: 'mine.py:asked'}]"
    ran = run_cli("train", recipe, use, "data.system=Be brief.", "optim.steps=1")
    assert ran.code == 0, ran.err
    assert "failed" not in ran.out + ran.err
    scored = run_cli("rewards", "score", "runs/toy", "--reward", "mine.py:asked")
    assert "0 of 8 completions get a different score; 0 failures" in scored.out, scored.out + scored.err
