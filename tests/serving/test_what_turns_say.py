"""What turns say, in OpenAI's form: tool calls, thinking and stop strings, at once and streamed."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from environments.families import FAMILIES, TOOLS, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from saying import answers, put_together

from grpo.serving.speaker import Speaker

QUESTION = [{"role": "user", "content": "Sun in Paris?"}]
PARIS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
CALLS = {
    "qwen2.5": f"Let me see.\n{PARIS}<|im_end|>",
    "qwen3": f"<think>\nHm.\n</think>\n\n{PARIS}<|im_end|>",
    "llama3.1": '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]</s>',
    "gpt-oss": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.weather"
        '<|message|>{"city": "Paris"}<|call|>'
    ),
}


def asked(**more: Any) -> dict[str, Any]:
    return {"messages": QUESTION, **more}


@pytest.mark.parametrize("family", CALLS)
def test_tool_calls_are_told_as_openai_has_them(family: str) -> None:
    whole, events, ask = answers(tokenizer_of(family), CALLS[family], asked(tools=TOOLS))
    (choice,) = whole["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert call["id"] == "abcdefghi" if family == "mistral" else re.fullmatch("[a-z0-9]{9}", call["id"])
    assert choice["message"]["content"] == ("Let me see." if family == "qwen2.5" else None)
    assert choice["message"].get("reasoning_content") == ("Hm." if family in ("qwen3", "gpt-oss") else None)
    assert "weather" in tokenizer_of(family).decode(list(ask.prompt_ids))
    streamed = put_together(events)
    assert streamed["finish_reason"] == "tool_calls"
    assert streamed["content"] == (choice["message"]["content"] or "")
    assert streamed["reasoning_content"] == choice["message"].get("reasoning_content", "")
    (delta,) = streamed["tool_calls"]
    assert delta["index"] == 0
    assert delta["function"] == call["function"]


def test_without_tools_a_call_is_text_and_no_tools_are_shown() -> None:
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}):
        whole, events, ask = answers(tokenizer_of("qwen2.5"), CALLS["qwen2.5"], asked(**more))
        (choice,) = whole["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"] == f"Let me see.\n{PARIS}" == put_together(events)["content"]
        assert "# Tools" not in tokenizer_of("qwen2.5").decode(list(ask.prompt_ids))


def test_a_conversation_goes_on_with_what_was_answered() -> None:
    """The message of an answer, sent back as clients do, is what the template writes of a call."""
    tokenizer = tokenizer_of("qwen2.5")
    whole, _, _ = answers(tokenizer, CALLS["qwen2.5"], asked(tools=TOOLS))
    message = {**whole["choices"][0]["message"], "refusal": None, "annotations": [], "audio": None}
    call = message["tool_calls"][0]
    result = {"role": "tool", "tool_call_id": call["id"], "content": [{"type": "text", "text": "sunny"}]}
    messages = [*QUESTION, message, result]
    _, _, ask = answers(tokenizer, "Yes.<|im_end|>", {"messages": messages, "tools": TOOLS})
    expected = tokenizer.apply_chat_template(
        [
            *QUESTION,
            {
                "role": "assistant",
                "content": "Let me see.",
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}],
            },
            {"role": "tool", "content": "sunny"},
        ],
        tools=TOOLS,
        add_generation_prompt=True,
    )
    assert list(ask.prompt_ids) == list(expected)


def test_a_token_that_ends_the_turn_is_no_part_of_it() -> None:
    tokenizer = tokenizer_of("qwen2.5")
    for end in ("<tool_response>", "!"):
        (token,) = tokenizer.encode(end, add_special_tokens=False)
        body = asked(stop_token_ids=[token], return_token_ids=True)
        whole, events, _ = answers(tokenizer, f"Yes{end} and more", body)
        (choice,) = whole["choices"]
        assert choice["token_ids"][-1] == token
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Yes", "stop")
        assert put_together(events)["content"] == "Yes"


def test_a_tool_is_shown_in_the_order_of_its_keys() -> None:
    tokenizer = tokenizer_of("qwen2.5")
    speaker = Speaker(tokenizer, 10_000, None)
    function = TOOLS[1]["function"]
    turned = [{"type": "function", "function": dict(reversed(function.items()))}]
    texts = []
    for tools in ([TOOLS[1]], turned):
        prompt = speaker.prompt_of(speaker.voice(tools, None), QUESTION)
        texts.append(tokenizer.decode(list(prompt.ids)))
    assert [text.index('"name"') < text.index('"description"') for text in texts] == [True, False]


def test_template_settings_reach_the_template() -> None:
    tokenizer = tokenizer_of("qwen3")
    _, _, plain = answers(tokenizer, "Yes.<|im_end|>", asked())
    _, _, without = answers(tokenizer, "Yes.<|im_end|>", asked(chat_template_kwargs={"enable_thinking": False}))
    end = tokenizer.encode("<think>\n\n</think>\n\n", add_special_tokens=False)
    assert list(without.prompt_ids) == [*plain.prompt_ids, *end]


@pytest.mark.parametrize(
    ("text", "thought", "content"),
    [
        ("<think>\nHm, so.\n</think>\n\nYes, naïve 東京.<|im_end|>", "Hm, so.", "Yes, naïve 東京."),
        ("<think>\nHm, so", "Hm, so", ""),
        ("Yes.<|im_end|>", None, "Yes."),
        ("<think>\n\n</think>\n\nYes.<|im_end|>", "", "Yes."),
    ],
)
def test_thinking_is_streamed_apart(text: str, thought: str | None, content: str) -> None:
    whole, events, _ = answers(tokenizer_of("qwen3"), text, asked())
    message = whole["choices"][0]["message"]
    assert (message.get("reasoning_content"), message["content"]) == (thought, content)
    streamed = put_together(events)
    assert (streamed["reasoning_content"], streamed["content"]) == (thought or "", content)
    if len(content) > 4:
        pieces = [one["delta"]["content"] for event in events for one in event["choices"] if "content" in one["delta"]]
        assert len(pieces) > 3  # and not all at the end


PARTS = ["<think>", "</think>", "\n", " ", "Hm", "東", "é", "🌦", "Yes", "stop", "st", "<", "</", "[THINK]", "  ", PARIS]


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.template])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_streams_add_up_to_the_whole_whatever_is_said(family: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(family)
    ends = ["", *FAMILIES[family].ends]
    parts = st.lists(st.sampled_from([*PARTS, *FAMILIES[family].special[:4]]), max_size=12)
    text = "".join(data.draw(parts)) + data.draw(st.sampled_from(ends))
    before, closed, _ = text.partition("</think>")
    if not text or ("<think>" in before if family == "qwen3-thinking" else closed and "<think>" not in before):
        return  # it begins to think twice, or ends what it has not begun
    stop = data.draw(st.sampled_from([None, "stop", ["Yes", "</think>"]]))
    whole, events, _ = answers(tokenizer, text, asked(**({"stop": stop} if stop else {})))
    message, streamed = whole["choices"][0]["message"], put_together(events)
    told = (streamed["reasoning_content"], streamed["content"])
    assert told == (message.get("reasoning_content") or "", message["content"])


def test_streamed_text_of_completions_adds_up_and_holds_back_stops() -> None:
    tokenizer = tokenizer_of("plain")
    body = {"prompt": "Say", "stop": ["stops"]}
    whole, events, _ = answers(tokenizer, "It st sto stop stops here", body)
    assert whole["choices"][0]["text"] == "It st sto stop "
    assert whole["choices"][0]["finish_reason"] == "stop"
    texts = [one["text"] for event in events for one in event["choices"]]
    assert "".join(texts) == "It st sto stop "
    assert not any("stops".startswith(text.strip()) and text.strip() for text in texts[-1:])
