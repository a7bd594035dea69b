"""What was said in a session, as one conversation."""

from __future__ import annotations

from grpo.agents.told import conversation_of
from grpo.serving.sessions import Answered


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def model(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


def said(*messages: dict, answer: dict) -> Answered:
    return Answered(messages, answer, (1,), (2,))


def texts(messages) -> list[str]:
    return [message["content"] for message in messages]


def test_nothing_said_is_no_conversation() -> None:
    assert conversation_of([]) == ((), ())


def test_each_request_adds_what_is_new() -> None:
    prompt, told = conversation_of(
        [
            said(user("a"), answer=model("b")),
            said(user("a"), model("b"), user("c"), answer=model("d")),
            said(user("a"), model("b"), user("c"), model("d"), user("a"), answer=model("e")),
        ]
    )
    assert prompt == (user("a"),)
    assert texts(told) == ["b", "c", "d", "a", "e"]


def test_another_conversation_adds_what_is_not_there_yet() -> None:
    prompt, told = conversation_of(
        [
            said(user("a"), answer=model("b")),
            said(user("x"), user("y"), answer=model("z")),
            said(user("a"), model("b"), user("c"), answer=model("d")),
        ]
    )
    assert prompt == (user("a"),)
    assert texts(told) == ["b", "x", "y", "z", "c", "d"]


def test_choices_add_their_answers_alone() -> None:
    told = conversation_of([said(user("a"), answer=model(text)) for text in "bcb"])[1]
    assert texts(told) == ["b", "c", "b"]


def test_what_clients_send_back_is_what_was_said() -> None:
    """Without the thinking, and with an id of a call that is theirs."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    first = model("", tool_calls=[call], reasoning_content="hm")
    back = model("", tool_calls=[{**call, "id": "2"}])
    result = {"role": "tool", "content": "3", "tool_call_id": "2"}
    told = conversation_of([said(user("a"), answer=first), said(user("a"), back, result, answer=model("d"))])[1]
    assert told == (first, result, model("d"))
