"""Prompts of chat messages: the answer never stands in the prompt, and a system message is put before all of them."""

from __future__ import annotations

import re

import pytest

from grpo.config import DataConfig
from grpo.data.prompts import PromptRenderer, last_text
from grpo.errors import UserError

QUESTION = {"role": "user", "content": "1+1?"}
ANSWER = {"role": "assistant", "content": "#### 2"}
SYSTEM = {"role": "system", "content": "Be brief."}


def renderer(toy, **settings) -> PromptRenderer:
    return PromptRenderer(DataConfig(source="rows.jsonl", prompt="messages", **settings), toy[1])


def rendered(toy, messages: list, **settings) -> str:
    task = renderer(toy, **settings).task(3, {"messages": messages})
    before = [SYSTEM] if "system" in settings else []
    assert task.prompt == [*before, *messages]  # rewards see what the model is given
    return toy[1].decode(list(task.prompt_ids))


@pytest.mark.parametrize("messages", [[QUESTION, ANSWER], [ANSWER], [QUESTION, ANSWER, QUESTION, ANSWER]])
def test_an_answer_at_the_end_is_refused_with_the_row(toy, messages: list) -> None:
    with pytest.raises(UserError) as error:
        renderer(toy).task(3, {"messages": messages})
    said = str(error.value)
    assert "column 'messages' of row 3 of rows.jsonl ends with an answer of the assistant, '#### 2'" in said
    assert "data.continue_final_message: true" in said


def test_an_earlier_answer_is_part_of_the_conversation(toy) -> None:
    text = rendered(toy, [QUESTION, ANSWER, QUESTION])
    assert text.endswith("#### 2<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n")


def test_a_prefill_is_continued_where_it_is_asked_for(toy) -> None:
    text = rendered(toy, [QUESTION, {"role": "assistant", "content": "It is"}], continue_final_message=True)
    assert text == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\nIt is"
    assert rendered(toy, [QUESTION], continue_final_message=True).endswith("<|im_start|>assistant\n")


def test_people_are_shown_the_question_and_not_the_prefill() -> None:
    assert last_text([SYSTEM, QUESTION, {"role": "assistant", "content": "It is"}]) == "1+1?"
    assert last_text([ANSWER]) == "#### 2"
    assert last_text("1+1?") == "1+1?"


def test_text_has_no_last_message_to_continue(toy) -> None:
    with pytest.raises(UserError, match=r"continue_final_message does nothing: the prompt in row 3 of \S+ is text"):
        renderer(toy, continue_final_message=True).task(3, {"messages": "1+1?"})


def test_messages_need_the_chat_template(toy) -> None:
    with pytest.raises(UserError, match=r"data.chat_template: never, but the prompt in row 3 of \S+ is chat"):
        renderer(toy, chat_template="never").task(3, {"messages": [QUESTION]})
    assert rendered(toy, [QUESTION], chat_template="always") == rendered(toy, [QUESTION])


def test_the_system_message_comes_before_messages_too(toy) -> None:
    text = rendered(toy, [QUESTION, ANSWER, QUESTION], system="Be brief.")
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?")
    assert text.count("Be brief.") == 1


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_second_system_message_is_refused(toy, role: str) -> None:
    with pytest.raises(UserError, match=rf"data.system: row 3 of rows.jsonl already has a {role} message"):
        rendered(toy, [SYSTEM | {"role": role}, QUESTION], system="Be brief.")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "is an empty list of messages"),
        ([QUESTION, "hello"], "message 2 in column 'messages' of row 3"),
        ([{"role": "user"}], "role and content"),
        (
            [{"role": "human", "content": "?"}],
            "message 1 in .* has the role 'human'; roles are system",
        ),
        ([{"role": "user", "content": None}], "content of message 1 in .* is not text, but NoneType"),
        ([{"role": "user", "content": [{"type": "image"}]}], "is not text, but list .* images"),
        ({"role": "user", "content": "?"}, "neither text nor a list of messages, but dict"),
        (b"What", "neither text nor a list of messages, but bytes"),
        (7, "neither text nor a list of messages, but int"),
    ],
)
def test_messages_that_will_not_do(toy, messages: object, said: str) -> None:
    with pytest.raises(UserError) as error:
        renderer(toy).task(3, {"messages": messages})
    assert re.search(said, str(error.value))
    assert "row 3" in str(error.value)


def test_what_a_template_refuses_names_the_row(toy) -> None:
    toy[1].chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"rejects row 3 of rows.jsonl: roles must alternate"):
        rendered(toy, [QUESTION, QUESTION])
