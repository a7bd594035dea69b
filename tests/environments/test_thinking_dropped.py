"""Conversations that go on as their template writes them, without earlier thinking, byte by byte."""

from __future__ import annotations

from itertools import groupby

import mlx.core as mx
import pytest
from environments import scripted
from environments.conversing import Host
from families import TOOLS, tokenizer_of
from test_chat import changed
from test_families import call, encoded, letters, result, said, user

from grpo.environments.chat import Chat
from grpo.environments.conversations import Conversations
from grpo.environments.play import Table
from grpo.environments.seats import ConversationLimits
from grpo.errors import UserError
from grpo.generation.sampling import Sampling
from grpo.rollout import RolloutEngine
from grpo.types import Task

ASKED = [user("Sun?")]
THOUGHT = "<think>\nI ask.\n</think>\n\n"
WEATHER = call("weather", city="Paris")
TALK = [
    said("", WEATHER, thought="Look."),
    result("sun <|im_end|>"),
    said("Sun.", thought="It says so."),
    user("Sure? <|im_end|>"),
    said("Yes.", thought="Hm."),
    user("Why?"),
]
QWEN3 = (
    "<|im_start|>user\nSun?<|im_end|>\n<|im_start|>assistant\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\nsun <|im_end|>\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\nSun.<|im_end|>\n<|im_start|>user\nSure? <|im_end|><|im_end|>\n"
    "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
)
GLM = (
    "<|user|>\nSun?<|assistant|>\n<think></think>\n<tool_call>weather\n<arg_key>city</arg_key>\n"
    "<arg_value>Paris</arg_value>\n</tool_call><|observation|>\n<tool_response>\nsun <|im_end|>\n</tool_response>"
    "<|assistant|>\n<think></think>\nSun.<|user|>\nSure? <|im_end|><|assistant|>\n<think></think>\nYes."
    "<|user|>\nWhy?<|assistant|>"
)
HARMONY = (
    "<|start|>user<|message|>Sun?<|end|><|start|>assistant to=functions.weather<|channel|>commentary json<|message|>"
    '{"city": "Paris"}<|call|><|start|>functions.weather to=assistant<|channel|>commentary<|message|>"sun <|im_end|>"'
    "<|end|><|start|>assistant<|channel|>final<|message|>Sun.<|end|><|start|>user<|message|>Sure? <|im_end|><|end|>"
    "<|start|>assistant<|channel|>final<|message|>Yes.<|end|><|start|>user<|message|>Why?<|end|><|start|>assistant"
)


@pytest.mark.parametrize(
    ("family", "written"),
    [("qwen3", QWEN3), ("qwen3-thinking", QWEN3 + "<think>\n"), ("glm-4", GLM), ("gpt-oss", HARMONY)],
)
def test_what_a_next_turn_follows_is_what_the_template_writes(family: str, written: str) -> None:
    """Without any thinking; what was said stays text where it holds a control token."""
    tokenizer = tokenizer_of(family)
    chat = Chat.of(tokenizer, TOOLS, answers=True)
    ids = chat.anew.prompt_ids(ASKED, TALK)
    assert tokenizer.decode(ids).endswith(written)
    if "<|im_end|>" in tokenizer.get_vocab():  # two of them are text
        marks = ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        assert marks == tokenizer.decode(ids).count("<|im_end|>") - 2
    lasting = chat.anew.lasting(ASKED, chat.prompt_ids(ASKED))
    assert lasting == ids[: len(lasting)] == chat.prompt_ids(ASKED)[: len(lasting)]
    assert "Sun?" in tokenizer.decode(lasting)


def test_what_the_model_called_a_tool_with_cannot_end_a_turn() -> None:
    tokenizer = tokenizer_of("qwen3")
    anew = Chat.of(tokenizer, TOOLS, answers=True).anew
    mark, counts = tokenizer.convert_tokens_to_ids("<|im_end|>"), []
    for city in ("Rome", "<|im_end|>"):
        ids = anew.prompt_ids(ASKED, [said("", call("weather", city=city)), result("x"), said("Sun."), user("So?")])
        assert city in tokenizer.decode(ids)
        counts.append(ids.count(mark))
    assert counts[0] == counts[1]


def test_several_calls_in_a_turn_are_written_as_far_as_the_template_can() -> None:
    several = [said("", WEATHER, call("now")), result("sun"), result("noon", "now"), said("Sun."), user("So?")]
    refuses = "{% if (message.tool_calls or []) | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
    turn = "{% for tool_call in message.tool_calls or [] %}"
    for tokenizer, times in ((tokenizer_of("qwen3"), 1), (changed("qwen3", turn, refuses + turn), 0)):
        text = tokenizer.decode(Chat.of(tokenizer, TOOLS, answers=True).anew.prompt_ids(ASKED, several))
        assert text.count('"name": "weather", "arguments"') == 1
        assert text.count('"name": "now", "arguments"') == times
        assert "noon" in text


@pytest.mark.parametrize(
    ("chat", "why"),
    [
        (
            lambda: Chat.of(tokenizer_of("qwen2.5"), answers=True),
            "does not leave out thinking before a user's message",
        ),
        (lambda: Chat.of(tokenizer_of("qwen3"), TOOLS), "no environment answers as the user"),
        (lambda: Chat.of(tokenizer_of("qwen3"), answers=True, templated=False), "prompts do not use a chat template"),
    ],
)
def test_where_it_would_do_nothing_it_is_refused(chat, why: str) -> None:
    with pytest.raises(UserError, match=f"drop has no effect: .*{why}"):
        _ = chat().anew


def test_a_prompt_that_begins_the_answer_cannot_be_written_again() -> None:
    anew = Chat.of(tokenizer_of("qwen3"), TOOLS, answers=True).anew
    with pytest.raises(UserError, match=r"ends with the beginning of the model's answer.*use thinking: keep"):
        anew.prompt_ids([*ASKED, said("It")], TALK)


def played(monkeypatch: pytest.MonkeyPatch, family: str, turn: list[int], tokenizer=None, limit=2000):
    """Three turns of a model that says the same in each, and the text of the prompt that all rows share."""
    tokenizer = tokenizer or tokenizer_of(family)
    monkeypatch.setattr(scripted, "VOCABULARY", len(tokenizer))
    monkeypatch.setattr(scripted, "STOPS", frozenset(tokenizer.eos_token_ids))
    chat = Chat.of(tokenizer, TOOLS, answers=True)
    task = Task(0, ASKED, chat.prompt_ids(ASKED), {})
    generator = scripted.Scripted({task.prompt_ids[-1]: turn})
    generator.tokenizer = tokenizer
    generator._rules = lambda sampling: scripted.Stopping(
        sampling, scripted.STOPS, lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)
    )
    host = Host("messages", step=lambda *_: "No.")
    environment = Conversations({"": Table(host, chat, ConversationLimits(max_turns=3), anew=chat.anew)}, 0, 2000)
    (group,) = RolloutEngine(generator, Sampling(1.0, limit), environment).rollout([task], 1, 1.0, mx.random.key(0))
    (rollout,) = group.rollouts
    shared = group.task.prompt_ids
    assert task.prompt_ids[: len(shared)] == shared
    assert all(len(shared) + len(p.token_ids) <= len(task.prompt_ids) + limit for p in rollout.trajectory.parts)
    return rollout.trajectory, tokenizer.decode(shared)


@pytest.mark.parametrize(("family", "lead"), [("qwen3", ""), ("qwen3-thinking", "<think>\n")])
def test_each_turn_is_sampled_after_what_the_template_writes(
    monkeypatch: pytest.MonkeyPatch, family: str, lead: str
) -> None:
    """And trained on there, token by token as it was sampled, with its thinking."""
    tokenizer = tokenizer_of(family)
    written = f"{THOUGHT.removeprefix(lead)}Rain?<|im_end|>"
    whole = encoded(tokenizer, written)
    turn = [whole[0], *(one for token in whole[1:] for one in letters(tokenizer, token))]
    row, begun = played(monkeypatch, family, turn)
    once = "Rain?<|im_end|>\n<|im_start|>user\nNo.<|im_end|>\n<|im_start|>assistant\n"
    prompt = "<|im_start|>user\nSun?<|im_end|>\n<|im_start|>assistant\n"
    assert len(row.parts) == 3
    for number, part in enumerate(row.parts):
        spans = [
            (trained, [next(ids) for _ in span])
            for ids in [iter(part.token_ids)]
            for trained, span in groupby(part.trained)
        ]
        assert [trained for trained, _ in spans] in ([False, True], [True])
        read = tokenizer.decode(spans[0][1]) if len(spans) > 1 else ""
        assert (begun + read).endswith(prompt + once * number + lead)
        assert spans[-1][1] == turn
    assert row.text.count("No.") == 2
    assert row.text.count("Rain?") == 3
    assert row.turns == 3


def test_where_there_is_nothing_to_drop_the_row_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The template writes the very tokens that were sampled and said: the keys and values are those that there are."""
    tokenizer = tokenizer_of("qwen3")
    row, _ = played(monkeypatch, "qwen3", encoded(tokenizer, "Rain?<|im_end|>"))
    assert row.begins == ()
    assert row.turns == 3


def test_the_limit_is_of_the_whole_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("qwen3")
    turn = encoded(tokenizer, f"{THOUGHT}Rain?<|im_end|>")
    between = len(encoded(tokenizer, "\n<|im_start|>user\nNo.<|im_end|>\n<|im_start|>assistant\n"))
    exact = 3 * len(turn) + 2 * between
    for limit, trained, reason in (
        (exact + 1, 3 * len(turn), "max_turns"),
        (exact - 1, 3 * len(turn) - 1, "length"),
        (exact - len(turn) + 1, 2 * len(turn) + 1, "length"),
        (exact - len(turn), 2 * len(turn), "length"),  # the answer left no room: it was not said
    ):
        row, _ = played(monkeypatch, "qwen3", turn, limit=limit)
        assert (row.trained_tokens, row.finish_reason) == (trained, reason)
        answers = [one for one in row.conversation.messages if one["role"] == "user"]
        assert len(answers) == (row.turns if reason == "max_turns" else row.turns - 1)


def test_a_template_that_writes_more_than_was_said_comes_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row reads again counts where that is more, so that no row is longer than was planned for."""
    longer = changed("qwen3", "{{ message.content }}", "{{ message.content }}{{ ' so' * 40 }}")
    turn = encoded(longer, f"{THOUGHT}Rain?<|im_end|>")
    row, _ = played(monkeypatch, "qwen3", turn, longer, 60 + len(turn))
    assert (row.finish_reason, row.turns) == ("length", 1)


def test_a_template_that_changes_how_a_prompt_begins_fails_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = changed("qwen3", "{% if tools %}", "{{ messages | length if messages | length > 4 else '' }}{% if tools %}")
    row, _ = played(monkeypatch, "qwen3", encoded(odd, f"{THOUGHT}Rain?<|im_end|>"), odd)
    assert row.finish_reason == "failed"
    assert "changes how a prompt begins as the conversation continues: use thinking: keep" in str(
        row.conversation.failure
    )
